"""An objective, a loss weight, a time distribution, an optimizer with a schedule, and a moving average of the user."""

import jax
import jax.numpy as jnp
import optax

from ddim_jax import gaussian, schedule
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.training import objectives


def huber(network, noise_schedule, prediction, time, delta=0.5):
    """The Huber loss of eps. The metric `large` is the fraction of examples with a large loss."""
    table = schedule.levels(noise_schedule)

    def loss(params, x_0, t, eps, labels, dropout_key):
        level = schedule.level_at(table, t, x_0)
        denoiser = Denoiser(network, params, prediction, labels, dropout_key=dropout_key)
        error = denoiser(gaussian.q_marginal(x_0, eps, level), level).eps - eps
        return optax.huber_loss(error, delta=delta).mean((1, 2, 3))

    objective = objectives.make(table.num_steps, loss, time=time)
    return objective._replace(metrics=lambda example, losses: {"large": (losses > delta**2 / 2).mean()})


def snr_power(exponent=0.5):
    """gamma_t = SNR^exponent."""
    return lambda level: (level.alpha_bar / level.one_minus_alpha_bar) ** exponent


def late(power=2.0):
    """t near T for a large power."""
    return lambda key, shape, T: 1 + (T - 1) * jax.random.uniform(key, shape) ** (1 / power)


def chain(peak=1e-2, momentum=0.8):
    """Momentum under a triangular schedule."""
    rate = optax.join_schedules([optax.linear_schedule(0, peak, 5), optax.linear_schedule(peak, 0, 15)], [5])
    return optax.chain(optax.trace(momentum), optax.scale_by_learning_rate(rate))


def halving(decay):
    """No averaging in the first ten steps."""
    return lambda step: jnp.where(step < 10, 0.0, decay)
