"""Where the parameters to sample come from: a run's checkpoint, or the file that ships with the package."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ddim_jax import config as config_lib
from ddim_jax import pretrained, sharding, train_state
from ddim_jax.checkpoint import Checkpoints, check_same_shapes
from ddim_jax.config import Config, ConfigError


class Weights(NamedTuple):
    params: Any  # replicated over the mesh
    source: str  # for people: where they came from
    digest: str  # SHA-256 of all leaves


def find(config: Config, workdir: str | None, mesh: Mesh) -> Weights:
    """The latest checkpoint of workdir, or the shipped weights of config.name where workdir is None.

    Raises CheckpointError or ConfigError where there are none, where they are of another network, or where the
    network was trained with another schedule or prediction than the config says.
    """
    model = config_lib.network(config.model)
    like = jax.eval_shape(lambda key: train_state.init_params(model, key), jax.random.key(0))
    if workdir is not None:
        with Checkpoints(pathlib.Path(workdir)) as checkpoints:
            step = checkpoints.require_latest()
            source = f"{workdir}, step {step}"
            placed = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)), like
            )
            checkpoints.check_network(step, like)
            params = checkpoints.restore_params(step, placed, config.sample.ema)
            saved = checkpoints.config(step)
    else:
        path = pretrained.shipped(config.name)
        if path is None:
            raise ConfigError(
                f"no weights for config.name {config.name!r} ship with ddim_jax (those that do: "
                f"{', '.join(pretrained.shipped_names())}); give --workdir of a trained run"
            )
        params, saved = pretrained.load(path)
        if not config.sample.ema:
            raise ConfigError("config.sample.ema: the weights that ship are the moving average; False needs --workdir")
        source = f"weights shipped with ddim_jax ({path.name})"
        check_same_shapes(params, like, source)
        params = sharding.put_replicated(mesh, params)
    config_lib.check_same(config, config_lib.parse(saved), config_lib.SAMPLED_WITH, source)
    return Weights(params, source, digest(params))


def digest(params: Any) -> str:
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()
