"""Two networks of the user, one of Linen and one of NNX: (x, time) -> output of the shape of x."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


def features(time):
    """Four features of a timestep: (B,) -> (B, 4)."""
    return jnp.sin(time[:, None] / 10.0 ** jnp.arange(4)[None])


class Convolutional(nn.Module):
    """Three convolutions, with the timestep added after the first."""

    image_channels: int = 1
    width: int = 8
    activation: str = "silu"

    @nn.compact
    def __call__(self, x, time, labels=None, train=False):
        h = nn.Conv(self.width, (3, 3))(x) + nn.Dense(self.width)(features(time))[:, None, None]
        h = nn.Conv(self.width, (3, 3))(getattr(nn, self.activation)(h))
        return nn.Conv(self.image_channels, (3, 3))(getattr(nn, self.activation)(h))


class NNXConvolutional(nnx.Module):
    """The same network in NNX."""

    def __init__(self, image_channels: int = 1, width: int = 8, activation: str = "silu", *, rngs: nnx.Rngs):
        self.activation = activation
        self.time = nnx.Linear(4, width, rngs=rngs)
        self.first = nnx.Conv(image_channels, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.last = nnx.Conv(width, image_channels, (3, 3), rngs=rngs)

    def __call__(self, x, time):
        h = self.first(x) + self.time(features(time))[:, None, None]
        h = self.second(getattr(nnx, self.activation)(h))
        return self.last(getattr(nnx, self.activation)(h))
