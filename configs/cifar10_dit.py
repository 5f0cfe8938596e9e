"""A class-conditional diffusion transformer on CIFAR-10: DiT-S/2 on pixels (Peebles and Xie 2023). All other fields are
those of `configs/cifar10.py`.

    python -m ddim_jax.train  --config configs/cifar10_dit.py --workdir DIR
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.name = "cifar10_dit"
    config.model = ConfigDict(
        dict(
            name="dit",
            image_size=32,
            image_channels=3,
            patch_size=2,
            depth=12,
            hidden_size=384,
            num_heads=6,
            mlp_ratio=4.0,
            dropout=0.0,
            num_classes=10,
            label_dropout=0.1,
            dtype="float32",
            remat=False,
            prediction="eps",
        )
    )
    return config
