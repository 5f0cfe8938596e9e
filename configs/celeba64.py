"""CelebA, 64x64 (section 5 and D.1): five resolutions, uniform tau.

    python -m ddim_jax.train --config configs/celeba64.py --config.data.path=celeba64 --workdir runs/celeba64

The folder holds the images cropped to 128x128 around (89, 121) and resized to 64x64.
The paper's FID at eta = 0, S = 10/20/50/100/1000: 17.33, 13.73, 9.17, 6.53, 3.51 (table 1).
"""
from configs import default


def get_config():
    config = default.get_config()
    config.name = "celeba64"
    config.data.update(name="folder", flip=True)
    config.model.update(image_size=64, channel_mult=(1, 2, 2, 2, 4))
    return config
