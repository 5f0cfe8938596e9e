"""Solvers of DDIM's ODE, Eq. (14), of higher order: fewer network calls for the same error.

All are deterministic samplers for `samplers.integrate`. With `x_bar = x / sqrt(ab)` and
`sigma_bar = sqrt((1 - ab) / ab)` the ODE is `d x_bar = eps d sigma_bar`, and DDIM is Euler on it. With
`lambda = -log(sigma_bar)`, half the log-SNR, the same ODE reads `d (x / sqrt(1 - ab)) = exp(lambda) x_0 d lambda` (Lu
et al. 2022b, "DPM-Solver++", Eq. 8).

A method of order p uses the network's outputs of the last p - 1 steps too. Before the first step these lie infinitely
far away and have weight 0, so the order grows from 1 by itself. At s = 0 lambda is infinite: the last step of the
methods in lambda is of order one and returns the predicted x_0.

One file because the methods share one interpolation of outputs, and a reader compares their steps.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static

from ddim_jax import checks
from ddim_jax.schedule import Array
from ddim_jax.trajectory import Transition, Transitions, check_signal

FAR = 1e12  # beyond all levels; its powers are still float32


class Memory(NamedTuple):
    """Network outputs at the levels before, the latest first."""

    at: Array  # (p - 1,): sigma_bar, or lambda
    outputs: Array  # (p - 1, B, ...): eps, or x_0


def _empty(x: Array, order: int) -> Memory:
    return Memory(FAR * jnp.arange(1, order, dtype=x.dtype), jnp.zeros((order - 1, *x.shape), x.dtype))


def _with(memory: Memory, at: Array, outputs: Array) -> Memory:
    """The memory with one more in front."""
    return Memory(jnp.concatenate([at[None], memory.at]), jnp.concatenate([outputs[None], memory.outputs]))


def _without_last(memory: Memory) -> Memory:
    return Memory(memory.at[:-1], memory.outputs[:-1])


def polynomial(memory: Memory) -> list[Array]:
    """Coefficients c_0, c_1, ... of the polynomial `sum_k c_k (u - at[0])^k` through all points, by Newton's divided
    differences.
    """
    count, differences = len(memory.at), list(memory.outputs)
    offset = memory.at[0] - memory.at  # u - at[j] = v + offset[j], with v = u - at[0]
    powers, coefficients = [jnp.ones_like(offset[0])], [differences[0]]
    for k in range(1, count):
        powers = _times(powers, offset[k - 1])
        differences = [
            (differences[i] - differences[i + 1]) / (memory.at[i] - memory.at[i + k]) for i in range(count - k)
        ]
        coefficients.append(jnp.zeros_like(differences[0]))
        coefficients = [c + power * differences[0] for c, power in zip(coefficients, powers, strict=True)]
    return coefficients


def _times(powers: list[Array], offset: Array) -> list[Array]:
    """The coefficients of `p(v) (v + offset)`."""
    zero = jnp.zeros_like(offset)
    return [offset * low + high for low, high in zip([*powers, zero], [zero, *powers], strict=True)]


def _in_sequence(name: str, least: int, transitions: Transitions) -> None:
    """ValueError for fewer steps than that, for steps that ascend or do not begin where the last one ended, for a level
    without signal, and for levels that float32 cannot tell apart: what a step remembers is divided by their distance.
    """
    if checks.traced(*transitions):
        return
    t, s = np.asarray(transitions.t), np.asarray(transitions.s)
    if len(t) < least:
        raise ValueError(f"transitions are too few: {name} needs at least {least} steps, got {len(t)}")
    if (s > t).any() or (s[:-1] != t[1:]).any():
        raise ValueError(
            f"transitions do not fit: {name} descends from level to level, no step may ascend, or leave a level out"
        )
    check_signal(transitions, name)
    sigma_bar, _ = sigma_bars(Transition(*(np.asarray(leaf, np.float32) for leaf in transitions)))
    for at in (sigma_bar, np.asarray(transitions.lambda_t, np.float32)) if least > 1 else ():
        if len(same := np.flatnonzero(np.diff(at) == 0)):
            pair = f"{t[same[0]]} and {t[same[0] + 1]}"
            raise ValueError(f"transitions are too close: {name} cannot tell the levels {pair} apart in float32")


def sigma_bars(transition: Transition) -> tuple[Array, Array]:
    """sigma_bar at t and at s."""
    return (
        jnp.sqrt(transition.one_minus_alpha_bar_t / transition.alpha_bar_t),
        jnp.sqrt(transition.one_minus_alpha_bar_s / transition.alpha_bar_s),
    )


def advanced(x_t: Array, transition: Transition, increment: Array) -> Array:
    """x_s, where x_bar grows by that."""
    return jnp.sqrt(transition.alpha_bar_s) * (x_t / jnp.sqrt(transition.alpha_bar_t) + increment)


@register_static
@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
    """The polynomial through the last eps, integrated over the step in sigma_bar, however the levels are spaced.

    While there are fewer of them than its order, a step asks the network at its end too, and integrates the polynomial
    through that one as well (Adams-Moulton): else the error of the first steps would be all that is left.
    """

    order: int

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        _in_sequence(f"ab{self.order}", self.order, transitions)

    def init(self, x: Array) -> tuple[Array, Memory]:
        return jnp.zeros((), jnp.int32), _empty(x, self.order)  # steps done

    def step(self, x_t, state, transition, denoise, noise):
        (done, memory), (begin, end) = state, sigma_bars(transition)
        memory = _with(memory, begin, denoise(x_t, transition.level_t).eps)
        ahead = advanced(x_t, transition, _integral(polynomial(memory), end - begin))

        def corrected(_):
            more = _with(memory, end, denoise(ahead, transition.level_s).eps)
            return advanced(x_t, transition, -_integral(polynomial(more), begin - end))

        x_s = jax.lax.cond(done < self.order - 1, corrected, lambda _: ahead, None)
        return x_s, (done + 1, _without_last(memory))


def _integral(coefficients: list[Array], h: Array) -> Array:
    """`int_0^h sum_k c_k v^k dv`."""
    return sum(c * h ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))


def ab2() -> AdamsBashforth:
    """Adams-Bashforth of order 2: one network call a step, two in the first."""
    return AdamsBashforth(2)


def ab4() -> AdamsBashforth:
    """Adams-Bashforth of order 4: one network call a step, two in the first three."""
    return AdamsBashforth(4)


class PLMS(NamedTuple):
    """Pseudo linear multistep (Liu et al. 2022, Eq. 12): the eps of a DDIM step is a fixed mixture of the last four.

    Its weights are Adams-Bashforth's for equal steps; the first step asks the network twice.
    """

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        _in_sequence("plms", 2, transitions)

    def init(self, x: Array) -> tuple:
        return jnp.zeros((), jnp.int32), (jnp.zeros_like(x),) * 3  # steps done, and the last three outputs

    def step(self, x_t, state, transition, denoise, noise):
        done, before = state
        eps, (begin, end) = denoise(x_t, transition.level_t).eps, sigma_bars(transition)
        euler = advanced(x_t, transition, (end - begin) * eps)
        weights = jnp.asarray(PLMS_WEIGHTS, x_t.dtype)[jnp.minimum(done, 3)]
        first = lambda _: (eps + denoise(euler, transition.level_s).eps) / 2
        later = lambda _: sum(weights[k] * output for k, output in enumerate((eps, *before)))
        mixed = jax.lax.cond(done == 0, first, later, None)
        return advanced(x_t, transition, (end - begin) * mixed), (done + 1, (eps, *before[:-1]))


PLMS_WEIGHTS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def plms() -> PLMS:
    """PLMS, as in the first latent diffusion models: one network call a step, two in the first."""
    return PLMS()


class Heun(NamedTuple):
    """The trapezoidal rule in sigma_bar (Karras et al. 2022, Algorithm 1): two network calls a step, one in a step to
    the image.
    """

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        _in_sequence("heun", 1, transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        eps, (begin, end) = denoise(x_t, transition.level_t).eps, sigma_bars(transition)
        euler = advanced(x_t, transition, (end - begin) * eps)
        twice = lambda _: advanced(x_t, transition, (end - begin) * (eps + denoise(euler, transition.level_s).eps) / 2)
        return jax.lax.cond(end > 0, twice, lambda _: euler, None), state


def heun() -> Heun:
    """Heun's method, order 2."""
    return Heun()


