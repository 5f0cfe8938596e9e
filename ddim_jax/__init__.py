"""Denoising Diffusion Implicit Models (Song, Meng, Ermon 2020) in JAX: pure functions from the noise schedule to FID.

    import ddim_jax as dj

    network = dj.load("digits")
    x_0 = dj.sampling.sample(network.denoiser, network.schedule, network.shape, 16, steps=20)

Each module is imported at its first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_MODULES = (
    "discrete",
    "evaluation",
    "gaussian",
    "guidance",
    "inference_process",
    "inversion",
    "latent",
    "losses",
    "models",
    "multistep",
    "ode",
    "oracle",
    "parallel",
    "registry",
    "samplers",
    "sampling",
    "schedule",
    "training",
    "trajectory",
)
_NAMES = {  # name -> the module that defines it
    "load": "config.weights",
    "Denoiser": "models.denoiser",
    "Network": "models.network",
    "Prediction": "gaussian",
    "from_eps": "gaussian",
    "clip_x0": "gaussian",
    "integrate": "samplers",
    "invert": "samplers",
    "ddim": "samplers",
    "ddpm": "samplers",
    "ddpm_hat": "samplers",
    "ddpm_learned": "samplers",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("ddim-jax")
    if name in _MODULES:
        return importlib.import_module(f"ddim_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"ddim_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'ddim_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
