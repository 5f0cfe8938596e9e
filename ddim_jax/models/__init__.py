"""The networks, by name."""

from ddim_jax.models.dit import DiT
from ddim_jax.models.song_unet import SongUNet
from ddim_jax.models.unet import UNet

NETWORKS = {  # (**fields of config.model) -> Linen module (x, time, labels, train) -> output of the shape of x
    "unet": UNet,
    "dit": DiT,
    "song_unet": SongUNet,
}
