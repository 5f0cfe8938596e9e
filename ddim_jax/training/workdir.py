"""The workdir of a training run: its lock, and the check of the disk space for its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

import jax

from ddim_jax.training.recipe import Recipe
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError


def check_disk(recipe: Recipe, workdir: pathlib.Path, state: TrainState, begin: int, existing: Sequence[int]) -> None:
    """ConfigError if the checkpoints that are still to be written do not fit on the disk.

    state: the state to save. begin: the step that training starts or resumes from. existing: the steps that have a
    checkpoint, ascending.
    """
    count = checkpoints_to_come(recipe, begin, existing)
    needed = count * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if not sharding.broadcast_from_main(needed <= free):
        raise ConfigError(
            f"config.train.keep is {recipe.keep} and keep_every is {recipe.keep_every}: {count} more checkpoints need "
            f"{files.human_size(needed)} on the disk of {workdir}, which has {files.human_size(free)} free"
        )


def checkpoints_to_come(recipe: Recipe, begin: int, existing: Sequence[int]) -> int:
    """The maximum number of additional checkpoints that exist at the same time, including the one that is being
    written, from the step `begin` to the end of training. The maximum is reached when the last checkpoint is written:
    then the latest keep + 1 exist, and of the earlier ones the multiples of keep_every.

    existing: the steps that have a checkpoint, ascending.
    """
    every, window = recipe.checkpoint_every, recipe.keep + 1
    saves = -(-recipe.num_steps // every) - begin // every
    before = existing[: max(0, len(existing) - max(0, window - saves))]
    permanent = 0
    if recipe.keep_every:
        permanent = sum(step % recipe.keep_every == 0 for step in before)
        # The oldest step of the latest keep + 1 checkpoints, if all of them are new.
        oldest = (-(-recipe.num_steps // every) - recipe.keep) * every
        both = math.lcm(every, recipe.keep_every)
        permanent += max(0, (oldest - 1) // both - begin // both)
    return max(1, min(window, len(existing) + saves) + permanent - len(existing))


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the workdir: a second training process on this machine would overwrite the checkpoints of the first.
    ConfigError if it is locked.
    """
    if not sharding.is_main_process():
        yield
        return
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {workdir}") from None
        except OSError as error:  # mounted buckets do not support locks
            print(f"warning: {workdir} cannot be locked: {error.strerror}", file=sys.stderr)
        yield
