"""LSUN bedroom, 256x256 (section 5 and D.1): six resolutions, no dropout, uniform tau.

    python -m ddim_jax.train --config configs/lsun_bedroom256.py --config.data.path=bedroom --workdir runs/bedroom

The paper's FID at eta = 0, S = 10/20/50/100: 16.95, 8.89, 6.75, 6.62 (table 3).
"""
from configs import default


def get_config():
    config = default.get_config()
    config.name = "lsun_bedroom256"
    config.data.name = "folder"
    config.model.update(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.train.update(num_steps=2_400_000, batch_size=64, learning_rate=2e-5)
    config.sample.batch_size = 16
    return config
