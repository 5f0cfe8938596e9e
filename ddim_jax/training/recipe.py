"""All settings of a training run, as one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optax

from ddim_jax.models.network import Network
from ddim_jax.training.objectives import Objective


class Recipe(NamedTuple):
    """The network, the objective, the optimizer, the batches and the checkpoints of a training run."""

    network: Network
    objective: Objective
    optimizer: optax.GradientTransformation
    num_steps: int  # number of updates in total
    batch_size: int  # examples per update, over all devices
    seed: int = 0  # seed of the initial parameters, the data order and the noise
    ema_decay: float | Callable = 0.9999  # a number, or a function of the step
    accumulate: int = 1  # gradient accumulation steps per update
    flip: bool = False  # mirror each image left to right with probability 1/2
    max_skipped: int = 20  # training ends after this number of consecutive skipped updates (loss not finite)
    checkpoint_every: int = 1000  # steps between checkpoints
    keep: int = 3  # number of latest checkpoints that are retained
    keep_every: int = 0  # checkpoints at multiples of this step are retained too; 0: none
    workers: int = 0  # processes that read and decode images
    counted: Objective | None = None  # the objective without rematerialisation, for counting operations; None: same
