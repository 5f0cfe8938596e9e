"""Image i is the same for every batch size, number of devices and first image."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import meshes
from tiny import make, params_of, pipeline

from ddim_jax import config as config_lib
from ddim_jax import samplers, sampling
from ddim_jax.utils import sharding


def drawn(mesh, config, process, first=0):
    """The images from the first on, as uint8."""
    return np.concatenate(list(sampling.batches(pipeline(config, mesh, process), config.sample.num_images, first)))


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_batch_size_changes_no_image(eta):
    mesh = meshes()[0]
    whole = drawn(mesh, *make(eta, batch_size=11))
    assert whole.shape == (11, 8, 8, 1) and len(np.unique(whole, axis=0)) == 11 and whole.std() > 10
    for batch_size in (1, 3, 8):
        images = drawn(mesh, *make(eta, batch_size=batch_size)).astype(int)
        assert abs(images - whole).max() <= 1  # a difference of 1e-5 may round to another integer


@pytest.mark.slow
@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_floats_agree_to_a_hundred_thousandth_in_any_batch_and_on_eight_devices(eta):
    config, process = make(eta)

    def floats(mesh, index):
        made = pipeline(config, mesh, process)
        keys, x = sampling.start(made, sharding.split_batch(mesh, np.asarray(index)))
        keys = keys if process.sampler.stochastic else None
        x_0 = samplers.integrate(process.sampler, sampling.conditioned(made), process.transitions, x, keys)
        return sharding.to_host(x_0)

    one, eight = meshes()
    whole = floats(one, range(8))
    np.testing.assert_allclose(
        np.concatenate([floats(one, [0, 1, 2]), floats(one, [3, 4, 5]), floats(one, [6, 7])]), whole, atol=1e-5
    )
    np.testing.assert_allclose(np.concatenate([floats(one, [i]) for i in range(8)]), whole, atol=1e-5)
    np.testing.assert_allclose(floats(eight, range(8)), whole, atol=1e-5)


def test_eight_devices_draw_the_same_images_as_one_even_if_they_do_not_divide_the_batch():
    config, process = make(num_images=11, batch_size=3)
    one, eight = (drawn(mesh, config, process) for mesh in meshes())
    assert one.shape == eight.shape and abs(one.astype(int) - eight).max() <= 1


def test_a_run_from_image_5_draws_the_remaining_images():
    config, process = make()
    mesh = meshes()[0]
    assert abs(drawn(mesh, config, process, first=5).astype(int) - drawn(mesh, config, process)[5:]).max() <= 1


@pytest.mark.parametrize("ahead", [1, 5])
def test_batches_that_are_dispatched_ahead_are_the_same(ahead, monkeypatch):
    one_by_one = drawn(meshes()[0], *make(batch_size=3))
    monkeypatch.setattr(sharding, "batches_ahead", lambda: ahead)
    np.testing.assert_array_equal(drawn(meshes()[0], *make(batch_size=3)), one_by_one)


@pytest.mark.slow
def test_classes_in_turn_or_all_alike():
    config, _ = make(num_classes=3)
    labels_of = lambda config, count: sampling.labels_of(
        config_lib.pipeline(config, None, meshes()[0]), np.arange(count)
    )
    assert labels_of(config, 5).tolist() == [0, 1, 2, 0, 1]
    fixed = dataclasses.replace(config, sample=dataclasses.replace(config.sample, label=2))
    assert labels_of(fixed, 3).tolist() == [2, 2, 2]
    assert labels_of(make()[0], 3) is None
    for mesh in meshes():
        assert drawn(mesh, *make(num_classes=3)).shape == (11, 8, 8, 1)


@pytest.mark.slow
def test_clipping_keeps_the_last_prediction_in_range():
    """Without noise the last step is the predicted x_0: with clip_x0 it cannot leave its range."""
    config, process = make(eta=0.0)
    params, largest = jax.tree.map(lambda leaf: 3 * leaf, params_of(config)), []
    for fields in (dict(), dict(clip_x0=True), dict(clip_x0=True, clip_range=0.5),
                   dict(clip_x0=True, clip_range=9.0, clip_quantile=0.5)):  # fmt: skip
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **fields))
        made = config_lib.pipeline(config, params, meshes()[0])
        _, x = sampling.start(made, np.arange(8))
        x_0 = samplers.integrate(process.sampler, sampling.conditioned(made), process.transitions, x)
        largest.append(float(abs(x_0).max()))
    assert largest[0] > 1.5 and largest[1] <= 1 + 1e-4 and largest[2] <= 0.5 + 1e-4 and largest[3] <= 1 + 1e-4


@pytest.mark.slow
def test_latents_of_a_network_with_classes_decode_with_the_same_classes():
    config, _ = make(num_classes=3, eta=0.0)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=100))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    x_0 = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % 3
    for mesh in meshes():
        made = pipeline(config, mesh, process)
        x_T = sampling.encode(made, x_0, labels)
        same, other = (sampling.decode(made, x_T, classes) for classes in (labels, (labels + 1) % 3))
        assert x_T.shape == x_0.shape and abs(same - x_0).mean() < 0.5 * abs(other - x_0).mean()
