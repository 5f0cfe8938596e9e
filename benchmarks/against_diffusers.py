"""ddim_jax beside diffusers on PyTorch: the same network, the same weights, the same machine, in turns.

    python -m benchmarks.against_diffusers --config configs/cifar10.py --out FILE [--what forward,ddim,training]

`forward` is one call of the network, `ddim` all S steps from noise to image (`DDIMPipeline` there), `training` an
update: loss, gradient, clipping, Adam and the moving average. diffusers runs eager, with channels_last, and through
torch.compile; its best is what the ratio is to. Every round times each of them once, so that a machine that slows down
slows all, after one run that is not timed: the memory that one gives back the next would have to ask for. What is told
are medians, in FILE.json and FILE.md. On a GPU, torch uses it too, and
config.model.dtype=bfloat16 is for both.

Needs pip install -e ".[parity]".
"""

from __future__ import annotations

import dataclasses
import pathlib
import platform
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.training import matrix_product_rate
from ddim_jax import cli, generate, samplers, sharding, train, train_state, trajectory
from ddim_jax import config as config_lib
from ddim_jax.config import Config, ConfigError, blame
from ddim_jax.pretrained import save_diffusers
from ddim_jax.registry import lookup
from experiments import common

OPTIONS = {
    "what": ("forward,ddim,training", "What to time."),
    "batches": ("1,4,16", "Batch sizes of forward and ddim."),
    "training_batch": ("16", "Batch size of training."),
    "steps": ("10,50", "Values of S of ddim."),
    "rounds": ("7", "How often each is timed."),
    "compiled": (True, "Also torch.compile, which needs a C++ compiler."),
    "out": (None, "The table is written to this, with .json and .md after it."),
}
OURS = "ddim_jax"
EAGER, CHANNELS_LAST, COMPILED = "diffusers", "channels_last", "torch.compile"

Runs = dict[str, Callable[[], Any]]  # competitor -> what it does, once, to its end


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    (rounds,), (size,) = (common.ints(name, getattr(options, name)) for name in ("rounds", "training_batch"))
    batches, steps = common.ints("batches", options.batches), common.ints("steps", options.steps)
    kinds = {
        "forward": lambda: [({"batch": batch}, forward(config, theirs, params, batch)) for batch in batches],
        "ddim": lambda: [
            ({"batch": batch, "S": S}, ddim(config, theirs, params, batch, S)) for S in steps for batch in batches
        ],
        "training": lambda: [({"batch": size}, training(config, theirs, size))],
    }
    chosen = [name.strip() for name in options.what.split(",")]
    with blame("--what"):
        for name in chosen:
            lookup(kinds, name)
    if not options.out:
        raise ConfigError("--out is missing: the file of the results, without its ending")
    params = random_params(config)
    theirs = Theirs(config, params, options.compiled)
    rows = []
    for name in chosen:
        for axes, runs in kinds[name]():
            rows.append({"what": name, **axes, **in_turns(runs(), rounds, f"{name} {axes}")})
            print(told(rows[-1]), flush=True)
    out = pathlib.Path(options.out)
    about = {
        "network": config.name,
        "dtype": config.model.dtype,
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "processor": processor(),
        "jax": jax.__version__,
        **theirs.versions,
        "matrix_product_gflops": matrix_product_rate(config_lib.DTYPES[config.model.dtype]) / 1e9,
    }
    common.write_json(out.with_name(f"{out.name}.json"), {**about, "rows": rows})
    common.write_text(out.with_name(f"{out.name}.md"), text(about, rows))
    print("\n" + text(about, rows))


def random_params(config: Config) -> Any:
    params = jax.jit(lambda key: train_state.init_params(config_lib.network(config.model), key))(jax.random.key(0))
    rng = np.random.default_rng(0)  # what closes a branch starts at 0: that would be nothing to compute with
    return jax.tree.map(lambda leaf: leaf + 0.01 * rng.normal(size=leaf.shape).astype(np.float32), params)


def in_turns(runs: Runs, rounds: int, doing: str) -> dict[str, Any]:
    """Median seconds of each, and how many times faster ours is than the best of the others."""
    seconds = {name: [] for name in runs}
    for round_ in tqdm(range(rounds + 1), doing, leave=False):
        for name, run in runs.items():
            run()
            begun = time.perf_counter()
            run()
            if round_:  # the first compiles
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: [min(values), max(values)] for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name != OURS)
    return {"seconds": medians, "from_to": spread, "ratio": best / medians[OURS]}


# --- ours ---


def placed(batch: int) -> tuple[Any, Callable[[Any], Any], Callable[[np.ndarray], jax.Array]]:
    """The mesh, and where parameters and batches go: over all devices, where these divide the batch."""
    mesh = sharding.data_mesh()
    if batch % mesh.size:
        return mesh, jax.device_put, jnp.asarray
    return mesh, lambda tree: sharding.put_replicated(mesh, tree), lambda array: sharding.split_batch(mesh, array)


def noise(config: Config, batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, *generate.image_shape(config))).astype(np.float32)


@jax.jit
def _ask(eps_fn, x, t):
    return eps_fn(x, t)


def forward(config: Config, theirs: Theirs, params: Any, batch: int) -> Callable[[], Runs]:
    def runs() -> Runs:
        _, put, split = placed(batch)
        eps_fn, x = generate.eps_fn(config, put(params)), split(noise(config, batch))
        return {
            OURS: lambda: _ask(eps_fn, x, 500).block_until_ready(),
            **theirs.forward(noise(config, batch)),
        }

    return runs


