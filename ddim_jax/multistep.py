"""Samplers of higher order for the ODE of DDIM, Eq. (14). They need fewer network calls than DDIM for the same error.

All are deterministic samplers for `samplers.integrate`. With `x_bar = x / sqrt(ab)` and
`sigma_bar = sqrt((1 - ab) / ab)` the ODE is `d x_bar = eps d sigma_bar`, and DDIM is Euler's method on it. With
`lambda = -log(sigma_bar)`, half the log-SNR, the same ODE is `d (x / sqrt(1 - ab)) = exp(lambda) x_0 d lambda` (Lu et
al. 2022b, "DPM-Solver++", Eq. 8).

A multistep method of order p uses the network outputs of the last p - 1 steps in addition to the current one. Before
the first step the stored outputs are placed at infinity, where they have weight 0. So the order increases from 1 to p
during the first steps. At s = 0 lambda is infinite: the last step of the methods in lambda has order 1 and returns the
predicted x_0.

One file because the methods use one interpolation of network outputs, and a reader compares their steps.
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

FAR = 1e12  # larger than every sigma_bar and lambda; its powers do not overflow in float32


class Memory(NamedTuple):
    """The network outputs of the previous steps, the latest first."""

    at: Array  # (p - 1,): sigma_bar or lambda of the outputs
    outputs: Array  # (p - 1, B, ...): eps or x_0


def _empty(x: Array, order: int) -> Memory:
    return Memory(FAR * jnp.arange(1, order, dtype=x.dtype), jnp.zeros((order - 1, *x.shape), x.dtype))


def _with(memory: Memory, at: Array, outputs: Array) -> Memory:
    """The memory with one more output, in front."""
    return Memory(jnp.concatenate([at[None], memory.at]), jnp.concatenate([outputs[None], memory.outputs]))


def _without_last(memory: Memory) -> Memory:
    return Memory(memory.at[:-1], memory.outputs[:-1])


def polynomial(memory: Memory) -> list[Array]:
    """The coefficients c_0, c_1, ... of the polynomial `sum_k c_k (u - at[0])^k` that interpolates all outputs.

    Newton's divided differences. Every coefficient is (B, ...).
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


def _check_consecutive(name: str, min_steps: int, transitions: Transitions) -> None:
    """Raises ValueError unless the transitions suit a method that uses the network outputs of previous steps.

    There must be at least min_steps transitions. Each must descend and begin where the previous one ended. No alpha_bar
    may be 0. If min_steps > 1, the noise levels must differ in float32, because a difference of two network outputs is
    divided by the distance of their noise levels.
    """
    if checks.traced(*transitions):
        return
    t, s = np.asarray(transitions.t), np.asarray(transitions.s)
    if len(t) < min_steps:
        raise ValueError(f"transitions are too few: {name} needs at least {min_steps} steps, got {len(t)}")
    if (s > t).any() or (s[:-1] != t[1:]).any():
        raise ValueError(f"transitions must descend for {name}, and each must begin where the previous one ended")
    check_signal(transitions, name)
    with jax.ensure_compile_time_eval():  # the caller may be traced
        sigma_bar, _ = sigma_bars(Transition(*(np.asarray(leaf, np.float32) for leaf in transitions)))
    for at in (sigma_bar, np.asarray(transitions.lambda_t, np.float32)) if min_steps > 1 else ():
        if len(equal := np.flatnonzero(np.diff(at) == 0)):
            pair = f"{t[equal[0]]} and {t[equal[0] + 1]}"
            raise ValueError(f"transitions are too close: {name} cannot distinguish t = {pair} in float32")


def sigma_bars(transition: Transition) -> tuple[Array, Array]:
    """(sigma_bar at t, sigma_bar at s), with `sigma_bar = sqrt((1 - alpha_bar) / alpha_bar)`."""
    return (
        jnp.sqrt(transition.one_minus_alpha_bar_t / transition.alpha_bar_t),
        jnp.sqrt(transition.one_minus_alpha_bar_s / transition.alpha_bar_s),
    )


def advanced(x_t: Array, transition: Transition, increment: Array) -> Array:
    """x_s from x_t, where `x_bar_s = x_bar_t + increment` with `x_bar = x / sqrt(alpha_bar)`."""
    return jnp.sqrt(transition.alpha_bar_s) * (x_t / jnp.sqrt(transition.alpha_bar_t) + increment)


