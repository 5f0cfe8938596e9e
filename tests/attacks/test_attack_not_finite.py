"""Values that are not finite never become an image, a latent or a metric: the error names the index of the image."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from attacking import holds, refused, refuses
from conftest import meshes
from processes import run
from tiny import make, params_of

from ddim_jax import config as config_lib
from ddim_jax import sampling
from ddim_jax.checkpoints import safetensors_file
from ddim_jax.utils.errors import ConfigError

BAD = [np.nan, np.inf, -np.inf]
CONFIG, PROCESS = make(eta=0.5)
PARAMS = params_of(CONFIG)


def drawn(config, process, params):
    return sampling.draw(config_lib.pipeline(config, params, meshes()[0], process), config.sample.num_images)


def refuses_config(call, *words):
    return refuses(call, *words, errors=(ConfigError,))


@hypothesis.given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(BAD))
@hypothesis.settings(max_examples=15)
def test_one_parameter_that_is_not_finite(leaf, place, value):
    """The error does not name config.sample, because the parameters are the cause."""
    leaves, treedef = jax.tree.flatten(PARAMS)
    damaged = [np.array(array) for array in leaves]
    array = damaged[leaf % len(damaged)].reshape(-1)
    array[place % array.size] = value
    message = refuses_config(lambda: drawn(CONFIG, PROCESS, jax.tree.unflatten(treedef, damaged)), "image 0 ")
    holds("config.sample" not in message, message)


@hypothesis.given(st.sampled_from([0, 3, 7, 8, 10]), st.sampled_from(BAD))
@hypothesis.settings(max_examples=8)
def test_one_image_that_is_not_finite(index, value):
    """In the first batch of eight, or in the second one, of which three images are kept."""
    with pytest.MonkeyPatch.context() as patch:
        _with_noise(patch, {index: value})
        refuses_config(lambda: drawn(CONFIG, PROCESS, PARAMS), f"image {index} ", "config.sample")


@pytest.mark.parametrize("value", BAD)
def test_discarded_images_may_be_not_finite(value, monkeypatch):
    before = drawn(CONFIG, PROCESS, PARAMS)
    _with_noise(monkeypatch, {11: value, 15: value})
    holds(np.array_equal(drawn(CONFIG, PROCESS, PARAMS), before))


def _with_noise(patch, values):
    start = sampling.start

    def changed(pipeline, index):
        keys, x = start(pipeline, index)
        for place, value in values.items():
            x = x.at[:, 2, 3, 0].set(np.where(np.asarray(index) == place, value, x[:, 2, 3, 0]))
        return keys, x

    patch.setattr(sampling, "start", changed)


@hypothesis.given(st.integers(0, 7), st.sampled_from([*BAD, 1e30]), st.sampled_from([0, 16]), st.integers(0, 2))
@hypothesis.settings(max_examples=20)
def test_latents_and_decoded_images(index, value, first, refine):
    """Encoded with Eq. (13), encoded with the exact inversion, and decoded. All three are replaced by the identity."""
    x, params = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32), PARAMS
    pipeline = config_lib.pipeline(CONFIG, params, meshes()[0], PROCESS)
    encode = functools.partial(sampling.encode, refine=refine % 2)
    walk = sampling.decode if refine == 2 else encode
    call = lambda: walk(pipeline, x, None, first=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.samplers, "invert", lambda model, schedule, tau, x, **_: x)
        patch.setattr(sampling.samplers, "integrate", lambda sampler, eps_fn, transitions, x: x)
        patch.setattr(sampling.inversion, "invert", lambda *args: sampling.inversion.Inverted(args[3], None))
        holds(np.array_equal(call(), x))
        x[index, 1, 1, 0] = value
        refuses_config(call, f"image {first + index} ", *([] if refine == 2 else ["latent"]))


def test_a_bound_that_is_not_finite(monkeypatch):
    nats = np.arange(8, dtype=np.float32)
    monkeypatch.setattr(sampling.losses, "j_sigma", lambda *args: jax.numpy.asarray(nats))
    images = np.zeros((8, 8, 8, 1), np.uint8)
    pipeline = config_lib.pipeline(CONFIG, PARAMS, meshes()[0], PROCESS)
    call = lambda: sampling.likelihood_bound(pipeline, images, np.arange(8) + 40, None, 0.5)
    holds(np.array_equal(call(), nats))
    nats[3] = np.nan
    refuses_config(call, "image 43 ")


def with_sample(config, **fields):
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **fields))


def test_guidance_that_overflows():
    config, process = make(0.0, num_classes=3, label_dropout=0.1)
    params = params_of(config)
    for guidance in (1e20, 1e30, 1e38):
        config = with_sample(config, guidance=guidance)
        refuses_config(lambda config=config: drawn(config, process, params), "image 0 ", "config.sample", "guidance")


def test_an_untrained_network_draws_images():
    """The output of its last layer is 0. The images are noise far from [-1, 1], which is no error."""
    values = CONFIG.schedule.__dict__ | {"name": "cosine", "num_steps": 1000}
    config = dataclasses.replace(CONFIG, schedule=type(CONFIG.schedule)(**values))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    holds(drawn(config, process, jax.tree.map(np.zeros_like, PARAMS)).shape == (11, 8, 8, 1))


def test_a_clip_range_below_1_with_a_quantile():
    config = with_sample(CONFIG, clip_x0=True, clip_quantile=0.9, clip_range=0.5)
    refuses_config(lambda: drawn(config, PROCESS, PARAMS), "config.sample.clip_range", "0.5")


@pytest.mark.parametrize("tau", ["1e-320", "1e-45", "500,500.00000001", "nan", "1e400", "1,inf"])
def test_invalid_levels_in_tau(tau):
    config = with_sample(CONFIG, tau=tau)
    noise_schedule = config_lib.noise_schedule(config.schedule)
    refuses_config(lambda: config_lib.process(config.sample, noise_schedule), "config.sample.tau")


def test_eta_at_its_limit_draws_images():
    from ddim_jax import samplers

    limit = samplers.max_eta(PROCESS.transitions)
    config = with_sample(CONFIG, eta=limit)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    images = drawn(config, process, PARAMS)
    holds(len(np.unique(images, axis=0)) == 11 and images.std() > 10)
    above = with_sample(CONFIG, eta=float(np.nextafter(limit, np.inf)))
    noise_schedule = config_lib.noise_schedule(config.schedule)
    refuses_config(lambda: config_lib.process(above.sample, noise_schedule), "config.sample.eta")


# --- the commands ---


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A network with one parameter that is NaN."""
    path, params = tmp_path_factory.mktemp("damaged") / "smoke.safetensors", jax.tree.map(np.array, PARAMS)
    params["middle_block_0"]["conv_0"]["bias"][3] = np.nan
    safetensors_file.save(path, params, dataclasses.asdict(CONFIG), 20)
    return path