def ddim(config: Config, theirs: Theirs, params: Any, batch: int, S: int) -> Callable[[], Runs]:
    def runs() -> Runs:
        _, put, split = placed(batch)
        noise_schedule = config_lib.noise_schedule(config.schedule)
        transitions = trajectory.descend(noise_schedule, trajectory.leading(noise_schedule.num_steps, S))
        eps_fn, x = generate.eps_fn(config, put(params)), split(noise(config, batch))
        integrate = lambda: samplers.integrate(samplers.ddim(), eps_fn, transitions, x)
        return {OURS: lambda: sharding.to_host(integrate()), **theirs.ddim(batch, S)}

    return runs


def training(config: Config, theirs: Theirs, size: int) -> Callable[[], Runs]:
    def runs() -> Runs:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size, accumulate=1))
        mesh = sharding.data_mesh()
        optimizer, state, key = train.first_state(sized, mesh)
        update_step, _ = train.compiled_update(sized, optimizer, mesh, state, key)
        pixels = np.random.default_rng(0).integers(0, 256, (size, *generate.image_shape(config)), dtype=np.uint8)
        images, held = sharding.split_batch(mesh, pixels), [state]

        def run():
            held[0], metrics = update_step(held[0], images, None, key)
            jax.block_until_ready((held[0], metrics))

        return {OURS: run, **theirs.training(config, pixels)}

    return runs


# --- theirs ---


class Theirs:
    """diffusers' network with our weights, three times: as it is, in channels_last, and compiled."""

    def __init__(self, config: Config, params: Any, compiled: bool):
        import diffusers
        import torch

        self.torch, self.diffusers = torch, diffusers
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        diffusers.utils.logging.set_verbosity_error()
        values = dataclasses.asdict(config)
        values["sample"]["tau"] = "leading"
        with tempfile.TemporaryDirectory() as folder:
            save_diffusers(pathlib.Path(folder) / "pipeline", params, values, "")
            load = lambda: diffusers.UNet2DModel.from_pretrained(f"{folder}/pipeline/unet").to(self.device, self.dtype)
            self.networks = {EAGER: load(), CHANNELS_LAST: load().to(memory_format=torch.channels_last)}
            if compiled:
                mode = "max-autotune" if self.device == "cuda" else "default"
                self.networks[COMPILED] = load().to(memory_format=torch.channels_last)
                self.networks[COMPILED].compile(mode=mode)  # in place: it stays a pipeline's component

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def tensor(self, x: np.ndarray, name: str) -> Any:
        layout = self.torch.contiguous_format if name == EAGER else self.torch.channels_last
        tensor = self.torch.tensor(x.transpose(0, 3, 1, 2)).to(self.device, self.dtype)
        return tensor.contiguous(memory_format=layout)

    def forward(self, x: np.ndarray) -> Runs:
        def run(network: Any, tensor: Any) -> None:
            with self.torch.inference_mode():
                network(tensor, 499)
                self.wait()

        tensors = {name: self.tensor(x, name) for name in self.networks}
        return {name: (lambda n=n, name=name: run(n.eval(), tensors[name])) for name, n in self.networks.items()}

    def ddim(self, batch: int, S: int) -> Runs:
        def run(network: Any) -> None:
            scheduler = self.diffusers.DDIMScheduler(clip_sample=False)
            pipeline = self.diffusers.DDIMPipeline(network, scheduler)
            pipeline.set_progress_bar_config(disable=True)
            pipeline(batch_size=batch, num_inference_steps=S, eta=0.0, output_type="np")
            self.wait()

        return {name: (lambda n=n: run(n.eval())) for name, n in self.networks.items()}

    def training(self, config: Config, pixels: np.ndarray) -> Runs:
        torch = self.torch
        alpha_bar = torch.tensor(config_lib.noise_schedule(config.schedule).alpha_bar[1:], dtype=self.dtype)
        alpha_bar = alpha_bar.to(self.device)

        def run(name: str) -> Callable[[], None]:
            network = self.networks[name].train()
            parameters = list(network.parameters())
            average = [parameter.detach().clone() for parameter in parameters]
            optimizer = torch.optim.Adam(parameters, lr=config.train.learning_rate)
            x_0 = self.tensor(pixels.astype(np.float32) / 127.5 - 1, name)

            def once() -> None:
                t, eps = torch.randint(0, len(alpha_bar), (len(x_0),), device=self.device), torch.randn_like(x_0)
                level = alpha_bar[t].reshape(-1, 1, 1, 1)
                said = network(level.sqrt() * x_0 + (1 - level).sqrt() * eps, t).sample
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.mse_loss(said, eps).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
                optimizer.step()
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - config.train.ema_decay)
                self.wait()

            return once

        return {name: run(name) for name in self.networks}


# --- the table ---


def processor() -> str:
    """What the machine calls it, where it says."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def told(row: dict[str, Any]) -> str:
    axes = ", ".join(f"{name} {row[name]}" for name in ("batch", "S") if name in row)
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in row["seconds"].items())
    return f"{row['what']}, {axes}: {row['ratio']:.2f} times the best ({times})"


def text(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    head = (
        f"{about['network']}, {about['dtype']}, {about['devices']} x {about['device']} ({about['machine']}, "
        f"{about['processor']}), jax {about['jax']}, torch {about['torch']}, diffusers {about['diffusers']}; medians "
        f"of {about['rounds']}, in turns; a matrix product of jax's: {about['matrix_product_gflops']:,.0f} GFLOP/s\n\n"
    )
    shown = lambda row, name: f"{1e3 * row['seconds'][name]:,.1f}" if name in row["seconds"] else ""
    what = lambda row: f"{row['what']}, S = {row['S']}" if "S" in row else row["what"]
    body = [[what(row), row["batch"], *(shown(row, name) for name in names), f"{row['ratio']:.2f}"] for row in rows]
    return head + common.markdown(["ms", "batch", *names, "best of theirs / ours"], body)


if __name__ == "__main__":
    cli.start(main, OPTIONS)
