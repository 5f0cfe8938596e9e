"""A network of one's own: any Linen module (x, time, labels, train) -> output of the shape of x."""

import flax.linen as nn
import jax.numpy as jnp


class Convolutional(nn.Module):
    """Three convolutions that know the time."""

    image_channels: int = 1
    width: int = 8
    activation: str = "silu"

    @nn.compact
    def __call__(self, x, time, labels=None, train=False):
        waves = jnp.sin(time[:, None] / 10.0 ** jnp.arange(4)[None])
        h = nn.Conv(self.width, (3, 3))(x) + nn.Dense(self.width)(waves)[:, None, None]
        h = nn.Conv(self.width, (3, 3))(getattr(nn, self.activation)(h))
        return nn.Conv(self.image_channels, (3, 3))(getattr(nn, self.activation)(h))
