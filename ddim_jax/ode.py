"""DDIM as a numerical method for an ODE (section 4.3), and the log-likelihood by this ODE.

With `x_bar = x / sqrt(ab)` and `sigma_bar = sqrt((1 - ab) / ab)`, Eq. (14) is
`d x_bar = eps(x_bar / sqrt(sigma_bar^2 + 1)) d sigma_bar`. DDIM is Euler's method on it with steps in sigma_bar. The
probability-flow ODE of Song et al. (2021) is the same ODE with steps in t, Eq. (15). The two methods agree for small
steps and differ much for few steps.
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
    """Eq. (13): `x_bar_s = x_bar_t + (sigma_bar_s - sigma_bar_t) eps`. It is the same as DDIM."""

    stochastic = False
    order = 1
    calls_per_step = 1
    min_steps = 1

    def check(self, transitions: Transitions) -> None:
        check_signal(transitions, "the ODE")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        return advanced(x_t, transition, (end - begin) * denoise(x_t, transition.level_t).eps), state


class FlowEuler(NamedTuple):
    """Eq. (15): `x_bar_s = x_bar_t + (sigma_bar_s^2 - sigma_bar_t^2) / (2 sigma_bar_t) eps`, for t > 0."""

    stochastic = False
    order = 1
    calls_per_step = 1
    min_steps = 1

    def check(self, transitions: Transitions) -> None:
        if not checks.traced(transitions.t) and (np.asarray(transitions.t) == 0).any():
            raise ValueError(
                "transitions must begin at t > 0, because Eq. (15) divides by sigma_bar_t, which is 0 at t = 0"
            )
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
    """`log p(x_0)` in nats, (B,), where p is the distribution into which the ODE transforms N(0, I).

    The instantaneous change of variables (Chen et al. 2018):
    `log p(x_0) = log N(x_T; 0, I) + d/2 log ab_T + int tr(d eps / d x_bar) d sigma_bar`,
    where the integral runs along the ODE from x_0 to x_T. It is computed by the trapezoidal rule over tau, and is exact
    in the limit of a fine tau. `-log p(x_0) / (d log 2)` is in bits per dimension.

    model, noise_schedule, tau: as for `samplers.invert`.
    x_0: (B, ...), d values each.
    key: None for the exact trace, which needs d derivatives per step. One key, or (B,) keys, for Hutchinson's estimate
        `v^T J v` with v ~ N(0, I), drawn in each step.
    """
    transitions, x_0 = tau_lib.ascend(noise_schedule, tau), checks.batch("x_0", x_0)
    x_T, integral = samplers.run(_Likelihood(exact=key is None), model, transitions, x_0, key)
    density = -(x_T**2) / 2 - np.log(2 * np.pi) / 2 + np.log(transitions.alpha_bar_s[-1]) / 2
    return jnp.sum(density.reshape(len(x_T), -1), axis=1) + integral


@register_static
@dataclasses.dataclass(frozen=True)
class _Likelihood:
    """Heun's method for encoding. The state is the integral of the trace so far, (B,)."""

    exact: bool

    order = 2
    calls_per_step = 2
    min_steps = 1

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
        euler = advanced(x_t, transition, (end - begin) * eps)
        eps_s, trace_s = _with_trace(denoise, euler, transition.level_s, noise)
        x_s = advanced(x_t, transition, (end - begin) * (eps + eps_s) / 2)
        traces = jnp.sqrt(transition.alpha_bar_t) * trace + jnp.sqrt(transition.alpha_bar_s) * trace_s
        return x_s, state + (end - begin) * traces / 2


def _with_trace(denoise: Denoise, x: Array, level: Level, noise: Array | None) -> tuple[Array, Array]:
    """eps (B, ...), and the trace of d eps / d x, (B,).

    The trace is exact if noise is None, else Hutchinson's estimate. It uses reverse mode, because some networks define
    no forward derivative.
    """
    eps, vjp = jax.vjp(lambda x: denoise(x, level).eps, x)
    quadratic_form = lambda v: jnp.sum((v * vjp(v)[0]).reshape(len(x), -1), axis=1)  # v^T J v
    if noise is not None:
        return eps, quadratic_form(noise)
    basis = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    return eps, jax.vmap(lambda v: quadratic_form(jnp.broadcast_to(v, x.shape)))(basis).sum(0)
