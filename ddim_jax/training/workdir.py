"""The folder of a training run: locked while it is trained in, and with room for its checkpoints."""

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
    """ConfigError if the checkpoints to come, beside those of the existing steps, do not fit on the disk."""
    count = checkpoints_to_come(recipe, begin, existing)
    needed = count * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if not sharding.broadcast_from_main(needed <= free):
        raise ConfigError(
            f"config.train.keep is {recipe.keep} and keep_every {recipe.keep_every}: {count} checkpoints more need "
            f"{files.human_size(needed)} on the disk of {workdir}, which has {files.human_size(free)} left"
        )


def checkpoints_to_come(recipe: Recipe, begin: int, existing: Sequence[int]) -> int:
    """How many more checkpoints there are at most at a time, the one being written among them, from the step `begin` to
    the end. existing: the steps that have one, ascending. The most are there when the last one is written: then there
    are the latest keep + 1 and, of those before, the multiples of keep_every.
    """
    every, window = recipe.checkpoint_every, recipe.keep + 1
    saves = -(-recipe.num_steps // every) - begin // every
    before = existing[: max(0, len(existing) - max(0, window - saves))]
    permanent = 0
    if recipe.keep_every:
        permanent = sum(step % recipe.keep_every == 0 for step in before)
        oldest = (-(-recipe.num_steps // every) - recipe.keep) * every  # of the latest keep + 1, if all of them are new
        both = math.lcm(every, recipe.keep_every)
        permanent += max(0, (oldest - 1) // both - begin // both)
    return max(1, min(window, len(existing) + saves) + permanent - len(existing))


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the workdir: a second trainer on this machine would write over the first one's checkpoints."""
    if not sharding.is_main_process():
        yield
        return
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {workdir}") from None
        except OSError as error:  # mounted buckets cannot lock
            print(f"warning: {workdir} cannot be locked: {error.strerror}", file=sys.stderr)
        yield
