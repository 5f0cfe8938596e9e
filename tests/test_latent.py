import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import raises

from ddim_jax import latent

RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(4, 6, 5, 3)).astype(np.float32)


def angle(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))


@given(st.floats(0, 1))
def test_slerp_divides_the_angle(fraction):
    a, b = NOISE[:2] / np.linalg.norm(NOISE[:2].reshape(2, -1), axis=1)[:, None, None, None]
    x = latent.slerp(a, b, fraction)
    assert np.linalg.norm(x) == pytest.approx(1, abs=1e-5)
    assert angle(x, b) == pytest.approx((1 - fraction) * angle(a, b), abs=2e-3)  # arccos near 1 keeps half the digits


def test_slerp_by_hand():
    """From the x axis to twice the y axis, a third of the way: sin(60) and 2 sin(30)."""
    x = latent.slerp(jnp.array([1.0, 0]), jnp.array([0.0, 2]), 1 / 3)
    np.testing.assert_allclose(x, [np.sqrt(3) / 2, 1], rtol=1e-6)


def test_slerp_of_parallel_latents_is_the_straight_line():
    a = NOISE[0]
    np.testing.assert_allclose(latent.slerp(a, a, 0.3), a, rtol=1e-6)
    np.testing.assert_allclose(latent.slerp(a, 3 * a, 0.25), 1.5 * a, rtol=1e-5)
    nearly = a + 1e-6 * NOISE[1]
    np.testing.assert_allclose(latent.slerp(a, nearly, 0.5), a, atol=1e-5)


def test_slerp_keeps_the_norm_of_noise():
    """The middle of the straight line has 1/sqrt(2) of the norm."""
    a, b = RNG.normal(size=(2, 20000)).astype(np.float32)
    norms = np.linalg.norm(latent.line(a, b, 11), axis=1) / np.sqrt(20000)
    np.testing.assert_allclose(norms, 1, atol=0.03)
    assert np.linalg.norm((a + b) / 2) / np.sqrt(20000) == pytest.approx(0.5**0.5, abs=0.03)


def test_lines_and_grids_contain_their_ends():
    line = latent.line(NOISE[0], NOISE[1], 5)
    assert line.shape == (5, 6, 5, 3)
    np.testing.assert_allclose(line[0], NOISE[0], rtol=1e-5)
    np.testing.assert_allclose(line[-1], NOISE[1], rtol=1e-5)
    grid = latent.grid(NOISE, 3, 4)
    assert grid.shape == (3, 4, 6, 5, 3)
    for corner, (row, column) in zip(NOISE, [(0, 0), (0, -1), (-1, 0), (-1, -1)], strict=True):
        np.testing.assert_allclose(grid[row, column], corner, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grid[0], latent.line(NOISE[0], NOISE[1], 4), rtol=1e-4, atol=1e-5)
    with raises(ValueError, "count", "got 1"):
        latent.line(NOISE[0], NOISE[1], 1)
    with raises(ValueError, "corners", "4", "3"):
        latent.grid(NOISE[:3], 2, 2)