@register_static
@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
    """Adams-Bashforth: the polynomial through the last eps is integrated over the step in sigma_bar, for any spacing.

    In the first order - 1 steps there are fewer outputs than the order. Each of these steps calls the network a second
    time, at its end, and integrates the polynomial through that output too (Adams-Moulton). Otherwise the error of the
    first steps would dominate.
    """

    order: int

    stochastic = False
    calls_per_step = 1  # 2 in the first order - 1 steps

    @property
    def min_steps(self) -> int:
        return self.order

    def check(self, transitions: Transitions) -> None:
        _check_consecutive(f"ab{self.order}", self.min_steps, transitions)

    def init(self, x: Array) -> tuple[Array, Memory]:
        return jnp.zeros((), jnp.int32), _empty(x, self.order)  # number of steps done, outputs

    def step(self, x_t, state, transition, denoise, noise):
        (done, memory), (begin, end) = state, sigma_bars(transition)
        memory = _with(memory, begin, denoise(x_t, transition.level_t).eps)
        predicted = advanced(x_t, transition, _integral(polynomial(memory), end - begin))

        def corrected(_):
            with_end = _with(memory, end, denoise(predicted, transition.level_s).eps)
            return advanced(x_t, transition, -_integral(polynomial(with_end), begin - end))

        x_s = jax.lax.cond(done < self.order - 1, corrected, lambda _: predicted, None)
        return x_s, (done + 1, _without_last(memory))


def _integral(coefficients: list[Array], h: Array) -> Array:
    """`int_0^h sum_k c_k v^k dv`."""
    return sum(c * h ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))


def ab2() -> AdamsBashforth:
    """Adams-Bashforth of order 2: one network call per step, two in the first step."""
    return AdamsBashforth(2)


def ab4() -> AdamsBashforth:
    """Adams-Bashforth of order 4: one network call per step, two in each of the first three steps."""
    return AdamsBashforth(4)


class PLMS(NamedTuple):
    """Pseudo linear multistep (Liu et al. 2022, Eq. 12): a DDIM step with a linear combination of the last four eps.

    The weights are those of Adams-Bashforth for equal steps. The first step calls the network twice.
    """

    stochastic = False
    order = 2  # not higher, because the weights assume equal steps in sigma_bar
    calls_per_step = 1  # 2 in the first step
    min_steps = 2

    def check(self, transitions: Transitions) -> None:
        _check_consecutive("plms", self.min_steps, transitions)

    def init(self, x: Array) -> tuple:
        return jnp.zeros((), jnp.int32), (jnp.zeros_like(x),) * 3  # number of steps done, the last three eps

    def step(self, x_t, state, transition, denoise, noise):
        done, previous = state
        eps, (begin, end) = denoise(x_t, transition.level_t).eps, sigma_bars(transition)
        euler = advanced(x_t, transition, (end - begin) * eps)
        weights = jnp.asarray(PLMS_WEIGHTS, x_t.dtype)[jnp.minimum(done, 3)]
        first = lambda _: (eps + denoise(euler, transition.level_s).eps) / 2
        later = lambda _: sum(weights[k] * output for k, output in enumerate((eps, *previous)))
        combined = jax.lax.cond(done == 0, first, later, None)
        return advanced(x_t, transition, (end - begin) * combined), (done + 1, (eps, *previous[:-1]))


PLMS_WEIGHTS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def plms() -> PLMS:
    """PLMS, the sampler of the first latent diffusion models: one network call per step, two in the first step."""
    return PLMS()