FEW = ("--config.sample.num_images=8", "--config.sample.batch_size=8", "--config.sample.steps=5")


@pytest.mark.parametrize("command", ["sample", pytest.param("encode", marks=pytest.mark.slow)])
def test_a_network_of_nan(command, damaged, tmp_path):
    more = ("--count=8",) if command == "encode" else ()
    process = run(
        f"ddim_jax.{command}",
        *("--config", "configs/default.py", f"--config.pretrained={damaged}", "--config.data.name=digits"),
        *(*FEW, *more, "--out", tmp_path / "out"),
    )
    refused(process, str(damaged), "middle_block_0/conv_0/bias")
    holds(not list((tmp_path / "out").glob("*.png")), "an image was written")


@pytest.mark.parametrize("tau", ["1e-320", pytest.param("1e-45,1000", marks=pytest.mark.slow)])
def test_invalid_levels_on_the_command_line(tau, tmp_path):
    process = run("ddim_jax.sample", "--config", "configs/digits.py", f"--config.sample.tau={tau}", "--out", tmp_path)
    refused(process, "config.sample.tau")
    holds(not list(tmp_path.glob("*.png")), "an image was written")


@pytest.mark.slow
@pytest.mark.parametrize("guidance, words", [("2e9", ("image 0 ", "guidance")), ("1e30", ("config.sample.guidance",))])
def test_guidance_of_the_command_line(guidance, words, tmp_path):
    """2e9 is in the range of the field. It gives images beyond any valid value. 1e30 is out of range."""
    options = (*FEW, f"--config.sample.guidance={guidance}", "--out", tmp_path)
    refused(run("ddim_jax.sample", "--config", "configs/digits_conditional.py", *options), *words)
    holds(not list(tmp_path.glob("*.png")), "an image was written")
