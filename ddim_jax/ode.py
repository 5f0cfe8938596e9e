"""DDIM as a numerical method, section 4.3, and the likelihood that its ODE gives.

With `x_bar = x / sqrt(ab)` and `sigma_bar = sqrt((1 - ab) / ab)`, Eq. (14) is
`d x_bar = eps(x_bar / sqrt(sigma_bar^2 + 1)) d sigma_bar`. DDIM is Euler on it with steps in sigma_bar. The probability
flow of Song et al. (2021) is the same ODE with steps in t, Eq. (15): equal to it as they become small, far from it at
few.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static

from ddim_jax import checks, samplers
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Denoise, Model
from ddim_jax.multistep import advanced, sigma_bars
from ddim_jax.schedule import Array, Level, Schedule
from ddim_jax.trajectory import Transitions, check_signal


class SigmaEuler(NamedTuple):
    """Eq. (13): `x_bar_s = x_bar_t + (sigma_bar_s - sigma_bar_t) eps`. DDIM, in other words."""

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        check_signal(transitions, "the ODE")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        return advanced(x_t, transition, (end - begin) * denoise(x_t, transition.level_t).eps), state


class FlowEuler(NamedTuple):
    """Eq. (15): `x_bar_s = x_bar_t + (sigma_bar_s^2 - sigma_bar_t^2) / (2 sigma_bar_t) eps`, from t above 0."""

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        if not checks.traced(transitions.t) and (np.asarray(transitions.t) == 0).any():
            raise ValueError("transitions must begin above 0: Eq. (15) has no step from level 0")
        check_signal(transitions, "Eq. (15)")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        return advanced(
            x_t, transition, (end**2 - begin**2) / (2 * begin) * denoise(x_t, transition.level_t).eps
        ), state


def log_likelihood(
    model: Model, noise_schedule: Schedule, tau: np.ndarray, x_0: Array, key: Array | None = None
) -> Array:
    """`log p(x_0)` in nats, (B,), of what the ODE makes of N(0, I), by the instantaneous change of variables:

    `log p(x_0) = log N(x_T; 0, I) + d/2 log ab_T + int tr(d eps / d x_bar) d sigma_bar`, along the ODE upwards, by the
    trapezoidal rule over tau: exact as tau becomes fine. Divided by `d log 2` these are bits per dimension.

    key: none for the exact trace, which takes d derivatives a step; with one key, or (B,) keys, Hutchinson's estimate,
    `v^T J v` with v ~ N(0, I), drawn anew in each step. x_0: (B, ...).
    """
    transitions, x_0 = tau_lib.ascend(noise_schedule, tau), checks.batch("x_0", x_0)
    x_T, grown = samplers.run(_Likelihood(exact=key is None), model, transitions, x_0, key)
    density = -(x_T**2) / 2 - np.log(2 * np.pi) / 2 + np.log(transitions.alpha_bar_s[-1]) / 2
    return jnp.sum(density.reshape(len(x_T), -1), axis=1) + grown


@register_static
@dataclasses.dataclass(frozen=True)
class _Likelihood:
    """Heun's steps upwards; the state is the integral of the trace so far, (B,)."""

    exact: bool

    @property
    def stochastic(self) -> bool:
        return not self.exact

    def check(self, transitions: Transitions) -> None:
        check_signal(transitions, "the ODE")

    def init(self, x: Array) -> Array:
        return jnp.zeros(x.shape[0], x.dtype)

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        eps, trace = _with_trace(denoise, x_t, transition.level_t, noise)
        ahead = advanced(x_t, transition, (end - begin) * eps)
        eps_ahead, trace_ahead = _with_trace(denoise, ahead, transition.level_s, noise)
        x_s = advanced(x_t, transition, (end - begin) * (eps + eps_ahead) / 2)
        traces = jnp.sqrt(transition.alpha_bar_t) * trace + jnp.sqrt(transition.alpha_bar_s) * trace_ahead
        return x_s, state + (end - begin) * traces / 2


def _with_trace(denoise: Denoise, x: Array, level: Level, noise: Array | None) -> tuple[Array, Array]:
    """eps (B, ...) and the trace of d eps / d x, (B,): exact, or by noise. Backwards: that is what networks can do."""
    eps, pull = jax.vjp(lambda x: denoise(x, level).eps, x)
    along = lambda direction: jnp.sum((direction * pull(direction)[0]).reshape(len(x), -1), axis=1)
    if noise is not None:
        return eps, along(noise)
    basis = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    return eps, jax.vmap(lambda direction: along(jnp.broadcast_to(direction, x.shape)))(basis).sum(0)
