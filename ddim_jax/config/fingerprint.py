"""Fingerprints: JSON values that describe everything that results depend on. An output folder records them, and they
are compared before a result in the folder is reused. Fields that do not change the images are not part of them.
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

PROBED_STEPS = 6  # steps of a process that are computed: more than the history of any multistep method
PROBED_VALUES = 10_000  # values of their results that are hashed
FAR = 1e12  # larger values, also infinity, are clipped to it

# Fields of config.sample that do not change the images, or only through tau and the weights.
WITHOUT_EFFECT = ("batch_size", "refine", "steps", "tau_offset", "ema")
# Fields that earlier versions do not record: they are recorded only if they differ from their default.
ADDED_LATER = ("keep_eps", "fixed_stride", "options")
MODEL_FIELDS_ADDED_LATER = {  # the same for config.model -> their defaults
    "num_heads": 0,
    "scale_shift": False,
    "resample": "conv",
    "time_channels": 0,
    "time_scale": 1.0,
    "learn_sigma": False,
    "attention_resolutions_down": (),
    "attention_resolutions_up": (),
    "middle_groups": 0,
}


def of_images(config: Config, process: SamplingProcess) -> dict[str, Any]:
    """Everything that the images of a config depend on, except the parameters of the network."""
    return {
        "sample": sample(config) | {"tau": process.tau.tolist()},
        "schedule": schedule(config.schedule),
        "model": model(config.model),
        "process": of_process(process.sampler, process.transitions, image_shape(config.model)),
    }


def sample(config: Config) -> dict[str, Any]:
    """The fields of config.sample that change the images, and their values."""
    fields = dataclasses.asdict(config.sample)
    unused = set(WITHOUT_EFFECT) | {name for name in ADDED_LATER if not fields[name]}
    if not config.sample.clip_x0:
        unused |= {"clip_range", "clip_quantile"}
    if not config.model.num_classes:
        unused |= {"label", "guidance"}
    return {name: value for name, value in fields.items() if name not in unused}


def model(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.model that change the network's output in sampling, and their values."""
    unused = set(NOT_ARCHITECTURE) - {"dtype"}
    if config.name == "unet":  # not recorded by earlier versions, which had no other network
        unused |= {"name"}
    fields = dataclasses.asdict(config)
    if config.name == "unet":
        unused |= {name for name, default in MODEL_FIELDS_ADDED_LATER.items() if fields[name] == default}
    recorded = {new: old for old, new in RENAMED.items()}  # the names that earlier versions record
    return {recorded.get(name, name): value for name, value in fields.items() if name not in unused}


def schedule(config: ScheduleConfig) -> dict[str, Any]:
    """The name of a schedule, the fields that are parameters of its factory, and their values."""
    taken = registry.accepts(registry.resolve(registry.SCHEDULES, config.name)) | {"name"}
    taken |= {name for name in ("zero_terminal_snr", "options") if getattr(config, name)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name in taken}


def of_process(sampler: Sampler, transitions: Transitions, shape: tuple[int, ...]) -> str:
    """SHA-256 of what a process computes: the coefficients of its transitions, and x_s of some steps for a fixed x_T, a
    fixed eps_fn and fixed noise, in float64 and rounded to five digits. shape: of one image.

    It identifies a sampler by its results, not by its name or its source code. An edited sampler therefore has another
    fingerprint, and equal mathematics has the same fingerprint on every machine and in every version of JAX.
    """
    digest = hashlib.sha256()
    for leaf in transitions:
        digest.update(_rounded(leaf, 9))
    try:
        x_s, digits = _probe(sampler, transitions, shape, True), 5
    except TypeError:  # the sampler supports only float32
        x_s, digits = _probe(sampler, transitions, shape, False), 3
    digest.update(_rounded(x_s[:: max(1, x_s.size // PROBED_VALUES)], digits))
    return digest.hexdigest()


def _rounded(values: Any, digits: int) -> bytes:
    values = np.clip(np.nan_to_num(np.asarray(values, np.float64)), -FAR, FAR)
    return (np.round(values, digits) + 0.0).tobytes()  # + 0.0 turns -0.0 into 0.0


def _probe(sampler: Sampler, transitions: Transitions, shape: tuple[int, ...], x64: bool) -> np.ndarray:
    """x_s of PROBED_STEPS steps, including the first and the last one, as (n,)."""
    indices = np.unique(np.linspace(0, len(transitions.t) - 1, PROBED_STEPS).round().astype(int))
    subset = jax.tree.map(lambda leaf: np.asarray(leaf)[indices], transitions)
    waves = np.arange(1.0, 1.0 + np.prod(shape)).reshape(1, *shape) ** 2
    with jax.enable_x64(x64), _on_cpu():
        x, noise = (jnp.asarray(array) for array in (2 * np.sin(waves), np.cos(waves)))
        return np.asarray(_run(sampler, subset, x, noise if sampler.stochastic else None)).reshape(-1)


@jax.jit
def _run(sampler, transitions, x, noise):
    denoise = gaussian.from_eps(lambda x, t: 0.9 * x + 0.1 * jnp.sin(3 * x + t / 1000))

    def body(carry, transition):
        x_s, state = sampler.step(*carry, transition, denoise, noise)
        x_s = x_s.astype(x.dtype)
        return (x_s, state), x_s

    return jax.lax.scan(body, (x, sampler.init(x)), samplers.rounded(transitions, x.dtype))[1]


def _on_cpu() -> contextlib.AbstractContextManager:
    """A context that computes on the CPU. It has no effect if the CPU backend of JAX is disabled."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def folder_name(config: Config, process: SamplingProcess, step: int | None, made_from: Mapping[str, Any]) -> str:
    """The name of an output folder: the main settings, and eight hex digits of the digest of `made_from`, so that
    different settings have different names.

    step: of the checkpoint, None without one. made_from: everything that the images depend on.
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
