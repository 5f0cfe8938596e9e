import dataclasses

import numpy as np
import pytest
from conftest import meshes
from scipy import linalg

from configs import digits
from ddim_jax import config as config_lib
from ddim_jax import data, generate, weights
from ddim_jax.evaluation import digits_classifier, frechet

RNG = np.random.default_rng(0)


def test_frechet_distance_of_known_gaussians():
    """In one dimension it is (m - m')^2 + (s - s')^2; for commuting covariances the same along each axis."""
    a = frechet.Moments(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = frechet.Moments(np.array([0.0, 4.0]), np.diag([1.0, 25.0]))
    assert frechet.distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_with_the_matrix_root_of_scipy():
    a, b = (frechet.moments(RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + shift) for shift in (0, 0.5))
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov - 2 * linalg.sqrtm(a.cov @ b.cov).real)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    """Three points in five dimensions: the square root of the product has no full rank, and the distance stays a
    number.
    """
    a, b = frechet.moments(RNG.normal(size=(3, 5))), frechet.moments(RNG.normal(size=(4, 5)))
    assert 0 < frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet.moments(np.zeros((1, 5)))


def test_the_shipped_weights_draw_digits():
    """300 samples of DDIM at S = 20, seen by a classifier that was fitted on real digits alone. The whole table:
    `experiments/digits_quality.py`."""
    train, held_out = (data.load("digits", split=split) for split in data.SPLITS)
    judge = digits_classifier.fit(train, steps=800)
    real = judge(held_out.images)
    assert (real.probabilities.argmax(1) == held_out.labels).mean() > 0.97

    config = config_lib.parse(digits.get_config().to_dict())
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=20, num_images=300))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    mesh = meshes()[0]
    drawn = np.concatenate(list(generate.batches(config, process, weights.find(config, None, mesh).params, mesh)))
    seen = judge(drawn)
    assert abs(seen.probabilities.max(1).mean() - real.probabilities.max(1).mean()) < 0.05
    shares = np.bincount(seen.probabilities.argmax(1), minlength=10) / len(drawn)
    assert 0.03 < shares.min() and shares.max() < 0.17  # 5% to 15% within two deviations of 300 draws
    noise = judge(RNG.integers(0, 256, drawn.shape, dtype=np.uint8))
    reference = frechet.moments(judge(train.images).features)
    assert frechet.distance(frechet.moments(seen.features), reference) < 0.1 * frechet.distance(
        frechet.moments(noise.features), reference
    )
