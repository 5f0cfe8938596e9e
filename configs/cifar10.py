"""CIFAR-10, 32x32 (section 5 and D.1): DDPM's network with 35,746,307 parameters, quadratic tau.

    python -m ddim_jax.train  --config configs/cifar10.py --workdir runs/cifar10
    python -m ddim_jax.sample --config configs/cifar10.py --workdir runs/cifar10

Prepare the images with `python -m ddim_jax.prepare --data cifar10 --from FOLDER` from cifar-10-binary.tar.gz, or with
`tfds build cifar10 --file_format=array_record`. An .npz file of uint8 `train_images` (50000, 32, 32, 3) can be used
too: --config.data.name=npz --config.data.path=cifar10.npz. One training image costs 35 GFLOP.
The paper's FID at eta = 0, S = 10/20/50/100/1000: 13.36, 6.84, 4.67, 4.16, 4.04 (table 1).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "cifar10"
    config.data.update(name="cifar10", in_memory=True, flip=True)
    config.sample.tau = "quadratic"
    return config
