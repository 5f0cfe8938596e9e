"""A noise schedule of the user: a function that returns one."""

import numpy as np

from ddim_jax import schedule


def power(num_steps=1000, exponent=2.0):
    """alpha_bar = 1 - (t / (T + 1))^exponent."""
    u = np.arange(num_steps + 1) / (num_steps + 1)
    return schedule.NoiseSchedule(1 - u**exponent)
