"""Checkpoints of training, by Orbax: asynchronous, a folder per step in WORKDIR/checkpoints, the config
beside the arrays.

The items of a step are `params`, `ema_params`, `optimizer` (the step, the updates left out and the optimizer's state),
`config` and `record` (JSON), so that sampling reads the one it needs. The record holds the shapes of the parameters, a
checksum of every array, the config's, and its own. They are compared when an item is read: what changed on the disk is
a DamagedError that names it. A checkpoint that was written before there was a record, or one of these in it, is read
without.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from ddim_jax.checkpoints.shapes import check_shapes, checksum, shapes_of
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import CheckpointError, DamagedError

JSON_FILE = "metadata"  # of the items config and record
RECORD = {"checksums": dict, "shapes": dict, "config": str, "data": str, "digest": str}  # what a record holds


class State(Protocol):
    """A named tuple with these fields; see `training.train_state.TrainState`."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    skipped: Any
    objective: Any


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for saves that are under way."""

    _failed = False  # whether a save did

    def __init__(self, workdir: pathlib.Path, keep: int | None = None, keep_every: int = 0):
        """keep: how many of the latest steps survive, and keep_every: which multiples survive for ever (0: none).
        Without keep the folder is only read."""
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._check_regular("*/_CHECKPOINT_METADATA")  # which Orbax reads of every step
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
        handlers |= {item: ocp.JsonCheckpointHandler(JSON_FILE) for item in ("config", "record")}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        failure = None
        if not self._failed:
            try:
                self._manager.close()
                return
            except Exception as error:
                failure = self._unwritable(error)
        for end in (self._manager.wait_until_finished, self._manager.close):  # each says again what was said
            with contextlib.suppress(Exception):
                end()
        deadline = time.monotonic() + 10  # threads of a save that failed may write on; it would fill the disk
        while halves := list(self._folder.glob("*.orbax-checkpoint-tmp*")):
            for half in halves:
                shutil.rmtree(half, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if failure and not exception[0]:  # the first error counts
            raise failure

    def latest(self) -> int | None:
        """The last complete step, None if there is none."""
        return self._manager.latest_step()

    def require_latest(self) -> int:
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self._folder} holds no complete checkpoint")
        return step

    def steps(self) -> list[int]:
        """All complete steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, config: dict[str, Any], data: str = "") -> None:
        """Writes a step in the background. config: JSON values. data: the fingerprint of what it is trained on.

        CheckpointError if it, or the one before it, cannot be written.
        """
        items = {"params": _item(state.params), "ema_params": _item(state.ema_params), "optimizer": _optimizer(state)}
        record = {
            "checksums": _checksums(items),
            "shapes": shapes_of(state.params),
            "config": files.json_digest(config),
            "data": data,
        }
        record["digest"] = files.json_digest(record)
        try:
            self._manager.check_for_errors()
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    config=ocp.args.JsonSave(config),
                    record=ocp.args.JsonSave(record),
                ),
            )
        except Exception as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Until everything is written; CheckpointError if it cannot be."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> CheckpointError:
        """What is wrong, in one line."""
        self._failed = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # the rest of that save
        # On the disk: Orbax counts the one that failed too.
        whole = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        said = str(error) or repr(error)
        full = "No space left" in said or "RESOURCE_EXHAUSTED" in said
        code = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", said)
        reason = os.strerror(int(code[1] or code[2])) if code else said.splitlines()[0][:300]
        reason = "the disk is full" if full else reason
        last = f"the last complete one is step {whole[-1]}" if whole else "there is none yet"
        return CheckpointError(f"{self._folder}: a checkpoint cannot be written: {reason}; {last}")

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a step out of the way, into WORKDIR/damaged."""
        aside = self._folder.parent / "damaged" / str(step)
        if sharding.is_main_process():
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        sharding.barrier(f"aside {step}")
        self._manager.reload()
        return aside

    def data(self, step: int) -> str:
        """The fingerprint of the data that the step was trained on, "" where none was saved."""
        return self._record(step).get("data", "")

    def config(self, step: int) -> dict[str, Any]:
        """The config (JSON values) that the step was saved with."""
        config = self._json(step, "config")
        if _differs(self._record(step), "config", files.json_digest(config)):
            raise self._damaged(step, "its config is not what was saved")
        return config

    def check_network(self, step: int, params: Any) -> None:
        """CheckpointError, naming the first leaf that differs, if the step's parameters have other names or shapes."""
        saved = self._record(step).get("shapes")
        if saved is None:
            try:
                saved = shapes_of(self._manager.item_metadata(step)["params"].tree)
            except Exception as error:
                raise self._unreadable(step, error) from error
        there = {name: tuple(shape) if isinstance(shape, (list, tuple)) else shape for name, shape in saved.items()}
        check_shapes(there, shapes_of(params), str(self._folder / str(step)))

    def _record(self, step: int) -> dict[str, Any]:
        """The record of a step, {} where none was saved. DamagedError if it is not what was saved, or not this step's,
        or if something in the step's folder cannot be read.
        """
        folder = self._folder / str(step)
        self._check_regular(f"{step}/**/*")
        if not (folder / "record").exists():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if "record" in files.read_json(folder / "_CHECKPOINT_METADATA")["item_handlers"]:
                    raise self._damaged(step, "its record is missing")
            return {}
        record = self._json(step, "record")
        described = {name: value for name, value in record.items() if name != "digest"}
        right = all(isinstance(value, RECORD.get(name, object)) for name, value in record.items())
        if not right or _differs(record, "digest", files.json_digest(described)):
            raise self._damaged(step, "its record is not what was saved")
        if step >= 2**31 or _differs(record.get("checksums", {}), "optimizer/step", checksum(np.int32(step))):
            raise self._damaged(step, "what it holds is another step: the folder was renamed or copied")
        return record

    def _json(self, step: int, item: str) -> dict[str, Any]:
        try:
            value = files.read_json(self._folder / str(step) / item / JSON_FILE)
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error
        if not isinstance(value, dict):
            raise self._damaged(step, f"its {item} is not what was saved")
        return value

    def _check_regular(self, pattern: str) -> None:
        """DamagedError if one of these files is something else, which may never end when it is read."""
        try:
            for path in self._folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # a trainer removes what it does not keep
                    files.check_regular(path)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self._folder} cannot be read: {error}") from error

    def restore(self, step: int, like: State) -> State:
        """The state of a step. like: its shapes, dtypes and shardings (arrays or ShapeDtypeStructs)."""
        targets = {"params": _item(like.params), "ema_params": _item(like.ema_params), "optimizer": _optimizer(like)}
        items = self._restore_arrays(step, targets)
        optimizer = items["optimizer"]
        return like._replace(
            step=optimizer["step"],
            params=_tree(items["params"], like.params),
            ema_params=_tree(items["ema_params"], like.ema_params),
            opt_state=optimizer["state"],
            skipped=optimizer["skipped"],
            objective=optimizer.get("objective", ()),
        )

    def restore_params(self, step: int, like: Any, ema: bool = True) -> Any:
        """The parameters of a step, or their moving average. like: their shapes, dtypes and shardings."""
        item = "ema_params" if ema else "params"
        return _tree(self._restore_arrays(step, {item: _item(like)})[item], like)

    def _restore_arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Items of a step, whole and as they were saved; DamagedError, naming the first array that is not, or that is
        not finite and a network's parameter.
        """
        expected = self._record(step).get("checksums", {})
        wanted = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except Exception as error:  # damage shows as many kinds of exception
            raise self._unreadable(step, error) from error
        items = {name: restored[name] for name in targets}
        for name, array in _on_host(items):
            if _differs(expected, name, checksum(array)):
                raise self._damaged(step, f"{name} is not what was saved")
            if not name.startswith("optimizer/") and not np.isfinite(array).all():
                raise self._damaged(step, f"{name} holds values that are not finite")
        return items

    def _damaged(self, step: int, what: str) -> DamagedError:
        return DamagedError(f"{self._folder / str(step)} is damaged: {what}")

    def _unreadable(self, step: int, error: Exception) -> DamagedError:
        return DamagedError(
            f"{self._folder / str(step)} cannot be read: {(str(error) or repr(error)).splitlines()[0][:300]}"
        )


def _differs(saved: Mapping[str, Any], name: str, found: str) -> bool:
    """Whether something was saved under the name, and it is not what was found."""
    return name in saved and saved[name] != found


def _item(tree: Any) -> Any:
    """A tree as Orbax takes it: an array alone becomes a dict of one."""
    return {"array": tree} if jax.tree_util.all_leaves([tree]) else tree


def _tree(item: Any, like: Any) -> Any:
    """The tree that `_item` made an item of."""
    return item["array"] if jax.tree_util.all_leaves([like]) else item


def _optimizer(state: State) -> dict[str, Any]:
    remembered = {"objective": state.objective} if jax.tree.leaves(state.objective) else {}
    return {"step": state.step, "skipped": state.skipped, "state": state.opt_state, **remembered}


def _checksums(items: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every array, by names "item/module/leaf"."""
    return {name: checksum(array) for name, array in _on_host(items)}


def _on_host(items: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every array with its name "item/module/leaf": all of it, however it is divided over devices."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(items))[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), sharding.to_host(leaf)