def _exponential(x_t: Array, transition: Transition, x_0: Array, change: Array) -> Array:
    """`x_s = sigma_s / sigma_t x_t + sqrt(ab_s) ((1 - exp(-h)) x_0 + change)`, with sigma = sqrt(1 - ab); to the image
    x_0 alone.
    """
    ratio = jnp.sqrt(transition.one_minus_alpha_bar_s / transition.one_minus_alpha_bar_t)
    change = jnp.where(transition.one_minus_alpha_bar_s > 0, change, 0)
    return ratio * x_t + jnp.sqrt(transition.alpha_bar_s) * (-jnp.expm1(-transition.lambda_step) * x_0 + change)


def _finite_step(transition: Transition) -> Array:
    """h = lambda_s - lambda_t; 1 to the image, where it is not used."""
    return jnp.where(transition.one_minus_alpha_bar_s > 0, transition.lambda_step, 1)


@register_static
@dataclasses.dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++ multistep (Lu et al. 2022b): the polynomial in lambda through the last predicted x_0."""

    order: int

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        _in_sequence(f"dpm_solver_pp of order {self.order}", self.order, transitions)

    def init(self, x: Array) -> Memory:
        return _empty(x, self.order)

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        state, h = _with(state, transition.lambda_t, x_0), _finite_step(transition)
        _, *coefficients = polynomial(state)
        weights = self._weights(h)
        change = sum(weight * c for weight, c in zip(weights, coefficients, strict=True))
        return _exponential(x_t, transition, x_0, change), _without_last(state)

    def _weights(self, h: Array) -> list[Array]:
        """Of the powers 1, 2 of lambda - lambda_t: `int_0^h exp(v - h) v^k dv`; for order 2 the paper's midpoint."""
        constant = -jnp.expm1(-h)
        if self.order == 2:
            return [h * constant / 2]
        linear = h - constant
        return [linear, h**2 - 2 * linear]


