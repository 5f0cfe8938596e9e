"""Guidance and inpainting of data with a known eps."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from tiny import UNET, make, pipeline, random_params

from configs import digits_conditional
from ddim_jax import config as config_lib
from ddim_jax import data, gaussian, guidance, oracle, samplers, sampling, schedule, trajectory
from ddim_jax.config import weights
from ddim_jax.data.scaling import to_uint8
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)


@hypothesis.given(st.floats(-1, 8), st.integers(1, 1000))
@hypothesis.settings(max_examples=30)
def test_between_gaussians_guidance_moves_the_mean(scale, t):
    """With equal deviations `q(x)^(1 - scale) q(x | c)^scale` is a Gaussian of mean m_0 + scale (m_1 - m_0)."""
    unconditional, conditional = (oracle.gaussian(LINEAR, mean, 0.5) for mean in (-0.2, 0.9))
    x = jnp.linspace(-3, 3, 7)[:, None]
    expected = oracle.gaussian(LINEAR, -0.2 + scale * 1.1, 0.5)
    found = guidance.guided(conditional, unconditional, scale)(x, schedule.level_at(TABLE, t, x))
    np.testing.assert_allclose(found.eps, expected(x, jnp.int32(t)), rtol=1e-4, atol=1e-4)


def test_another_scale_compiles_nothing():
    traces = []

    def eps_fn(x, t):
        traces.append(t)
        return 0.1 * x

    run = jax.jit(lambda model, x: model(x, schedule.level_at(TABLE, 5, x)))
    network = jax.tree_util.Partial(eps_fn)
    for scale in (0.0, 1.0, 3.0):
        run(guidance.guided(network, network, scale), jnp.ones((2, 3)))
    assert len(traces) == 2


MODES = np.array([[1.0, 1.0], [-1.0, -1.0]])


@pytest.mark.parametrize("eta, fraction", [(0.0, 0.75), (1.0, 0.88)])  # 0.5 would be chance
def test_unknown_pixels_follow_the_known_ones(eta, fraction):
    """They belong to the mode of the known value. The known value is unchanged."""
    count, mask = 400, jnp.array([True, False])[None]
    known = jnp.where(jnp.arange(count)[:, None] % 2 == 0, 0.9, -1.1) * jnp.array([[1.0, jnp.nan]])
    model = guidance.inpainted(oracle.mixture(LINEAR, MODES, np.full(2, 0.1)), known, mask)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 50))
    x_T = samplers.initial_noise(keys, (2,))
    x_0, path = samplers.trajectory(samplers.ddim(eta), model, transitions, x_T, keys)
    np.testing.assert_allclose(x_0[:, 0], known[:, 0], atol=2e-5)
    right = np.abs(np.asarray(x_0[:, 1]) - np.sign(known[:, 0])) < 0.5
    assert right.mean() > fraction
    for i in (10, 25, 40):  # Eq. (4) holds for the known values in between
        eps = gaussian.predict_eps(
            path.x[i, :, 0], known[:, 0], schedule.level_at(TABLE, transitions.t[i], known[:, 0])
        )
        assert float(eps.mean()) == pytest.approx(0, abs=5 / np.sqrt(count))
        assert float(eps.std()) == pytest.approx(1, abs=5 / np.sqrt(2 * count))


CLASSES = UNET.clone(
    channel_mult=(1,), attention_resolutions=(), middle_attention=False, num_classes=3, label_dropout=0.3
)


@pytest.mark.slow
def test_labels_are_dropped_in_training_only():
    x, count, params = jax.random.normal(jax.random.key(0), (1, 8, 8, 1)), 300, random_params(CLASSES)
    assert params["class"]["embedding"].shape == (4, 32)  # one more than the classes

    def apply(labels, **kwargs):
        count = len(labels)
        return CLASSES.apply({"params": params}, jnp.tile(x, (count, 1, 1, 1)), jnp.full(count, 7), labels, **kwargs)

    one, none = apply(jnp.array([1, 3]))
    assert jnp.abs(one - none).max() > 1e-2
    output = apply(jnp.full(count, 1), train=True, rngs={"dropout": jax.random.key(4)})
    near = lambda expected: (jnp.abs(output - expected[None]).max((1, 2, 3)) < 1e-4).sum()
    assert near(one) + near(none) == count
    assert 0.3 * count == pytest.approx(float(near(none)), abs=5 * np.sqrt(0.3 * 0.7 * count))
    np.testing.assert_allclose(apply(jnp.full(count, 1)), jnp.tile(one, (count, 1, 1, 1)), atol=1e-4)


@pytest.mark.slow
def test_images_are_guided_as_the_config_says():
    """Image i to its own class, by the network output with that class and the one without a class."""
    config, process = make(0.0, num_images=3, num_classes=3, label_dropout=0.1)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=2.5, label=-1))
    guided = pipeline(config, meshes()[0], process)
    keys, x = sampling.start(guided, jnp.arange(3))
    drawn = sampling.draw(guided, 3)
    plain = guided._replace(guidance=1.0)
    one, none = (sampling.conditioned(plain, jnp.array(labels)) for labels in ([0, 1, 2], [3, 3, 3]))
    model = gaussian.Denoise(
        lambda x, level: gaussian.from_eps_output(x, 2.5 * one(x, level).eps - 1.5 * none(x, level).eps, level)
    )
    x_0 = samplers.integrate(process.sampler, model, process.transitions, x)
    assert np.abs(np.asarray(to_uint8(x_0)).astype(int) - drawn).max() <= 1
    assert np.abs(sampling.draw(plain, 3).astype(int) - drawn).max() > 5


def test_the_shipped_network_draws_the_requested_class(mesh):
    """At least nine of ten, by an independent classifier. With guidance 0 about one of ten, by chance."""
    config = config_lib.parse(digits_conditional.get_config().to_dict())
    params, network = weights.find(config, None, mesh).params, features_lib.open_features("digits")
    for scale, least, most in ((2.0, 0.9, 1.0), (0.0, 0.0, 0.35)):
        sample = dataclasses.replace(config.sample, num_images=60, batch_size=60, steps=8, guidance=scale)
        drawing = config_lib.pipeline(dataclasses.replace(config, sample=sample), params, mesh)
        source = data.ArraySource(sampling.draw(drawing, 60), sampling.labels_of(drawing, np.arange(60)))
        outputs = features_lib.extract(network, source, mesh, 60, {"logits", "labels"})
        assert least <= metrics_lib.METRICS["agreement"].compute(outputs, outputs)["agreement"] <= most
