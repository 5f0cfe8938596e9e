"""Tables of optimizers, learning-rate schedules and EMA schedules by name."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from ddim_jax import checks
from ddim_jax.schedule import Array

Rate = Callable[[Array], Array]  # (number of updates so far) -> learning rate

OPTIMIZERS = {  # (learning_rate, **fields of config.train.optimizer) -> optax.GradientTransformation
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "sgd": optax.sgd,
}


def constant(learning_rate: float, warmup: int, num_steps: int) -> Rate | float:
    """Linear warmup, with the rate `learning_rate * k / warmup` at update k <= warmup; then constant."""
    linear = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup - 1)
    return linear if warmup else learning_rate


def cosine(learning_rate: float, warmup: int, num_steps: int, end: float = 0.0) -> Rate:
    """The warmup of `constant`, then a cosine decay to `end * learning_rate` at the last update. end: in [0, 1]."""
    checks.real("end", end, 0, 1)
    decay = optax.cosine_decay_schedule(learning_rate, max(num_steps - warmup, 1), end)
    return _after_warmup(learning_rate, warmup, decay)


def inverse_sqrt(learning_rate: float, warmup: int, num_steps: int) -> Rate:
    """The warmup of `constant`, then `learning_rate * sqrt(w / k)` at update k, where w = max(warmup, 1)."""
    origin = max(warmup, 1)
    return _after_warmup(learning_rate, warmup, lambda count: learning_rate * jnp.sqrt(origin / (count + origin)))


def _after_warmup(learning_rate, warmup, decay):
    return optax.join_schedules([constant(learning_rate, warmup, 0), decay], [warmup]) if warmup else decay


RATES = {  # (learning_rate, warmup, num_steps, **schedule_options) -> Rate
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def adam(learning_rate: float, warmup: int, clip_norm: float) -> optax.GradientTransformation:
    """The optimizer of the paper's networks: Adam with the learning rate `constant`, and clipping to a global norm."""
    return clipped(optax.adam(constant(learning_rate, warmup, 0)), clip_norm)


def clipped(optimizer: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """The optimizer, preceded by gradient clipping to a global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def ema_constant(decay: float) -> Callable[[Array], Array]:
    """The same EMA decay at every update."""
    return lambda step: decay


def ema_warmup(decay: float) -> Callable[[Array], Array]:
    """The EMA decay `min(decay, (1 + k) / (10 + k))` at update k: the initial parameters lose their weight sooner."""
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


EMAS = {"constant": ema_constant, "warmup": ema_warmup}  # (decay) -> (step from 0 -> decay)
