"""Handwritten digits, 8x8: the data set of scikit-learn, and a network of 0.7 M parameters. Training takes minutes on
two CPU cores.

    python -m ddim_jax.sample --config configs/digits.py                       # the shipped weights
    python -m ddim_jax.train  --config configs/digits.py --workdir runs/digits

Expected results: see `ddim_jax/checkpoints/README.md`, which records how the shipped weights were trained and
evaluated.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "digits"
    config.data.name = "digits"
    config.model.update(
        image_size=8,
        image_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        groups=8,
        dropout=0.0,
    )
    config.train.update(
        num_steps=5000,
        batch_size=128,
        learning_rate=1e-3,
        warmup=500,
        ema_decay=0.999,
        log_every=50,
        checkpoint_every=500,
        keep_every=0,
        grid_every=1000,
    )
    config.sample.update(num_images=100, batch_size=100)
    config.evaluate.update(
        features="digits",
        num_images=1000,
        batch_size=500,
        metrics="fid,kid,inception_score,precision_recall,confidence,nearest",
    )
    return config