class Heun(NamedTuple):
    """Heun's method, the trapezoidal rule in sigma_bar (Karras et al. 2022, Algorithm 1).

    Two network calls per step, one in the last step (s = 0).
    """

    stochastic = False
    order = 2
    calls_per_step = 2  # 1 in the last step, if s = 0
    min_steps = 1

    def check(self, transitions: Transitions) -> None:
        _check_consecutive("heun", self.min_steps, transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        eps, (begin, end) = denoise(x_t, transition.level_t).eps, sigma_bars(transition)
        euler = advanced(x_t, transition, (end - begin) * eps)
        corrected = lambda _: advanced(
            x_t, transition, (end - begin) * (eps + denoise(euler, transition.level_s).eps) / 2
        )
        return jax.lax.cond(end > 0, corrected, lambda _: euler, None), state


def heun() -> Heun:
    """Heun's method, of order 2."""
    return Heun()


def _exponential(x_t: Array, transition: Transition, x_0: Array, correction: Array) -> Array:
    """A step of an exponential integrator in lambda. For the last step (s = 0) it returns x_0.

    `x_s = sigma_s / sigma_t x_t + sqrt(ab_s) ((1 - exp(-h)) x_0 + correction)`, with `sigma = sqrt(1 - ab)`.
    """
    ratio = jnp.sqrt(transition.one_minus_alpha_bar_s / transition.one_minus_alpha_bar_t)
    correction = jnp.where(transition.one_minus_alpha_bar_s > 0, correction, 0)
    return ratio * x_t + jnp.sqrt(transition.alpha_bar_s) * (-jnp.expm1(-transition.lambda_step) * x_0 + correction)


def _finite_step(transition: Transition) -> Array:
    """h = lambda_s - lambda_t, or 1 for the last step (s = 0), where h is infinite and not used."""
    return jnp.where(transition.one_minus_alpha_bar_s > 0, transition.lambda_step, 1)


@register_static
@dataclasses.dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++, multistep (Lu et al. 2022b): integrates the polynomial in lambda through the last predicted x_0.

    order: 2 or 3.
    """

    order: int

    stochastic = False
    calls_per_step = 1

    @property
    def min_steps(self) -> int:
        return self.order

    def check(self, transitions: Transitions) -> None:
        _check_consecutive(f"dpm_solver_pp of order {self.order}", self.min_steps, transitions)

    def init(self, x: Array) -> Memory:
        return _empty(x, self.order)

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        state, h = _with(state, transition.lambda_t, x_0), _finite_step(transition)
        _, *coefficients = polynomial(state)
        weights = self._weights(h)
        correction = sum(weight * c for weight, c in zip(weights, coefficients, strict=True))
        return _exponential(x_t, transition, x_0, correction), _without_last(state)

    def _weights(self, h: Array) -> list[Array]:
        """The weights of c_1 and c_2: `int_0^h exp(v - h) v^k dv`. For order 2 the midpoint rule of Lu et al."""
        constant = -jnp.expm1(-h)
        if self.order == 2:
            return [h * constant / 2]
        linear = h - constant
        return [linear, h**2 - 2 * linear]


def dpm_solver_pp(order: int = 2) -> DPMSolverPP:
    """DPM-Solver++(2M) or (3M): one network call per step.

    order: 2 or 3. Raises ValueError otherwise.

    (3M) converges with order 3. diffusers' (3M) converges with order 2.2; after 20 steps the two differ by 1.9e-2.
    """
    if checks.integer("order", order) not in (2, 3):
        raise ValueError(f"order must be either 2 or 3, got {order}")
    return DPMSolverPP(order)


class UniPCState(NamedTuple):
    """The state of `UniPC` between two steps."""

    done: Array  # (): number of steps done
    x: Array  # (B, ...): the corrected x_t at which the last step began
    memory: Memory  # (2,): the predicted x_0 at that x_t and one step earlier
    last: Transition  # the transition of the last step


class UniPC(NamedTuple):
    """UniPC of order 2 with `B(h) = exp(h) - 1` (Zhao et al. 2023, Algorithms 1 and 2). One network call per step.

    The network output at the predicted x_t first corrects the previous step, which ended at x_t, and is then used for
    the next step. The corrector increases the order to 3.
    """

    stochastic = False
    order = 3  # of predictor and corrector; the predictor alone has order 2
    calls_per_step = 1
    min_steps = 2

    def check(self, transitions: Transitions) -> None:
        _check_consecutive("unipc", self.min_steps, transitions)

    def init(self, x: Array) -> UniPCState:
        unused = Transition(*[jnp.ones((), x.dtype)] * len(Transition._fields))
        return UniPCState(jnp.zeros((), jnp.int32), x, _empty(x, 3), unused)

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        corrected = jnp.where(state.done > 0, self._corrected(state, x_0), x_t)
        memory = _without_last(_with(state.memory, transition.lambda_t, x_0))
        h, slope = _finite_step(transition), _slope(memory)
        x_s = _exponential(corrected, transition, x_0, -jnp.expm1(-h) * h * slope / 2)
        return x_s, UniPCState(state.done + 1, corrected, memory, _cast(transition, x_t.dtype))

    def _corrected(self, state: UniPCState, x_0: Array) -> Array:
        """The end of the previous step, corrected by the x_0 that is predicted there."""
        h, (begin, _), (lambda_begin, _) = _finite_step(state.last), state.memory.outputs, state.memory.at
        r = (state.memory.at[1] - lambda_begin) / h
        constant = -jnp.expm1(-h)
        first = (1 - constant / h) / constant  # b_1 and b_2 of the linear system of UniPC
        second = 2 * (0.5 - (1 - constant / h) / h) / constant
        first, second = jnp.where(state.done > 1, first, 0.5), jnp.where(state.done > 1, second, 0.5)
        weight = (first - second) / (1 - r)
        correction = weight * _slope(state.memory) * h + (first - weight) * (x_0 - begin)
        return _exponential(state.x, state.last, begin, constant * correction)


def _slope(memory: Memory) -> Array:
    return (memory.outputs[0] - memory.outputs[1]) / (memory.at[0] - memory.at[1])


def _cast(transition: Transition, dtype) -> Transition:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), transition)


def unipc() -> UniPC:
    """UniPC-2, of order 3: one network call per step."""
    return UniPC()
