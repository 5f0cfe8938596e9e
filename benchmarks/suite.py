"""All speed measurements in one command, compared with diffusers on PyTorch where it has the same function.

    python -m benchmarks.suite --config configs/cifar10.py --out FILE [--what forward,training,overhead]

One table for each part in --what is written to FILE.json and FILE.md, with a description of the machine:

- `ceiling`: the peak rates of the machine, measured by one large matrix product in the network's dtype and one large
  copy.
- `forward`: one forward pass of the network.
- `ddim`: all S steps from noise to image (in diffusers: `DDIMPipeline`).
- `training`: one update, that is loss, gradient, clipping, Adam, and moving average.
- `overhead`: the time of S steps of DDIM over that of S forward passes.
- `start`: the time from the start of the command to the picture on disk, with an empty and with a filled
  compilation cache.
- `memory`: the memory of sampling and of an update by XLA's analysis of the compiled programs, and the compile times.
- `input`: the images per second that the config's data set provides in training, and those that an update consumes.

`forward`, `ddim` and `training` compare ddim_jax with three variants of diffusers with the same weights: eager,
channels_last, and torch.compile. The column `best diffusers / ddim_jax` is the smallest time of diffusers over the time
of ddim_jax: above 1, ddim_jax is faster. Further columns have the operations as XLA counts them, and their rate as a
fraction of the rate of the matrix product.

Every round times each competitor once, so that a change of the machine's speed affects all of them. An untimed run
precedes each timed run, because the previous competitor may have released memory that must be allocated again. The
tables have the medians. On a GPU, PyTorch uses the GPU too, and config.model.dtype=bfloat16 applies to both. diffusers
needs pip install -e ".[parity]"; --nocompetitors omits it.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.data import rates
from benchmarks.diffusers_baseline import DiffusersBaseline
from ddim_jax import cli, data, samplers, sampling, trajectory
from ddim_jax import config as config_lib
from ddim_jax.config import Config
from ddim_jax.gaussian import Denoise
from ddim_jax.planning.measure import copy_rate, machines, matrix_product_rate
from ddim_jax.registry import lookup
from ddim_jax.training import loop
from ddim_jax.trajectory import Transitions
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common

DDIM_JAX = "ddim_jax"
RATIO = "best diffusers / ddim_jax"
ROOT = pathlib.Path(__file__).parents[1]

Runs = dict[str, Callable[[], Any]]  # competitor -> a function that runs once and waits for the result
Row = dict[str, Any]  # the name of a column -> the measured value


class Setting(NamedTuple):
    """The arguments that all parts of the suite have in common."""

    config: Config
    params: Any
    diffusers: DiffusersBaseline | None
    batches: list[int]
    training_batch: int
    steps: list[int]
    rounds: int
    ceiling: float  # operations per second


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    (rounds,), (size,) = (common.ints(name, getattr(options, name)) for name in ("rounds", "training_batch"))
    batches, steps = common.ints("batches", options.batches), common.ints("steps", options.steps)
    chosen = [name.strip() for name in options.what.split(",")]
    with error_context("--what"):
        parts = {name: lookup(PARTS, name) for name in chosen}
    if not options.out:
        raise ConfigError("--out is missing: the file of the results, without its extension")
    if options.competitors and config.model.num_classes:
        raise ConfigError("--competitors: must be off for a network with classes, give --nocompetitors")
    out = pathlib.Path(options.out)
    cli.writable_folder(out.parent)
    params = random_params(config)
    diffusers = DiffusersBaseline(config, params, options.compiled) if options.competitors else None
    rate = machines(jax.device_count()) * matrix_product_rate(config.model.dtype)
    setting = Setting(config, params, diffusers, batches, size, steps, rounds, rate)
    about = {
        "network": config.name,
        "dtype": config.model.dtype,
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        **(diffusers.versions if diffusers else {}),
    }
    tables: dict[str, list[Row]] = {}
    for name, part in parts.items():
        tables[name] = []
        for row in part(setting):
            tables[name].append(row)  # the file is written after every row, so an interruption loses none
            print(f"{name}: {', '.join(f'{column} {formatted(value)}' for column, value in row.items())}", flush=True)
            common.write_json(out.with_name(f"{out.name}.json"), {**about, "tables": tables})
    common.write_text(out.with_name(f"{out.name}.md"), text(about, tables))
    print("\n" + text(about, tables))


def random_params(config: Config) -> Any:
    """The initial parameters with noise added."""
    params = jax.jit(config_lib.network(config.model).init)(jax.random.key(0))
    rng = np.random.default_rng(0)  # the initial weights are not representative: some are 0
    return jax.tree.map(lambda leaf: leaf + 0.01 * rng.normal(size=leaf.shape).astype(np.float32), params)


def in_turns(runs: Runs, rounds: int, doing: str) -> dict[str, list[float]]:
    """The times in seconds of every round, for each competitor."""
    seconds = {name: [] for name in runs}
    for round_ in tqdm(range(rounds + 1), doing, leave=False):
        for name, run in runs.items():
            run()
            begin = time.perf_counter()
            run()
            if round_:  # the first round compiles
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compared(setting: Setting, runs: Runs, doing: str, images: int, flops: float) -> Row:
    """The median times in milliseconds, the ratio of the best variant of diffusers to ddim_jax, and the rate as a
    fraction of the ceiling.
    """
    medians = {name: statistics.median(times) for name, times in in_turns(runs, setting.rounds, doing).items()}
    seconds = medians[DDIM_JAX]
    others = [value for name, value in medians.items() if name != DDIM_JAX]
    return {
        **{f"{name}, ms": 1e3 * value for name, value in medians.items()},
        **({RATIO: min(others) / seconds} if others else {}),
        "images/s": images / seconds,
        "GFLOP": flops / 1e9,
        "of the product's rate": flops / seconds / setting.ceiling,
    }


# --- the parts ---


def ceiling(setting: Setting) -> Iterator[Row]:
    yield {"a matrix product, TFLOP/s": setting.ceiling / 1e12, "a copy, GB/s": copy_rate() / 1e9}


def forward(setting: Setting) -> Iterator[Row]:
    for batch in setting.batches:
        call, flops = network_call(setting, batch)
        runs = {DDIM_JAX: lambda call=call: call().block_until_ready()}
        runs |= setting.diffusers.forward(noise(setting.config, batch)) if setting.diffusers else {}
        yield {"batch": batch, **compared(setting, runs, f"forward {batch}", batch, flops)}


def ddim(setting: Setting) -> Iterator[Row]:
    for S in setting.steps:
        for batch in setting.batches:
            run, flops = whole_run(setting, batch, S)
            runs = {DDIM_JAX: lambda run=run: sharding.to_host(run())}
            runs |= setting.diffusers.ddim(batch, S) if setting.diffusers else {}
            row = compared(setting, runs, f"ddim {batch} {S}", batch, flops)
            yield {"batch": batch, "S": S, **row, "50,000 images, s": 50_000 / row["images/s"]}


def training(setting: Setting) -> Iterator[Row]:
    size = setting.training_batch
    config = dataclasses.replace(
        setting.config, train=dataclasses.replace(setting.config.train, batch_size=size, accumulate=1)
    )
    update_step, state, key, flops = compiled_update(config)
    pixels = np.random.default_rng(0).integers(0, 256, (size, *config_lib.image_shape(config.model)), dtype=np.uint8)
    images, labels, current = sharding.split_batch(sharding.data_mesh(), pixels), labels_of(config, size), [state]

    def run():
        current[0], metrics = update_step(current[0], images, labels, key)
        jax.block_until_ready((current[0], metrics))

    runs = {DDIM_JAX: run, **(setting.diffusers.training(config, pixels) if setting.diffusers else {})}
    yield {"batch": size, **compared(setting, runs, "training", size, flops)}


def overhead(setting: Setting) -> Iterator[Row]:
    for S in setting.steps:
        for batch in setting.batches:
            call, _ = network_call(setting, batch)
            run, _ = whole_run(setting, batch, S)

            def calls(call=call, S=S):
                for _ in range(S):
                    output = call()
                    if jax.default_backend() == "cpu":
                        output.block_until_ready()
                output.block_until_ready()

            runs = {"steps": lambda run=run: run().block_until_ready(), "calls": calls}
            times = in_turns(runs, setting.rounds, f"overhead {batch} {S}")
            ratio = statistics.median(a / b for a, b in zip(times["steps"], times["calls"], strict=True))
            medians = {f"S {name}, ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
            yield {"batch": batch, "S": S, **medians, "steps / calls": ratio}


def start(setting: Setting) -> Iterator[Row]:
    """Times new processes with an empty and with a filled compilation cache. The files are in the page cache."""
    with tempfile.TemporaryDirectory() as folder:

        def once(number: int, cache: str) -> float:
            env = {**os.environ, "DDIM_JAX_CACHE": f"{folder}/{cache}"}
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
            command = [sys.executable, "-m", "ddim_jax.sample", "--config", str(ROOT / "configs/digits.py")]
            begin = time.perf_counter()
            subprocess.run([*command, f"--out={folder}/{number}"], cwd=ROOT, env=env, check=True, capture_output=True)
            return time.perf_counter() - begin

        cold = [once(i, f"cold{i}") for i in tqdm(range(setting.rounds), "start, cold", leave=False)]
        once(-1, "warm")
        warm = [once(-2 - i, "warm") for i in tqdm(range(setting.rounds), "start, warm", leave=False)]
    for name, seconds in ("nothing compiled", cold), ("compiled before", warm):
        yield {
            "100 digits, S = 50": name,
            "s": statistics.median(seconds),
            "from": min(seconds),
            "to": max(seconds),
        }


def memory(setting: Setting) -> Iterator[Row]:
    config = setting.config
    megabytes = lambda compiled: {
        "temporary, MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "arguments, MB": compiled.memory_analysis().argument_size_in_bytes / 1e6,
    }
    jax.config.update("jax_enable_compilation_cache", False)
    for batch in setting.batches:
        for S in 10, config_lib.noise_schedule(config.schedule).num_steps:
            lowered = lowered_run(setting, batch, S)
            begin = time.perf_counter()
            compiled = lowered.compile()
            seconds = time.perf_counter() - begin
            yield {"what": f"sampling, S = {S}", "batch": batch, "compile, s": seconds, **megabytes(compiled)}
    size = setting.training_batch
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size, accumulate=1))
    begin = time.perf_counter()
    update_step, *_ = compiled_update(config)
    seconds = time.perf_counter() - begin
    yield {"what": "update, with tracing", "batch": size, "compile, s": seconds, **megabytes(update_step)}
    jax.config.update("jax_enable_compilation_cache", True)


def input_(setting: Setting) -> Iterator[Row]:
    config = setting.config
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "train", config.data.options)
        source = data.in_memory(source) if config.data.in_memory else source
    provided = statistics.median(rates(source, 0 if source.instant else loop.READING_THREADS, batches=40))
    row = next(training(setting._replace(diffusers=None)))
    yield {"data": config.data.name, "provided, images/s": provided, "consumed, images/s": row["images/s"]}


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "ceiling": ceiling,
    "forward": forward,
    "ddim": ddim,
    "training": training,
    "overhead": overhead,
    "start": start,
    "memory": memory,
    "input": input_,
}

OPTIONS = {
    "what": (",".join(PARTS), "The parts to measure."),
    "batches": ("1,4,16", "The batch sizes of the forward pass and of sampling."),
    "training_batch": ("16", "The batch size of training."),
    "steps": ("10,50", "The values of S for ddim and overhead."),
    "rounds": ("7", "The number of timed rounds."),
    "competitors": (True, "Also time diffusers."),
    "compiled": (True, "Also time torch.compile, which needs a C++ compiler."),
    "out": (None, "The file of the results, without its extension: .json and .md are written."),
}


# --- the measured functions ---


def placement(batch: int) -> tuple[Callable[[Any], Any], Callable[[np.ndarray], jax.Array]]:
    """Functions that place parameters and batches on all devices, or on one if the batch is not divisible by them."""
    mesh = sharding.data_mesh()
    if batch % mesh.size:
        return jax.device_put, jnp.asarray
    return partial(sharding.put_replicated, mesh), partial(sharding.split_batch, mesh)


def noise(config: Config, batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, *config_lib.image_shape(config.model))).astype(np.float32)


def labels_of(config: Config, batch: int) -> jax.Array | None:
    labels = sampling.labels_of(config_lib.pipeline(config, None, sharding.data_mesh()), np.arange(batch))
    return None if labels is None else placement(batch)[1](labels)


@jax.jit
def _predict_eps(denoise, x, level):
    return denoise(x, level).eps


def counted(program: Any) -> float:
    """The operations of a program, as counted for a TPU: on a CPU, Winograd convolutions have fewer."""
    return float((program.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops", 0))


def network_and_input(setting: Setting, batch: int) -> tuple[Denoise, jax.Array]:
    """The denoiser, and a batch of noise for it."""
    put, split = placement(batch)
    labels = labels_of(setting.config, batch)
    pipeline = config_lib.pipeline(setting.config, put(setting.params), sharding.data_mesh())
    return sampling.conditioned(pipeline, labels), split(noise(setting.config, batch))


def network_call(setting: Setting, batch: int) -> tuple[Callable[[], jax.Array], float]:
    """A function that runs one forward pass, and its operations."""
    denoise, x = network_and_input(setting, batch)
    noise_schedule = config_lib.noise_schedule(setting.config.schedule)
    level = jax.tree.map(jnp.asarray, noise_schedule.level(noise_schedule.num_steps // 2))
    return lambda: _predict_eps(denoise, x, level), counted(_predict_eps.trace(denoise, x, level))


def transitions_of(config: Config, S: int) -> Transitions:
    noise_schedule = config_lib.noise_schedule(config.schedule)
    with error_context("--steps"):
        return trajectory.descend(noise_schedule, trajectory.leading(noise_schedule.num_steps, S))  # as in diffusers


def whole_run(setting: Setting, batch: int, S: int) -> tuple[Callable[[], jax.Array], float]:
    """A function that runs all steps of DDIM, and their operations."""
    transitions = transitions_of(setting.config, S)
    denoise, x = network_and_input(setting, batch)
    _, flops = network_call(setting, batch)
    return lambda: samplers.integrate(samplers.ddim(), denoise, transitions, x), S * flops


def lowered_run(setting: Setting, batch: int, S: int) -> Any:
    """All steps of DDIM, lowered but not compiled."""
    transitions = jax.tree.map(jnp.asarray, transitions_of(setting.config, S))
    run = jax.jit(lambda *args: samplers.integrate(samplers.ddim(), *args))
    denoise, x = network_and_input(setting, batch)
    return run.lower(denoise, transitions, x)


def compiled_update(config: Config) -> tuple[Any, Any, jax.Array, float]:
    """The compiled update, its first state, the random key, and the operations."""
    recipe, mesh = config_lib.recipe(config), sharding.data_mesh()
    state, key = loop.first_state(recipe, mesh)
    update_step, flops = loop.compiled_update(recipe, mesh, state, key, config_lib.image_shape(config.model))
    return update_step, state, key, flops


# --- the tables ---


def processor() -> str:
    """The name of the processor, as far as the operating system reports it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def formatted(value: Any) -> str:
    """A number with about three significant digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def text(about: dict[str, Any], tables: dict[str, list[Row]]) -> str:
    baseline = f", torch {about['torch']}, diffusers {about['diffusers']}" if "torch" in about else ""
    blocks = [
        f"{about['network']}, {about['dtype']}, {about['devices']} x {about['device']} ({about['machine']}, "
        f"{about['processor']}, {about['cores']} cores), jax {about['jax']}{baseline}; medians of "
        f"{about['rounds']} rounds"
    ]
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        body = [[formatted(row.get(column, "")) for column in columns] for row in rows]
        blocks += [f"### {name}", common.markdown(columns, body)]
    return "\n\n".join(blocks)


if __name__ == "__main__":
    cli.start(main, OPTIONS)
