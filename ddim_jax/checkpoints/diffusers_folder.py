"""Checkpoints of Hugging Face diffusers: unconditional and class-conditional pipelines of a `UNet2DModel`. The package
diffusers is not needed.

`diffusers_network` reads the config of the network, `diffusers_scheduler` that of the scheduler, `diffusers_weights`
the tensors.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from ddim_jax.checkpoints import tensors
from ddim_jax.checkpoints.diffusers_network import network_fields
from ddim_jax.checkpoints.diffusers_scheduler import learns_variance, noise_fields, update_step
from ddim_jax.checkpoints.diffusers_settings import unsupported
from ddim_jax.checkpoints.diffusers_weights import open_weights
from ddim_jax.checkpoints.hub import Folder, Repository, load_json
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.utils.errors import CheckpointError

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")


def is_pipeline(files: Folder | Repository) -> bool:
    """Whether the files are those of a pipeline."""
    return files.find("model_index.json") is not None


def open_folder(files: Folder | Repository) -> CheckpointInfo:
    """Reads the description of a pipeline from its folder or its hub repository, without the tensors. CheckpointError
    if the pipeline is not supported.
    """
    index = load_json(_required(files, "model_index.json"))
    _check_pipeline(index, files.source)
    unet = load_json(_required(files, "unet/config.json", "config.json"))
    noise = _required(files, "scheduler/scheduler_config.json", "scheduler_config.json")
    # The tensors are in the folder of their config.json: unet/, or the root in the oldest repositories.
    folder = "unet/" if files.find("unet/config.json") else ""

    def read(like: Any, ema: bool) -> Any:
        no_raw_parameters(files.source, ema)
        return tensors.read(open_weights(files, folder), like, "its unet/config.json")

    values, where = load_json(noise), f"{files.source}: scheduler_config.json"
    if "_class_name" not in values and _class_in(index, "scheduler"):
        values["_class_name"] = _class_in(index, "scheduler")
    schedule_fields, prediction, sample = noise_fields(values, where)

    def model(image_size: int | None) -> dict[str, Any]:
        fields = network_fields(unet, f"{files.source}: {folder or 'unet/'}config.json", image_size)
        if learns_variance(values) and not fields["learn_sigma"]:
            fixed = "a fixed variance: out_channels of the network is not 2 in_channels"
            unsupported(where, "variance_type", values["variance_type"], fixed)
        return fields | {"prediction": prediction}

    unsized = unet.get("sample_size") is None
    return CheckpointInfo(
        files.source,
        read,
        name=files.name,
        model={} if unsized else model(None),
        sized=model if unsized else None,
        schedule=schedule_fields,
        sample=sample,
        note=update_step(values, where),
    )


def _required(files: Folder | Repository, *candidates: str) -> pathlib.Path:
    path = files.find(*candidates)
    if path is None:
        raise CheckpointError(f"{files.source} has no {' or '.join(candidates)}{files.why_missing()}")
    return path


def _class_in(index: Mapping[str, Any], name: str) -> Any:
    """The class of a component of a pipeline, None if the pipeline has no such component."""
    value = index.get(name)
    return value[-1] if isinstance(value, list) and value else None


def _check_pipeline(index: Mapping[str, Any], source: str) -> None:
    supported = f"supported: {', '.join(PIPELINES)} of a UNet2DModel and a scheduler"
    class_of = partial(_class_in, index)
    components = [name for name in index if not name.startswith("_") and class_of(name)]
    other = [name for name in components if name not in ("unet", "scheduler")]
    pipeline = f"{source} is a {index.get('_class_name')}"
    if class_of("unet") != "UNet2DModel":
        raise CheckpointError(f"{pipeline} whose unet is {class_of('unet') or 'missing'}; {supported}")
    if other:
        raise CheckpointError(f"{pipeline} with the further components {', '.join(other)}; {supported}")
    if str(index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{pipeline}; {supported}")
