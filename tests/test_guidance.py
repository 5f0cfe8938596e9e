"""Guidance and inpainting, on data whose eps is known."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from test_generate import make, params_of

from configs import digits_conditional
from ddim_jax import config as config_lib
from ddim_jax import data, gaussian, guidance, oracle, samplers, sampling, schedule, trajectory
from ddim_jax.config import weights
from ddim_jax.data.scaling import to_uint8
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.models.unet import UNet

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)


@hypothesis.given(st.floats(-1, 8), st.integers(1, 1000))
@hypothesis.settings(max_examples=30)
def test_between_gaussians_guidance_moves_the_mean(scale, t):
    """Of one width: the density `q(x)^(1 - scale) q(x | c)^scale` is the Gaussian around m_0 + scale (m_1 - m_0)."""
    nothing, class_ = (oracle.gaussian(LINEAR, mean, 0.5) for mean in (-0.2, 0.9))
    x = jnp.linspace(-3, 3, 7)[:, None]
    beyond = oracle.gaussian(LINEAR, -0.2 + scale * 1.1, 0.5)
    found = guidance.guided(class_, nothing, scale)(x, schedule.level_at(TABLE, t, x))
    np.testing.assert_allclose(found.eps, beyond(x, jnp.int32(t)), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("eta, share", [(0.0, 0.75), (1.0, 0.88)])  # where half would be chance
def test_unknown_pixels_follow_the_known_ones(eta, share):
    """Of two modes, the one that the known value belongs to; that value itself comes back as it was given."""
    count, mask = 400, jnp.array([True, False])[None]
    known = jnp.where(jnp.arange(count)[:, None] % 2 == 0, 0.9, -1.1) * jnp.array([[1.0, jnp.nan]])
    model = guidance.inpainted(oracle.mixture(LINEAR, MODES, np.full(2, 0.1)), known, mask)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 50))
    x_T = samplers.initial_noise(keys, (2,))
    x_0, path = samplers.trajectory(samplers.ddim(eta), model, transitions, x_T, keys)
    np.testing.assert_allclose(x_0[:, 0], known[:, 0], atol=2e-5)
    right = np.abs(np.asarray(x_0[:, 1]) - np.sign(known[:, 0])) < 0.5
    assert right.mean() > share
    for i in (10, 25, 40):  # Eq. (4) holds for them on the way
        eps = gaussian.predict_eps(
            path.x[i, :, 0], known[:, 0], schedule.level_at(TABLE, transitions.t[i], known[:, 0])
        )
        assert float(eps.mean()) == pytest.approx(0, abs=5 / np.sqrt(count))
        assert float(eps.std()) == pytest.approx(1, abs=5 / np.sqrt(2 * count))


CLASSES = UNet(
    image_size=8,
    image_channels=1,
    channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    middle_attention=False,
    groups=4,
    dropout=0.0,
    num_classes=3,
    label_dropout=0.3,
)


@pytest.mark.slow
def test_labels_are_hidden_in_training_alone():
    x, time, count = jax.random.normal(jax.random.key(0), (1, 8, 8, 1)), jnp.array([7]), 300
    shape = jax.eval_shape(CLASSES.init, jax.random.key(0), x, time, jnp.array([0]))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shape)
    assert params["class"]["embedding"].shape == (4, 32)  # one more than the classes

    def say(labels, **kwargs):
        count = len(labels)
        return CLASSES.apply({"params": params}, jnp.tile(x, (count, 1, 1, 1)), jnp.full(count, 7), labels, **kwargs)

    one, none = say(jnp.array([1, 3]))
    assert jnp.abs(one - none).max() > 1e-2
    said = say(jnp.full(count, 1), train=True, rngs={"dropout": jax.random.key(4)})
    near = lambda what: (jnp.abs(said - what[None]).max((1, 2, 3)) < 1e-4).sum()
    assert near(one) + near(none) == count
    assert 0.3 * count == pytest.approx(float(near(none)), abs=5 * np.sqrt(0.3 * 0.7 * count))
    np.testing.assert_allclose(say(jnp.full(count, 1)), jnp.tile(one, (count, 1, 1, 1)), atol=1e-4)


@pytest.mark.slow
def test_images_are_guided_as_the_config_says():
    """Image i to its own class, by the network told that class and the one told none."""
    config, process = make(0.0, num_images=3, num_classes=3, label_dropout=0.1)
    params, mesh = params_of(config), meshes()[0]
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=2.5, label=-1))
    guided = config_lib.pipeline(config, params, mesh, process)
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


def test_the_shipped_network_draws_the_class_that_is_asked_for(mesh):
    """Nine of ten at least, by a classifier that never saw it; with no guidance at all one of ten by chance."""
    config = config_lib.parse(digits_conditional.get_config().to_dict())
    params, network = weights.find(config, None, mesh).params, features_lib.open_features("digits")
    for guidance_, least, most in ((2.0, 0.9, 1.0), (0.0, 0.0, 0.35)):
        sample = dataclasses.replace(config.sample, num_images=60, batch_size=60, steps=8, guidance=guidance_)
        told = dataclasses.replace(config, sample=sample)
        process = config_lib.process(sample, config_lib.noise_schedule(config.schedule))
        drawn = sampling.draw(config_lib.pipeline(told, params, mesh, process), told.sample.num_images)
        source = data.ArraySource(drawn, sampling.labels_of(config_lib.pipeline(told, None, None), np.arange(60)))
        judged = features_lib.extract(network, source, mesh, 60, {"logits", "labels"})
        assert least <= metrics_lib.METRICS["agreement"].compute(judged, judged)["agreement"] <= most
