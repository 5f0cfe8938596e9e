"""Checkpoints of training, by Orbax: asynchronous, a folder per step in WORKDIR/checkpoints, the config
beside the arrays.

The items of a step are `params`, `ema_params`, `optimizer` (the step and the optimizer's state) and `config`
(JSON), so that sampling reads the one it needs.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from ddim_jax.train_state import TrainState


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one line."""


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for saves that are under way."""

    def __init__(self, workdir: pathlib.Path, keep: int | None = None, keep_every: int = 0):
        """keep: how many of the latest steps survive, and keep_every: which multiples survive for ever (0: none).
        Without keep the folder is only read."""
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        if keep is None:
            if not self._folder.is_dir():
                raise CheckpointError(f"{workdir} holds no checkpoints: no folder {self._folder}")
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            policies = [LatestN(keep)] + ([EveryNSteps(keep_every)] if keep_every else [])
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
            )
        handlers = {item: ocp.StandardCheckpointHandler() for item in ("params", "ema_params", "optimizer")}
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers | {"config": ocp.JsonCheckpointHandler()}
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The last complete step, None if there is none."""
        return self._manager.latest_step()

    def require_latest(self) -> int:
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self._folder} holds no complete checkpoint")
        return step

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Writes a step in the background. config: JSON values."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema_params=ocp.args.StandardSave(state.ema_params),
                optimizer=ocp.args.StandardSave(_optimizer(state)),
                config=ocp.args.JsonSave(config),
            ),
        )

    def config(self, step: int) -> dict[str, Any]:
        return self._restore(step, config=ocp.args.JsonRestore())["config"]

    def check_network(self, step: int, params: Any) -> None:
        """CheckpointError, naming the first leaf that differs, if the step's parameters have other names or shapes."""
        try:
            saved = self._manager.item_metadata(step)["params"].tree
        except Exception as error:
            raise self._unreadable(step, error) from error
        check_same_shapes(saved, params, str(self._folder / str(step)))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step. like: its shapes, dtypes and shardings (arrays or ShapeDtypeStructs)."""
        targets = {"params": like.params, "ema_params": like.ema_params, "optimizer": _optimizer(like)}
        items = self._restore(step, **{name: ocp.args.StandardRestore(target) for name, target in targets.items()})
        return TrainState(items["optimizer"]["step"], items["params"], items["ema_params"], items["optimizer"]["state"])

    def restore_params(self, step: int, like: Any, ema: bool = True) -> Any:
        """The parameters of a step, or their moving average. like: their shapes, dtypes and shardings."""
        item = "ema_params" if ema else "params"
        return self._restore(step, **{item: ocp.args.StandardRestore(like)})[item]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damage shows as many kinds of exception
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._folder / str(step)} cannot be read: {(str(error) or repr(error)).splitlines()[0][:300]}"
        )


def check_same_shapes(saved: Any, expected: Any, where: str) -> None:
    """CheckpointError, naming the first leaf that differs, unless the two trees have the same leaves of the same
    shapes.
    """
    there, here = _shapes(saved), _shapes(expected)
    for name in here:
        if name not in there:
            raise CheckpointError(
                f"{where} is of another network: it has no {name}, which config.model expects with shape {here[name]}"
            )
        if there[name] != here[name]:
            raise CheckpointError(
                f"{where} is of another network: {name} has shape {there[name]}, config.model expects {here[name]}"
            )
    for name in there:
        if name not in here:
            raise CheckpointError(
                f"{where} is of another network: it has {name} with shape {there[name]}, which config.model does not"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _optimizer(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "state": state.opt_state}
