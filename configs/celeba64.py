"""CelebA, 64x64 (section 5 and D.1): five resolutions, 78,700,803 parameters, uniform tau.

    python -m ddim_jax.prepare --data celeba64 --from FOLDER    # img_align_celeba.zip and list_eval_partition.txt
    python -m ddim_jax.train  --config configs/celeba64.py --workdir runs/celeba64
    python -m ddim_jax.sample --config configs/celeba64.py --workdir runs/celeba64

The images are cropped to 128x128 around (89, 121) and resized to 64x64; the 162,770 training images take 2 GB of
memory. One training image costs 139 GFLOP.
The paper's FID at eta = 0, S = 10/20/50/100/1000: 17.33, 13.73, 9.17, 6.53, 3.51 (table 1).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "celeba64"
    config.data.update(name="celeba64", in_memory=True, flip=True)
    config.model.update(image_size=64, channel_mult=(1, 2, 2, 2, 4))
    return config
