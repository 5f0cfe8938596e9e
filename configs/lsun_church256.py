"""LSUN church (outdoor), 256x256: the network of `lsun_bedroom256.py`, with random flips (Ho et al. 2020, appendix B).

    python -m ddim_jax.prepare --data lsun_church256 --from FOLDER     # church_outdoor_train_lmdb and ..._val_lmdb
    python -m ddim_jax.train  --config configs/lsun_church256.py --workdir runs/church
    python -m ddim_jax.sample --config configs/lsun_church256.py --workdir runs/church

The paper's FID at eta = 0, S = 10/20/50/100: 19.45, 12.47, 10.84, 10.58 (table 3).
"""

from configs import lsun_bedroom256


def get_config():
    config = lsun_bedroom256.get_config()
    config.name = "lsun_church256"
    config.data.update(name="lsun_church256", flip=True)
    config.train.num_steps = 1_200_000
    return config
