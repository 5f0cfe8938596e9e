"""Exports a sampler with its weights as a StableHLO program, which runs with JAX alone: without this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from ddim_jax import samplers, sampling
from ddim_jax.data.scaling import to_uint8
from ddim_jax.sampling import Pipeline

PLATFORMS = ("cpu", "cuda", "tpu")
CALL = "jax.export.deserialize(bytearray(file)).call"


def sampler(pipeline: Pipeline, platforms: Sequence[str] = PLATFORMS) -> jax_export.Exported:
    """The program (seed, first) -> images first, first + 1, ... of this seed, uint8 (B, H, W, C); both are uint32.
    For a class-conditional network it is (seed, first, labels), with labels int32 (B,).

    The images are those of `sampling.batches` with the same batch size B = pipeline.batch_size. It is fixed, because
    the form of a convolution depends on it.
    """
    count, process = pipeline.batch_size, pipeline.process

    def draw(seed, first, labels=None):
        keys, x = sampling.start(pipeline._replace(seed=seed), first + jnp.arange(count, dtype=np.uint32))
        model = sampling.conditioned(pipeline, labels)
        noise_keys = keys if process.sampler.stochastic else None
        return to_uint8(samplers.integrate(process.sampler, model, process.transitions, x, noise_keys))

    scalar = jax.ShapeDtypeStruct((), np.uint32)
    labels = [jax.ShapeDtypeStruct((count,), np.int32)] if pipeline.num_classes else []
    return jax_export.export(jax.jit(draw), platforms=platforms)(scalar, scalar, *labels)


def serialized(pipeline: Pipeline) -> bytes:
    """The file of the exported sampler. ModuleNotFoundError without the package flatbuffers."""
    return bytes(sampler(pipeline).serialize())


def readme(name: str, file: str, pipeline: Pipeline) -> str:
    """Five lines of Markdown that explain the file."""
    shape = "x".join(map(str, (pipeline.batch_size, *pipeline.shape)))
    labels = ", labels" if pipeline.num_classes else ""
    classes = f"; labels: int32 ({pipeline.batch_size},) in 0..{pipeline.num_classes - 1}" if labels else ""
    steps = len(pipeline.process.transitions.t)
    return "\n".join(
        (
            f"# {name}: a sampler in {steps} steps, for {', '.join(PLATFORMS)}",
            f"`pip install jax flatbuffers` (exported with jax {jax.__version__}), then in Python:",
            f'`import jax, jax.export, numpy as np; file = open("{file}", "rb").read()`',
            f"`images = {CALL}(np.uint32(seed), np.uint32(first){labels})`",
            f"Images first, first + 1, ... of a seed, uint8 {shape}; the batch size is fixed{classes}.",
            "",
        )
    )


def settings(sample: dict[str, Any]) -> dict[str, Any]:
    """config.sample of an exported sampler: `sample`, and for the other fields the defaults of configs/default.py."""
    return {**DEFAULTS, **{name: value for name, value in sample.items() if value is not None}}


DEFAULTS = {
    "sampler": "ddim",
    "eta": 0.0,
    "steps": 50,
    "tau": "uniform",
    "tau_offset": 0,
    "tau_end": 0,
    "fixed_stride": False,
    "num_images": 64,
    "batch_size": 64,
    "seed": 0,
    "clip_x0": False,
    "keep_eps": False,
    "clip_range": 1.0,
    "clip_quantile": 0.0,
    "ema": True,
    "label": -1,
    "guidance": 1.0,
    "refine": 0,
    "options": {},
}
