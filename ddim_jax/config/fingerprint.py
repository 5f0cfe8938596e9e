"""What results depend on: JSON values that an output folder records, and that are compared before anything in it is
used again. Fields that change no image are not in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import gaussian, registry, samplers
from ddim_jax.config.build import image_shape
from ddim_jax.config.compatibility import RENAMED
from ddim_jax.config.schema import NOT_ARCHITECTURE, Config, ModelConfig, ScheduleConfig
from ddim_jax.samplers import Sampler, SamplingProcess
from ddim_jax.trajectory import Transitions
from ddim_jax.utils import files

PROBED_STEPS = 6  # of a process: more than the steps that a multistep method remembers
PROBED_VALUES = 10_000  # of its results
FAR = 1e12  # what is infinite

# Fields of config.sample that images do not depend on, or through tau and the weights alone.
WITHOUT_EFFECT = ("batch_size", "refine", "steps", "tau_offset", "ema")
# Fields that folders of earlier versions do not record: they are recorded where they are set.
ADDED_LATER = ("keep_eps", "fixed_stride", "options")


def of_images(config: Config, process: SamplingProcess) -> dict[str, Any]:
    """All that the images of a config depend on but the parameters of its network."""
    return {
        "sample": sample(config) | {"tau": process.tau.tolist()},
        "schedule": schedule(config.schedule),
        "model": model(config.model),
        "process": of_process(process.sampler, process.transitions, image_shape(config.model)),
    }


def sample(config: Config) -> dict[str, Any]:
    """The fields of config.sample that change its images."""
    fields = dataclasses.asdict(config.sample)
    unused = set(WITHOUT_EFFECT) | {name for name in ADDED_LATER if not fields[name]}
    if not config.sample.clip_x0:
        unused |= {"clip_range", "clip_quantile"}
    if not config.model.num_classes:
        unused |= {"label", "guidance"}
    return {name: value for name, value in fields.items() if name not in unused}


def model(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.model that change the network's output: not what matters in training alone."""
    unused = set(NOT_ARCHITECTURE) - {"dtype"}
    if config.name == "unet":  # folders of earlier versions do not record the only network that there was
        unused |= {"name"}
    recorded = {new: old for old, new in RENAMED.items()}  # as folders of earlier versions have it
    return {recorded.get(name, name): value for name, value in dataclasses.asdict(config).items() if name not in unused}


def schedule(config: ScheduleConfig) -> dict[str, Any]:
    """The name of a schedule, and the fields that its factory takes."""
    taken = registry.accepts(registry.resolve(registry.SCHEDULES, config.name)) | {"name"}
    taken |= {name for name in ("zero_terminal_snr", "options") if getattr(config, name)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name in taken}


def of_process(sampler: Sampler, transitions: Transitions, shape: tuple[int, ...]) -> str:
    """SHA-256 of what a process computes: its coefficients, and x_s of some steps from a fixed x_T with a fixed eps and
    fixed noise, in float64 and rounded to five digits. shape: of one image.

    It knows a sampler by its results, not by its name or its source: an edited one differs, and the same mathematics
    has the same fingerprint on every machine and in every version of JAX.
    """
    total = hashlib.sha256()
    for leaf in transitions:
        total.update(_rounded(leaf, 9))
    try:
        found, digits = _probe(sampler, transitions, shape, True), 5
    except TypeError:  # a sampler that is written for float32 alone
        found, digits = _probe(sampler, transitions, shape, False), 3
    total.update(_rounded(found[:: max(1, found.size // PROBED_VALUES)], digits))
    return total.hexdigest()


def _rounded(values: Any, digits: int) -> bytes:
    values = np.clip(np.nan_to_num(np.asarray(values, np.float64)), -FAR, FAR)
    return (np.round(values, digits) + 0.0).tobytes()  # + 0.0: no -0.0


def _probe(sampler: Sampler, transitions: Transitions, shape: tuple[int, ...], x64: bool) -> np.ndarray:
    """x_s of some steps, the first and the last among them, as (n,)."""
    chosen = np.unique(np.linspace(0, len(transitions.t) - 1, PROBED_STEPS).round().astype(int))
    some = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], transitions)
    waves = np.arange(1.0, 1.0 + np.prod(shape)).reshape(1, *shape) ** 2
    with jax.enable_x64(x64), _on_cpu():
        x, noise = (jnp.asarray(array) for array in (2 * np.sin(waves), np.cos(waves)))
        return np.asarray(_run(sampler, some, x, noise if sampler.stochastic else None)).reshape(-1)


@jax.jit
def _run(sampler, transitions, x, noise):
    denoise = gaussian.from_eps(lambda x, t: 0.9 * x + 0.1 * jnp.sin(3 * x + t / 1000))

    def body(carry, transition):
        x_s, state = sampler.step(*carry, transition, denoise, noise)
        x_s = x_s.astype(x.dtype)
        return (x_s, state), x_s

    return jax.lax.scan(body, (x, sampler.init(x)), samplers.rounded(transitions, x.dtype))[1]


def _on_cpu() -> contextlib.AbstractContextManager:
    """The CPU beside an accelerator, where JAX was not told to leave it out."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def folder_name(config: Config, process: SamplingProcess, step: int | None, made_from: Mapping[str, Any]) -> str:
    """A name for each way to sample: what people look for, and eight digits of all that the images depend on, so that
    two different runs never have the same. step: of the checkpoint.
    """
    fields = config.sample
    takes_eta = "eta" in registry.accepts(registry.resolve(registry.SAMPLERS, fields.sampler))
    tau = fields.tau if fields.tau in registry.NAMED_TAUS or registry.is_code(fields.tau) else "explicit"
    dtype = getattr(config.model, "dtype", "float32")
    parts = [
        fields.sampler,
        f"eta{fields.eta:g}" if takes_eta else "",
        f"{tau}-{len(process.tau) - 1}",
        f"seed{fields.seed}",
        f"n{fields.num_images}",
        f"step{step}" if step is not None else "",
        f"label{fields.label}" if fields.label >= 0 else "",
        f"guidance{fields.guidance:g}" if fields.guidance != 1 else "",
        f"clip{fields.clip_range:g}" if fields.clip_x0 else "",
        f"quantile{fields.clip_quantile:g}" if fields.clip_x0 and fields.clip_quantile else "",
        f"end{fields.tau_end}" if fields.tau_end else "",
        *(f"{name}{value}" for name, value in fields.options.items()),
        "raw" if not fields.ema else "",
        dtype if dtype != "float32" else "",
    ]
    return f"{files.name_from('-'.join(filter(None, parts)))[:90]}-{files.json_digest(made_from)[:8]}"
