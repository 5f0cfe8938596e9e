"""Class-conditional digits, for classifier-free guidance. All other fields are those of `configs/digits.py`.

    python -m ddim_jax.sample --config configs/digits_conditional.py --config.sample.guidance=2
    python -m ddim_jax.train  --config configs/digits_conditional.py --workdir runs/digits_conditional

Expected results: see `ddim_jax/checkpoints/README.md`.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.name = "digits_conditional"
    config.model.update(num_classes=10, label_dropout=0.1)
    config.evaluate.metrics = "fid,kid,inception_score,precision_recall,confidence,nearest,agreement"
    return config