def dpm_solver_pp(order: int = 2) -> DPMSolverPP:
    """DPM-Solver++(2M) or (3M): one network call a step. ValueError for another order.

    (3M) is of third order. diffusers' is not: it converges with order 2.2, and after 20 steps it differs from this one
    by 1.9e-2.
    """
    if checks.integer("order", order) not in (2, 3):
        raise ValueError(f"order must be one that dpm_solver_pp has, 2 or 3, got {order}")
    return DPMSolverPP(order)


class UniPCState(NamedTuple):
    done: Array  # () steps
    x: Array  # (B, ...): where the last step began, corrected
    memory: Memory  # (2,): predicted x_0 there and one step before
    last: Transition  # the last step


class UniPC(NamedTuple):
    """UniPC of order 2 with `B(h) = exp(h) - 1` (Zhao et al. 2023, Algorithms 1 and 2): what the network says at the
    predicted point first corrects the step that led there. One network call a step.
    """

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        _in_sequence("unipc", 2, transitions)

    def init(self, x: Array) -> UniPCState:
        nothing = jnp.ones((), x.dtype)
        memory = _empty(x, 3)
        return UniPCState(jnp.zeros((), jnp.int32), x, memory, Transition(*[nothing] * len(Transition._fields)))

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        corrected = jnp.where(state.done > 0, self._corrected(state, x_0), x_t)
        memory = _without_last(_with(state.memory, transition.lambda_t, x_0))
        h, slope = _finite_step(transition), _slope(memory)
        x_s = _exponential(corrected, transition, x_0, -jnp.expm1(-h) * h * slope / 2)
        return x_s, UniPCState(state.done + 1, corrected, memory, _as(transition, x_t.dtype))

    def _corrected(self, state: UniPCState, x_0: Array) -> Array:
        """The end of the last step, with the x_0 predicted there too."""
        h, (begin, _), (before, _) = _finite_step(state.last), state.memory.outputs, state.memory.at
        r = (state.memory.at[1] - before) / h
        constant = -jnp.expm1(-h)
        first = (1 - constant / h) / constant  # b_1 and b_2 of UniPC's linear system
        second = 2 * (0.5 - (1 - constant / h) / h) / constant
        first, second = jnp.where(state.done > 1, first, 0.5), jnp.where(state.done > 1, second, 0.5)
        older = (first - second) / (1 - r)
        change = older * _slope(state.memory) * h + (first - older) * (x_0 - begin)
        return _exponential(state.x, state.last, begin, constant * change)


def _slope(memory: Memory) -> Array:
    return (memory.outputs[0] - memory.outputs[1]) / (memory.at[0] - memory.at[1])


def _as(transition: Transition, dtype) -> Transition:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), transition)


def unipc() -> UniPC:
    """UniPC-2: order 3 for one network call a step."""
    return UniPC()
