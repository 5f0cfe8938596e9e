"""LSUN bedroom, 256x256 (section 5 and D.1): six resolutions, 113,673,219 parameters, no dropout, uniform tau.

    python -m ddim_jax.prepare --data lsun_bedroom256 --from FOLDER    # bedroom_train_lmdb and bedroom_val_lmdb
    python -m ddim_jax.train  --config configs/lsun_bedroom256.py --workdir runs/bedroom
    python -m ddim_jax.sample --config configs/lsun_bedroom256.py --workdir runs/bedroom

The published images are cropped to their centre square and resized to 256x256. One training image costs 1.48 TFLOP.
With little memory, use --config.train.accumulate=4 or --config.model.remat=True.
The paper's FID at eta = 0, S = 10/20/50/100: 16.95, 8.89, 6.75, 6.62 (table 3).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "lsun_bedroom256"
    config.data.update(name="lsun_bedroom256", workers=4)
    config.model.update(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.train.update(num_steps=2_400_000, batch_size=64, learning_rate=2e-5)
    config.sample.batch_size = 16
    return config
