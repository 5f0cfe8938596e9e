"""A smoke test: a very small network that runs all parts of training and sampling in seconds, but does not learn. It is
used by the tests, and to check a new machine.

    python -m ddim_jax.train --config configs/smoke.py --workdir runs/smoke
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.name = "smoke"
    config.model.update(channels=8, groups=4, dropout=0.1)
    config.schedule.num_steps = 100
    config.train.update(num_steps=20, batch_size=16, warmup=5, log_every=5, checkpoint_every=5, grid_every=10)
    config.sample.update(steps=5, num_images=8, batch_size=8)
    return config
