"""A diffusion transformer (DiT) on the digits of scikit-learn. All other fields are those of `configs/digits.py`.

Train and sample it:

    python -m ddim_jax.train  --config configs/digits_dit.py --workdir DIR
    python -m ddim_jax.sample --config configs/digits_dit.py --workdir DIR
"""

from ml_collections import ConfigDict

from configs import digits


def get_config():
    config = digits.get_config()
    config.name = "digits_dit"
    config.model = ConfigDict(
        dict(
            name="dit",
            image_size=8,
            image_channels=1,
            patch_size=2,
            depth=6,
            hidden_size=128,
            num_heads=4,
            mlp_ratio=4.0,
            dropout=0.0,
            num_classes=0,
            label_dropout=0.0,
            dtype="float32",
            remat=False,
            prediction="eps",
        )
    )
    return config
