"""What is trained, how, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optax

from ddim_jax.models.network import Network
from ddim_jax.training.objectives import Objective


class Recipe(NamedTuple):
    """What is trained, on which batches, and for how long."""

    network: Network
    objective: Objective
    optimizer: optax.GradientTransformation
    num_steps: int  # updates in all
    batch_size: int  # examples of one update, on all devices together
    seed: int = 0  # of the parameters, the order of the data and all noise
    ema_decay: float | Callable = 0.9999  # a number, or a function of the step
    accumulate: int = 1  # into how many parts a batch is divided, one after the other
    flip: bool = False  # whether half of the images are mirrored
    max_skipped: int = 20  # updates in a row that may be left out as not finite
    checkpoint_every: int = 1000
    keep: int = 3  # the latest checkpoints
    keep_every: int = 0  # and those of the multiples of this step; 0: none
    workers: int = 0  # processes that read data
    counted: Objective | None = None  # the same objective without rematerialisation, whose operations are counted
