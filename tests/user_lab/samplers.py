"""A sampler of the user with a hyper-parameter, and a tau."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ddim_jax import gaussian, samplers


class Churn(NamedTuple):
    """DDIM that replaces a fraction of eps by new noise of the same variance in every step."""

    churn: float = 0.3
    stochastic = True

    def check(self, transitions):
        if not 0 <= self.churn <= 1:
            raise ValueError(f"churn must be in [0, 1], got {self.churn}")

    def init(self, x):
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        x_0, eps = denoise(x_t, transition.level_t)
        mixed = jnp.sqrt(1 - self.churn**2) * eps + self.churn * noise
        return gaussian.q_marginal(x_0, mixed, transition.level_s), state


def no_sampler(churn):
    return samplers.ddim  # a factory instead of a sampler


def cubic(noise_schedule, num_steps):
    """tau_i = ceil(T (i / S)^3), without repeated levels."""
    tau = np.ceil(noise_schedule.num_steps * (np.arange(num_steps + 1) / num_steps) ** 3)
    return np.unique(tau).astype(int)
