import dataclasses
import json

import numpy as np
import pytest
from conftest import meshes
from scipy import linalg

from configs import digits
from ddim_jax import config as config_lib
from ddim_jax import data, generate, weights
from ddim_jax.evaluation import digits_classifier, frechet, inception, metrics

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


def test_kid_is_a_difference_of_moments():
    """In one dimension (x y + 1)^3 is sum_k C(3, k) x^k y^k, so MMD^2 = sum_k C(3, k) (E a^k - E b^k)^2; for points of
    equal weights, less what the pairs of a point with itself add.
    """
    a, b = np.array([0.5, 1.0, -1.0, 2.0]), np.array([0.0, 0.3, 1.5, 1.0])
    expected = 0.0
    for k, binomial in enumerate([1, 3, 3, 1]):
        pairs = lambda x, k=k: ((x**k).sum() ** 2 - (x ** (2 * k)).sum()) / 12
        expected += binomial * (pairs(a) + pairs(b) - 2 * (a**k).mean() * (b**k).mean())
    kid = metrics.kid(a[:, None], b[:, None], subset_size=4, num_subsets=3)
    assert kid.mean == pytest.approx(expected, rel=1e-12) and kid.std == pytest.approx(0, abs=1e-12)


def test_kid_of_one_distribution_is_zero_without_bias():
    rng = np.random.default_rng(0)
    values = [metrics.kid(*rng.normal(size=(2, 50, 8)), subset_size=50, num_subsets=1).mean for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    far = metrics.kid(rng.normal(size=(50, 8)), rng.normal(size=(50, 8)) + 1, subset_size=20, num_subsets=10)
    assert far.mean > 10 * np.std(values) and far.std > 0


def test_the_inception_score_of_what_is_certain_and_of_what_is_not():
    certain = 100 * np.eye(5)[np.arange(50) % 5]
    assert metrics.inception_score(certain) == pytest.approx((5, 0), abs=1e-9)
    assert metrics.inception_score(np.zeros((20, 5))) == pytest.approx((1, 0), abs=1e-12)
    assert metrics.inception_score(100 * np.eye(5)[np.arange(50) // 10], splits=5) == pytest.approx((1, 0), abs=1e-9)
    half = np.log(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert metrics.inception_score(half, splits=1).mean == pytest.approx(
        np.exp(np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    )


def test_precision_and_recall_by_hand():
    """Real images at 0, 1, 2, 10 with reach 1, 1, 1, 8; samples at 0.5, 2.9, 30, 31 with reach 2.4, 2.4, 1, 1."""
    column = lambda *values: np.array(values)[:, None]
    found = metrics.precision_recall(column(0.5, 2.9, 30, 31), column(0, 1, 2, 10.0), neighbours=1)
    assert found == (0.5, 0.75)
    assert metrics.precision_recall(column(0, 1, 2.0), column(0, 1, 2.0), neighbours=1) == (1, 1)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 4)), rng.normal(size=(23, 4)) + 0.5
    whole = metrics.precision_recall(a, b)
    monkeypatch.setattr(metrics, "BLOCK", 5)
    assert metrics.precision_recall(a, b) == whole


def test_features_that_mean_nothing_are_refused():
    good, bad = np.ones((5, 3)), np.ones((5, 3))
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="those of image 3 are not"):
        metrics.kid(good, bad, subset_size=2)
    with pytest.raises(ValueError, match="those of image 3 are not"):
        frechet.moments(bad)
    with pytest.raises(ValueError, match=r"of one D, got \(5, 3\) and \(5, 2\)"):
        metrics.precision_recall(good, good[:, :2])
    with pytest.raises(ValueError, match=r"subset_size must be in 2\.\.5, the number of images, got 1000"):
        metrics.kid(good, good)
    with pytest.raises(ValueError, match=r"splits must be in 1\.\.5, the number of images, got 10"):
        metrics.inception_score(good)
    with pytest.raises(ValueError, match=r"neighbours must be in 1\.\.4, below the number of images, got 5"):
        metrics.precision_recall(good, good, neighbours=5)


def test_resize_as_tensorflow_1_does():
    """Output pixel i is input pixel i H / size: the first is the first, and beyond the last centre the last repeats."""
    row = np.array([0.0, 10, 20, 40])
    image = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 1)).astype(np.float32)
    out = np.asarray(inception.resize(image, 8))
    np.testing.assert_allclose(out[0, :, :, 0], np.broadcast_to([0, 5, 10, 15, 20, 30, 40, 40], (8, 8)), rtol=1e-6)
    np.testing.assert_allclose(inception.resize(image, 2)[0, 0, :, 0], [0, 20], rtol=1e-6)
    np.testing.assert_array_equal(inception.resize(image, 4), image)


def test_images_of_another_kind_are_refused():
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"images must be uint8 \(B, H, W, 1 or 3\)"):
            inception.apply({}, images)


@pytest.mark.parametrize("field, value", [("tau_offset", 1), ("clip_range", 2.0), ("clip_x0", True), ("seed", 1)])
def test_cells_that_were_sampled_otherwise_are_not_put_into_one_table(tmp_path, field, value):
    from experiments import digits_quality

    config = config_lib.parse(digits.get_config().to_dict())
    other = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **{field: value}))
    header = lambda config: {"weights": "a", **json.loads(json.dumps(digits_quality.sampled_alike(config)))}
    (tmp_path / "cells.json").write_text(json.dumps({**header(config), "cells": {"0/10": {}}}))
    more = dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=20, eta=1.0, batch_size=7))
    assert digits_quality.load(tmp_path / "cells.json", header(more))["cells"] == {"0/10": {}}
    with pytest.raises(config_lib.ConfigError, match=f"was made with {field} .*, this run has {value}"):
        digits_quality.load(tmp_path / "cells.json", header(other))
