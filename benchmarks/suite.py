"""Everything that is fast or slow here, in one command, beside diffusers on PyTorch where that has the same thing.

    python -m benchmarks.suite --config configs/cifar10.py --out FILE [--what forward,training,overhead]

One table for each word of --what, in FILE.json and FILE.md, with the machine above them:

- `ceiling`: what the machine can do, by one large matrix product in the network's dtype and one large copy.
- `forward`, `ddim`, `training`: one call of the network; all S steps from noise to image (`DDIMPipeline` there); an
  update, that is loss, gradient, clipping, Adam and the moving average. The same weights; diffusers eager, with
  channels_last, and through torch.compile. `best / ours` is the best of its times over ours. Beside it the operations
  that XLA counts, and which part of the matrix product's rate they are done at.
- `overhead`: S steps of DDIM over S calls of the network.
- `start`: seconds from the command to the first image in the file, with nothing compiled before and with all of it.
- `memory`: of sampling and of an update, as XLA's analysis of the compiled programs tells it, and seconds to compile.
- `input`: images a second that the config's data set gives in the order of training, and that an update takes.

Every round times each competitor once, so that a machine that slows down slows all, after one run that is not timed:
the memory that one gives back the next would have to ask for. What is told are medians. On a GPU torch uses it too, and
config.model.dtype=bfloat16 is for both. What stands beside diffusers needs pip install -e ".[parity]";
--nocompetitors does without.
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
from benchmarks.theirs import Theirs
from benchmarks.training import copy_rate, machines, matrix_product_rate
from ddim_jax import cli, data, samplers, sampling, trajectory
from ddim_jax import config as config_lib
from ddim_jax.config import Config
from ddim_jax.gaussian import Denoise
from ddim_jax.registry import lookup
from ddim_jax.training import loop
from ddim_jax.trajectory import Transitions
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common

OURS = "ddim_jax"
ROOT = pathlib.Path(__file__).parents[1]

Runs = dict[str, Callable[[], Any]]  # competitor -> what it does, once, to its end
Row = dict[str, Any]  # a column's name -> what is measured


class Setting(NamedTuple):
    """What all parts of the suite are given."""

    config: Config
    params: Any
    theirs: Theirs | None
    batches: list[int]
    training_batch: int
    steps: list[int]
    rounds: int
    ceiling: float  # operations a second


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    (rounds,), (size,) = (common.ints(name, getattr(options, name)) for name in ("rounds", "training_batch"))
    batches, steps = common.ints("batches", options.batches), common.ints("steps", options.steps)
    chosen = [name.strip() for name in options.what.split(",")]
    with error_context("--what"):
        parts = {name: lookup(PARTS, name) for name in chosen}
    if not options.out:
        raise ConfigError("--out is missing: the file of the results, without its ending")
    if options.competitors and config.model.num_classes:
        raise ConfigError(
            "--competitors: diffusers is timed without classes; --nocompetitors times such a network alone"
        )
    out = pathlib.Path(options.out)
    cli.writable_folder(out.parent)
    params = random_params(config)
    theirs = Theirs(config, params, options.compiled) if options.competitors else None
    rate = machines(jax.device_count()) * matrix_product_rate(config.model.dtype)
    setting = Setting(config, params, theirs, batches, size, steps, rounds, rate)
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
        **(theirs.versions if theirs else {}),
    }
    tables: dict[str, list[Row]] = {}
    for name, part in parts.items():
        tables[name] = []
        for row in part(setting):
            tables[name].append(row)
            print(f"{name}: {', '.join(f'{column} {shown(value)}' for column, value in row.items())}", flush=True)
            common.write_json(out.with_name(f"{out.name}.json"), {**about, "tables": tables})  # what is done is kept
    common.write_text(out.with_name(f"{out.name}.md"), text(about, tables))
    print("\n" + text(about, tables))


def random_params(config: Config) -> Any:
    params = jax.jit(config_lib.network(config.model).init)(jax.random.key(0))
    rng = np.random.default_rng(0)  # what closes a branch starts at 0: that would be nothing to compute with
    return jax.tree.map(lambda leaf: leaf + 0.01 * rng.normal(size=leaf.shape).astype(np.float32), params)


def in_turns(runs: Runs, rounds: int, doing: str) -> dict[str, list[float]]:
    """Seconds of every round of each."""
    seconds = {name: [] for name in runs}
    for round_ in tqdm(range(rounds + 1), doing, leave=False):
        for name, run in runs.items():
            run()
            begun = time.perf_counter()
            run()
            if round_:  # the first compiles
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def compared(setting: Setting, runs: Runs, doing: str, images: int, flops: float) -> Row:
    """Milliseconds of each, and how ours stands to the best of the others and to the machine."""
    medians = {name: statistics.median(times) for name, times in in_turns(runs, setting.rounds, doing).items()}
    ours = medians[OURS]
    others = [value for name, value in medians.items() if name != OURS]
    return {
        **{f"{name}, ms": 1e3 * value for name, value in medians.items()},
        **({"best / ours": min(others) / ours} if others else {}),
        "images/s": images / ours,
        "GFLOP": flops / 1e9,
        "of the product's rate": flops / ours / setting.ceiling,
    }


# --- the parts ---


def ceiling(setting: Setting) -> Iterator[Row]:
    yield {"a matrix product, TFLOP/s": setting.ceiling / 1e12, "a copy, GB/s": copy_rate() / 1e9}


def forward(setting: Setting) -> Iterator[Row]:
    for batch in setting.batches:
        call, flops = network_call(setting, batch)
        runs = {OURS: lambda call=call: call().block_until_ready()}
        runs |= setting.theirs.forward(noise(setting.config, batch)) if setting.theirs else {}
        yield {"batch": batch, **compared(setting, runs, f"forward {batch}", batch, flops)}


def ddim(setting: Setting) -> Iterator[Row]:
    for S in setting.steps:
        for batch in setting.batches:
            run, flops = whole_run(setting, batch, S)
            runs = {OURS: lambda run=run: sharding.to_host(run())}
            runs |= setting.theirs.ddim(batch, S) if setting.theirs else {}
            row = compared(setting, runs, f"ddim {batch} {S}", batch, flops)
            yield {"batch": batch, "S": S, **row, "50,000 images, s": 50_000 / row["images/s"]}


def training(setting: Setting) -> Iterator[Row]:
    size = setting.training_batch
    config = dataclasses.replace(
        setting.config, train=dataclasses.replace(setting.config.train, batch_size=size, accumulate=1)
    )
    update_step, state, key, flops = compiled_update(config)
    pixels = np.random.default_rng(0).integers(0, 256, (size, *config_lib.image_shape(config.model)), dtype=np.uint8)
    images, labels, held = sharding.split_batch(sharding.data_mesh(), pixels), labels_of(config, size), [state]

    def run():
        held[0], metrics = update_step(held[0], images, labels, key)
        jax.block_until_ready((held[0], metrics))

    runs = {OURS: run, **(setting.theirs.training(config, pixels) if setting.theirs else {})}
    yield {"batch": size, **compared(setting, runs, "training", size, flops)}


def overhead(setting: Setting) -> Iterator[Row]:
    for S in setting.steps:
        for batch in setting.batches:
            call, _ = network_call(setting, batch)
            run, _ = whole_run(setting, batch, S)

            def calls(call=call, S=S):
                for _ in range(S):
                    said = call()
                    if jax.default_backend() == "cpu":
                        said.block_until_ready()
                said.block_until_ready()

            runs = {"steps": lambda run=run: run().block_until_ready(), "calls": calls}
            times = in_turns(runs, setting.rounds, f"overhead {batch} {S}")
            ratio = statistics.median(a / b for a, b in zip(times["steps"], times["calls"], strict=True))
            medians = {f"S {name}, ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
            yield {"batch": batch, "S": S, **medians, "steps / calls": ratio}


def start(setting: Setting) -> Iterator[Row]:
    """Fresh processes, as a user starts them. The file cache is warm, the cache of programs is what is varied."""
    with tempfile.TemporaryDirectory() as folder:

        def once(number: int, cache: str) -> float:
            env = {**os.environ, "DDIM_JAX_CACHE": f"{folder}/{cache}"}
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
            command = [sys.executable, "-m", "ddim_jax.sample", "--config", str(ROOT / "configs/digits.py")]
            begun = time.perf_counter()
            subprocess.run([*command, f"--out={folder}/{number}"], cwd=ROOT, env=env, check=True, capture_output=True)
            return time.perf_counter() - begun

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
            begun = time.perf_counter()
            compiled = lowered.compile()
            seconds = time.perf_counter() - begun
            yield {"what": f"sampling, S = {S}", "batch": batch, "compile, s": seconds, **megabytes(compiled)}
    size = setting.training_batch
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size, accumulate=1))
    begun = time.perf_counter()
    update_step, *_ = compiled_update(config)
    seconds = time.perf_counter() - begun
    yield {"what": "update, with tracing", "batch": size, "compile, s": seconds, **megabytes(update_step)}
    jax.config.update("jax_enable_compilation_cache", True)


def input_(setting: Setting) -> Iterator[Row]:
    config = setting.config
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "train")
        source = data.in_memory(source) if config.data.in_memory else source
    given = statistics.median(rates(source, 0 if source.instant else loop.READING_THREADS, batches=40))
    row = next(training(setting._replace(theirs=None)))
    yield {"data": config.data.name, "given, images/s": given, "taken, images/s": row["images/s"]}


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
    "what": (",".join(PARTS), "What to measure."),
    "batches": ("1,4,16", "Batch sizes of the network and of sampling."),
    "training_batch": ("16", "Batch size of training."),
    "steps": ("10,50", "Values of S of ddim and overhead."),
    "rounds": ("7", "How often each is timed."),
    "competitors": (True, "Also diffusers."),
    "compiled": (True, "Also torch.compile, which needs a C++ compiler."),
    "out": (None, "The tables are written to this, with .json and .md after it."),
}


# --- what is measured ---


def placed(batch: int) -> tuple[Callable[[Any], Any], Callable[[np.ndarray], jax.Array]]:
    """Where parameters and batches are put: over all devices, where these divide the batch."""
    mesh = sharding.data_mesh()
    if batch % mesh.size:
        return jax.device_put, jnp.asarray
    return partial(sharding.put_replicated, mesh), partial(sharding.split_batch, mesh)


def noise(config: Config, batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, *config_lib.image_shape(config.model))).astype(np.float32)


def labels_of(config: Config, batch: int) -> jax.Array | None:
    labels = sampling.labels_of(config_lib.pipeline(config, None, sharding.data_mesh()), np.arange(batch))
    return None if labels is None else placed(batch)[1](labels)


@jax.jit
def _ask(denoise, x, level):
    return denoise(x, level).eps


def counted(program: Any) -> float:
    """Operations, as for a TPU, whose convolutions are convolutions: a CPU's are made of fewer."""
    return float((program.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops", 0))


def asked(setting: Setting, batch: int) -> tuple[Denoise, jax.Array]:
    """The network and what it is asked about."""
    put, split = placed(batch)
    labels = labels_of(setting.config, batch)
    pipeline = config_lib.pipeline(setting.config, put(setting.params), sharding.data_mesh())
    return sampling.conditioned(pipeline, labels), split(noise(setting.config, batch))


def network_call(setting: Setting, batch: int) -> tuple[Callable[[], jax.Array], float]:
    """One call of the network, and its operations."""
    denoise, x = asked(setting, batch)
    level = jax.tree.map(jnp.asarray, config_lib.noise_schedule(setting.config.schedule).level(500))
    return lambda: _ask(denoise, x, level), counted(_ask.trace(denoise, x, level))


def transitions_of(config: Config, S: int) -> Transitions:
    noise_schedule = config_lib.noise_schedule(config.schedule)
    with error_context("--steps"):
        return trajectory.descend(noise_schedule, trajectory.leading(noise_schedule.num_steps, S))  # as diffusers does


def whole_run(setting: Setting, batch: int, S: int) -> tuple[Callable[[], jax.Array], float]:
    """All steps of DDIM, and their operations."""
    transitions = transitions_of(setting.config, S)
    denoise, x = asked(setting, batch)
    _, flops = network_call(setting, batch)
    return lambda: samplers.integrate(samplers.ddim(), denoise, transitions, x), S * flops


def lowered_run(setting: Setting, batch: int, S: int) -> Any:
    transitions = jax.tree.map(jnp.asarray, transitions_of(setting.config, S))
    run = jax.jit(lambda *args: samplers.integrate(samplers.ddim(), *args))
    denoise, x = asked(setting, batch)
    return run.lower(denoise, transitions, x)


def compiled_update(config: Config) -> tuple[Any, Any, jax.Array, float]:
    recipe, mesh = config_lib.recipe(config), sharding.data_mesh()
    state, key = loop.first_state(recipe, mesh)
    update_step, flops = loop.compiled_update(recipe, mesh, state, key, config_lib.image_shape(config.model))
    return update_step, state, key, flops


# --- the tables ---


def processor() -> str:
    """What the machine calls it, where it says."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def shown(value: Any) -> str:
    """Numbers with as many digits as they have a meaning."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def text(about: dict[str, Any], tables: dict[str, list[Row]]) -> str:
    theirs = f", torch {about['torch']}, diffusers {about['diffusers']}" if "torch" in about else ""
    blocks = [
        f"{about['network']}, {about['dtype']}, {about['devices']} x {about['device']} ({about['machine']}, "
        f"{about['processor']}, {about['cores']} cores), jax {about['jax']}{theirs}; medians of {about['rounds']}, in "
        f"turns"
    ]
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        body = [[shown(row.get(column, "")) for column in columns] for row in rows]
        blocks += [f"### {name}", common.markdown(columns, body)]
    return "\n\n".join(blocks)


if __name__ == "__main__":
    cli.start(main, OPTIONS)
