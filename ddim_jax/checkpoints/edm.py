"""Checkpoints of EDM (Karras et al. 2022): NVIDIA's `.pkl` files of `EDMPrecond` networks.

Such a file is a pickle of objects. Each object of NVIDIA's classes is a dict: the source code of its class, the name of
the class, and its state, in which are the parameters, the modules and the arguments of the constructor. The usual way
to open it executes this source code. Here nothing is executed: the state is data, and the network is built from the
arguments. The attributes that change numbers are compared with those of the published source code, but the source code
in a file is not looked at: an edited one is not noticed.

Sampling by `heun`, tau "karras" and 18 steps is Algorithm 1 of the paper without noise. The paper starts from
x_sigma = 80 N(0, I). Here x_T = N(0, I), which is larger by the factor 1 / sqrt(1 - alpha_bar_T) = 1 + 8e-5.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddim_jax.checkpoints import edm_fields, edm_tensors, torch_file
from ddim_jax.checkpoints.edm_tensors import CONTAINERS, entries, state_of
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.checkpoints.pickles import Object, Unsupported
from ddim_jax.checkpoints.tensors import read
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

SUFFIX = ".pkl"
LICENSE = "the license of NVIDIA's EDM weights is CC BY-NC-SA 4.0: non-commercial use only"

PRECONDITIONING = "EDMPrecond"
VERSION = 6  # of the persistence of objects

# The noise levels of the paper. sigma is 80 at t = T and 0.002 at t = 1, between which tau "karras" is spaced.
SIGMA_MIN, SIGMA_MAX, NUM_STEPS = 0.002, 80.0, 1000
LOG_SNR_MIN = -2 * math.log(SIGMA_MAX)
LOG_SNR_MAX = (-2 * math.log(SIGMA_MIN) - LOG_SNR_MIN / NUM_STEPS) / (1 - 1 / NUM_STEPS)
SCHEDULE = {
    "name": "log_snr",
    "num_steps": NUM_STEPS,
    "log_snr_max": LOG_SNR_MAX,
    "log_snr_min": LOG_SNR_MIN,
    "beta_start": 1e-4,  # without effect
    "beta_end": 0.02,
    "betas": (),
}
SAMPLE = {"tau": "karras", "tau_offset": 0, "tau_end": 0, "clip_x0": False, "clip_range": 1.0, "clip_quantile": 0.0}


def open_file(path: pathlib.Path) -> CheckpointInfo:
    """Reads the description of a `.pkl` file. CheckpointError if it is not one of EDM, or is not supported."""
    content = torch_file.load_pickle(path, CALLS)
    if not isinstance(content, Mapping) or "ema" not in content:
        raise CheckpointError(f"{path}: expected a dict with the network 'ema', as EDM writes it")
    outer = state_of(content["ema"], f"{path}: ema")
    if content["ema"].kind != PRECONDITIONING:
        raise CheckpointError(
            f"{path}: ema is of the class {files.shown(content['ema'].kind)}; supported: {PRECONDITIONING}"
        )
    network = entries(outer, "_modules", f"{path}: ema").get("model")
    inner = state_of(network, f"{path}: ema.model")
    if network.kind not in edm_fields.NETWORKS:
        raise CheckpointError(
            f"{path}: ema.model is of the class {files.shown(network.kind)}; supported: "
            f"{', '.join(edm_fields.NETWORKS)}"
        )
    defaults, to_fields = edm_fields.NETWORKS[network.kind]
    if inner.get("_init_args"):
        raise CheckpointError(f"{path}: ema.model was built with arguments without names, which are not supported")
    args = edm_fields.arguments(inner.get("_init_kwargs"), defaults, f"{path}: ema.model")
    _check_preconditioning(outer, args, f"{path}: ema")
    model = to_fields(args, f"{path}: ema.model")
    found = edm_tensors.tensors_of(path, network, args)

    def read_params(like: Any, ema: bool) -> Any:
        no_raw_parameters(str(path), ema)
        return read(found._replace(layout=edm_tensors.layout_of(model)), like, "the arguments of its network")

    return CheckpointInfo(
        str(path),
        read_params,
        name=files.name_from(path.stem),
        model=model,
        schedule=SCHEDULE,
        sample=SAMPLE,
        note=LICENSE,
    )


def _check_preconditioning(state: Mapping[str, Any], args: Mapping[str, Any], where: str) -> None:
    """CheckpointError for another preconditioning than that of the prediction "edm" at the levels of SCHEDULE."""
    expected = {
        "sigma_data": lambda value: value == 0.5,
        "sigma_min": lambda value: 0 <= value <= SIGMA_MIN,
        "sigma_max": lambda value: value >= SIGMA_MAX,
        "img_resolution": lambda value: value == args["img_resolution"],
        "img_channels": lambda value: value == args["in_channels"],
        "label_dim": lambda value: value == args["label_dim"],
    }
    for name, holds in expected.items():
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise CheckpointError(f"{where}.{name}: the value {files.shown(value)} is not supported")


# --- objects ---


def _persistent(meta: Any) -> Object:
    """An object of one of NVIDIA's classes. Its source code, meta["module_src"], is dropped."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object names no class")
    if meta.get("version") != VERSION:
        raise Unsupported(f"a persistent object has the version {files.shown(meta.get('version'))}, not {VERSION}")
    return Object(meta["class_name"], meta.get("state"))


def _object(kind: str) -> Callable[..., Object]:
    def create() -> Object:
        return Object(kind)

    return create


NUMBERS = {"f2": "<f2", "f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8", "b1": "?"}


def _dtype(name: Any, *_) -> Object:
    if name not in NUMBERS:
        raise Unsupported(f"it holds the NumPy dtype {files.shown(name)}")
    return Object(NUMBERS[name])  # its state, which is the byte order, must be little-endian


def _scalar(dtype: Any, content: Any) -> Any:
    """A NumPy number as a plain one."""
    if not isinstance(dtype, Object) or not isinstance(content, bytes):
        raise ValueError("a NumPy number has no dtype")
    if not isinstance(dtype.state, tuple) or len(dtype.state) < 2 or dtype.state[1] not in ("<", "|"):
        raise Unsupported("it holds a NumPy number that is not little-endian")
    if np.dtype(dtype.kind).itemsize != len(content):
        raise ValueError("a NumPy number has another size than its dtype")
    return np.frombuffer(content, dtype.kind)[0].item()


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": dict,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    **{f"torch.nn.modules.container.{name}": _object(name) for name in CONTAINERS},
}
