"""Training checkpoints, by Orbax: saved asynchronously, one folder per step in WORKDIR/checkpoints.

The items of a step are `params`, `ema_params`, `optimizer` (the step, the number of skipped updates and the optimizer's
state), `config` and `record` (JSON). Sampling reads only the items that it needs. The record holds the shapes of the
parameters, the metrics that are not yet logged, and checksums of every array, of the config, and of itself. Reading an
item verifies its checksum: a DamagedError names what has changed on the disk. The record, or fields of it, can be
missing in checkpoints of earlier versions: these are read without that check.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from ddim_jax.checkpoints.shapes import arrays_on_host, check_shapes, checksum, checksums, shapes_of
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import CheckpointError, DamagedError

JSON_FILE = "metadata"  # the file of the items config and record
# The types of the fields of the record.
RECORD = {"checksums": dict, "shapes": dict, "metrics": list} | dict.fromkeys(("config", "data", "digest"), str)


class State(Protocol):
    """A named tuple with these fields; see `training.train_state.TrainState`."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    skipped: Any
    objective: Any


class Checkpoints:
    """The checkpoints of one run. A context manager: its exit waits until all saves are complete."""

    _failed = False  # whether a save has failed

    def __init__(self, workdir: pathlib.Path, keep: int | None = None, keep_every: int = 0):
        """keep: how many of the latest steps are kept; None opens the folder read-only. keep_every: multiples of it are
        always kept (0: none)."""
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._check_regular("*/_CHECKPOINT_METADATA")  # Orbax reads this file of every step
        if keep is None:
            if not self._folder.is_dir():
                raise CheckpointError(f"{workdir} holds no checkpoints: the folder {self._folder} does not exist")
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
        for finish in (self._manager.wait_until_finished, self._manager.close):  # each raises the same error once more
            with contextlib.suppress(Exception):
                finish()
        deadline = time.monotonic() + 10  # threads of a failed save may still be writing, and would fill the disk
        while incomplete := list(self._folder.glob("*.orbax-checkpoint-tmp*")):
            for folder in incomplete:
                shutil.rmtree(folder, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if failure and not exception[0]:  # an exception that is already raised comes first
            raise failure

    def latest(self) -> int | None:
        """The latest complete step, None if there is none."""
        return self._manager.latest_step()

    def require_latest(self) -> int:
        """The latest complete step. CheckpointError if there is none."""
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self._folder} holds no complete checkpoint")
        return step

    def steps(self) -> list[int]:
        """All complete steps, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, config: dict[str, Any], data: str = "", metrics: Sequence[Any] = ()) -> None:
        """Starts an asynchronous save. config: JSON values. data: the fingerprint of the training data. metrics: the
        metrics of the updates that are not yet logged, as JSON values.

        CheckpointError if this save or the previous one fails.
        """
        items = {"params": _item(state.params), "ema_params": _item(state.ema_params), "optimizer": _optimizer(state)}
        record = {
            "checksums": checksums(items),
            "shapes": shapes_of(state.params),
            "config": files.json_digest(config),
            "data": data,
            "metrics": list(metrics),
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
        """Waits until all saves are complete. CheckpointError if one fails."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> CheckpointError:
        """The error of a failed save, with its reason in one line."""
        self._failed = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of the failed save
        # Read from the disk, because Orbax counts the failed save as a step.
        complete = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        text = str(error) or repr(error)
        is_full = "No space left" in text or "RESOURCE_EXHAUSTED" in text
        code = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", text)
        reason = os.strerror(int(code[1] or code[2])) if code else text.splitlines()[0][:300]
        reason = "the disk is full" if is_full else reason
        latest = f"the latest complete one is step {complete[-1]}" if complete else "no complete one exists"
        return CheckpointError(f"{self._folder}: a checkpoint cannot be written: {reason}; {latest}")

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a step to WORKDIR/damaged and returns its new folder."""
        aside = self._folder.parent / "damaged" / str(step)
        if sharding.is_main_process():
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        sharding.barrier(f"aside {step}")
        self._manager.reload()
        return aside

    def data(self, step: int) -> str:
        """The fingerprint of the training data that was saved with the step, "" if none was saved."""
        return self._record(step).get("data", "")

    def metrics(self, step: int) -> list[Any]:
        """The metrics that were not yet logged when the step was saved, [] if none were saved."""
        return self._record(step).get("metrics", [])

    def config(self, step: int) -> dict[str, Any]:
        """The config (JSON values) that was saved with the step."""
        config = self._json(step, "config")
        if _differs(self._record(step), "config", files.json_digest(config)):
            raise self._damaged(step, "its config does not match its checksum")
        return config

    def check_network(self, step: int, params: Any) -> None:
        """CheckpointError, naming the first leaf that differs, if `params` has other names or shapes than the step."""
        saved = self._record(step).get("shapes")
        if saved is None:
            try:
                saved = shapes_of(self._manager.item_metadata(step)["params"].tree)
            except Exception as error:
                raise self._unreadable(step, error) from error
        saved = {name: tuple(shape) if isinstance(shape, (list, tuple)) else shape for name, shape in saved.items()}
        check_shapes(saved, shapes_of(params), str(self._folder / str(step)))

    def _record(self, step: int) -> dict[str, Any]:
        """The record of a step, {} if none was saved. DamagedError if it does not match its checksum, if it belongs to
        another step, or if a file in the step's folder cannot be read.
        """
        folder = self._folder / str(step)
        self._check_regular(f"{step}/**/*")
        if not (folder / "record").exists():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if "record" in files.read_json(folder / "_CHECKPOINT_METADATA")["item_handlers"]:
                    raise self._damaged(step, "its record is missing")
            return {}
        record = self._json(step, "record")
        content = {name: value for name, value in record.items() if name != "digest"}
        has_types = all(isinstance(value, RECORD.get(name, object)) for name, value in record.items())
        if not has_types or _differs(record, "digest", files.json_digest(content)):
            raise self._damaged(step, "its record does not match its checksum")
        if step >= 2**31 or _differs(record.get("checksums", {}), "optimizer/step", checksum(np.int32(step))):
            raise self._damaged(step, "it holds another step: the folder was renamed or copied")
        return record

    def _json(self, step: int, item: str) -> dict[str, Any]:
        try:
            value = files.read_json(self._folder / str(step) / item / JSON_FILE)
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error
        if not isinstance(value, dict):
            raise self._damaged(step, f"its {item} must be a JSON object, got {type(value).__name__}")
        return value

    def _check_regular(self, pattern: str) -> None:
        """DamagedError if a path is neither a regular file nor a folder: reading a pipe may never end."""
        try:
            for path in self._folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # a running training removes old steps
                    files.check_regular(path)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self._folder} cannot be read: {error}") from error

    def restore(self, step: int, like: State) -> State:
        """The training state of a step. like: its shapes, dtypes and shardings (arrays or ShapeDtypeStructs)."""
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
        """The parameters of a step, or (ema) their moving average. like: their shapes, dtypes and shardings."""
        item = "ema_params" if ema else "params"
        return _tree(self._restore_arrays(step, {item: _item(like)})[item], like)

    def _restore_arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The verified items of a step. DamagedError, naming the first array, if one does not match its checksum, or if
        a parameter of the network is not finite.
        """
        expected = self._record(step).get("checksums", {})
        items = {}
        for name, target in targets.items():
            try:
                request = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
                items[name] = self._manager.restore(step, args=request)[name]
            except Exception as error:  # damaged files raise exceptions of many types
                raise self._unreadable(step, error, name) from error
        for name, array in arrays_on_host(items):
            if _differs(expected, name, checksum(array)):
                raise self._damaged(step, f"{name} does not match its checksum")
            if not name.startswith("optimizer/") and not np.isfinite(array).all():
                raise self._damaged(step, f"{name} holds values that are not finite")
        return items

    def _damaged(self, step: int, reason: str) -> DamagedError:
        return DamagedError(f"{self._folder / str(step)} is damaged: {reason}")

    def _unreadable(self, step: int, error: Exception, item: str = "") -> DamagedError:
        reason = (str(error) or repr(error)).splitlines()[0].split(" See full TensorStore details")[0]
        return DamagedError(f"{self._folder / str(step) / item} cannot be read: {reason[:300]}")


def _differs(saved: Mapping[str, Any], name: str, current: str) -> bool:
    """Whether a value was saved under the name, and it differs from the current one."""
    return name in saved and saved[name] != current


def _item(tree: Any) -> Any:
    """A tree as an item of Orbax: a single array becomes a dict with one entry."""
    return {"array": tree} if jax.tree_util.all_leaves([tree]) else tree


def _tree(item: Any, like: Any) -> Any:
    """The inverse of `_item`."""
    return item["array"] if jax.tree_util.all_leaves([like]) else item


def _optimizer(state: State) -> dict[str, Any]:
    objective = {"objective": state.objective} if jax.tree.leaves(state.objective) else {}
    return {"step": state.step, "skipped": state.skipped, "state": state.opt_state, **objective}
