"""Optimizers, learning-rate schedules and moving averages by name: any of optax, or the user's own."""

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
    """Rises linearly, update k <= warmup using `k / warmup` of it, and stays."""
    rising = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup - 1)
    return rising if warmup else learning_rate


def cosine(learning_rate: float, warmup: int, num_steps: int, end: float = 0.0) -> Rate:
    """Rises as `constant`, then falls as a half cosine to `end` of it at the last update."""
    checks.real("end", end, 0, 1)
    falling = optax.cosine_decay_schedule(learning_rate, max(num_steps - warmup, 1), end)
    return _after_warmup(learning_rate, warmup, falling)


def inverse_sqrt(learning_rate: float, warmup: int, num_steps: int) -> Rate:
    """Rises as `constant`, then falls as `sqrt(w / k)` of it at update k, w being warmup, at least 1."""
    origin = max(warmup, 1)
    return _after_warmup(learning_rate, warmup, lambda done: learning_rate * jnp.sqrt(origin / (done + origin)))


def _after_warmup(learning_rate, warmup, later):
    return optax.join_schedules([constant(learning_rate, warmup, 0), later], [warmup]) if warmup else later


RATES = {  # (learning_rate, warmup, num_steps, **schedule_options) -> Rate
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def adam(learning_rate: float, warmup: int, clip_norm: float) -> optax.GradientTransformation:
    """Adam with the learning rate `constant`, on gradients clipped to a global norm: that of the paper's networks."""
    return clipped(optax.adam(constant(learning_rate, warmup, 0)), clip_norm)


def clipped(optimizer: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """The optimizer on gradients clipped to a global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def ema_constant(decay: float) -> Callable[[Array], Array]:
    """The same decay at every update."""
    return lambda step: decay


def ema_warmup(decay: float) -> Callable[[Array], Array]:
    """`min(decay, (1 + k) / (10 + k))` at update k: the first parameters are forgotten sooner."""
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


EMAS = {"constant": ema_constant, "warmup": ema_warmup}  # (decay) -> (step, from 0) -> decay
