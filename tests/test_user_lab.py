"""The code of a user, from the command line by "module:attribute" and from Python, without a change of ddim_jax."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import meshes, once
from messages import raises
from processes import ROOT, error_line, ok, run
from test_commands import leaves
from tiny import SMOKE, random_params, smoke_values
from user_lab import data as lab_data
from user_lab import networks as lab_networks
from user_lab import samplers as lab_samplers
from user_lab import schedules as lab_schedules
from user_lab.config import get_config

from configs import default
from ddim_jax import checkpoints, convert, oracle, registry, samplers, sampling, schedule, training, trajectory
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.models import network as network_lib
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.training import objectives
from ddim_jax.utils.errors import CheckpointError, ConfigError

LAB = ("--config", "tests/user_lab/config.py")
LINEN, NNX = "user_lab.networks:Convolutional", "user_lab.networks:NNXConvolutional"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run of the Linen network."""
    more = ("--config.train.optimizer.momentum=0.7", "--config.train.objective.options.delta=0.3")
    return once(tmp_path_factory, "user-lab", lambda folder: train(folder, *more))


@pytest.fixture(scope="module")
def trained_nnx(tmp_path_factory):
    """The workdir of a run of the NNX network."""
    return once(tmp_path_factory, "user-lab-nnx", lambda folder: train(folder, f"--config.model.name={NNX}"))


def train(folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        ok(run("ddim_jax.train", *LAB, *options, "--workdir", folder))


def test_ddim_jax_does_not_name_the_lab():
    for file in (ROOT / "ddim_jax").rglob("*.py"):
        assert "user_lab" not in file.read_text()


def test_the_options_reach_the_training(trained):
    saved = json.loads((trained / "config.json").read_text())["train"]
    assert saved["optimizer"]["momentum"] == 0.7 and saved["optimizer"]["peak"] == 1e-2
    assert saved["objective"]["options"] == {"delta": 0.3}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["large"] <= 1 for line in lines)
    assert all(line["ema_distance"] == 0 for line in lines if line["step"] <= 10)  # no averaging yet


def test_a_loss_weight_from_the_command_line(tmp_path):
    weight = ("--config.train.objective.weight=user_lab.training:snr_power",)
    options = ("--config.train.objective.weight_options.exponent=0.25", "--config.train.num_steps=5")
    ok(run("ddim_jax.train", *SMOKE, *weight, *options, "--workdir", tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]["objective"]
    assert saved["weight_options"] == {"exponent": 0.25}


def test_trained_sampled_and_evaluated_by_commands(trained, tmp_path):
    more = ("--config.sample.options.churn=0.2", "--config.sample.num_images=32", "--workdir", trained)
    ok(run("ddim_jax.sample", *LAB, *more, "--out", tmp_path / "samples"))
    drawn = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]
    assert drawn.shape == (32, 8, 8, 1) and drawn.std() > 1
    ok(run("ddim_jax.evaluate", *LAB, "--samples", tmp_path / "samples", "--out", tmp_path / "numbers.json"))
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["mean_distance"] > 0 and numbers["fid"] > 0


def test_every_hyper_parameter_of_the_sampler_has_its_own_folder(trained):
    """The options of the sampler are in the name of the default folder."""
    sample = lambda churn: run("ddim_jax.sample", *LAB, f"--config.sample.options.churn={churn}", "--workdir", trained)
    assert "churn0.2" in ok(sample(0.2)).stdout and "churn0.9" in ok(sample(0.9)).stdout


def test_a_trained_network_is_read_in_python(trained):
    """With a config that names the network, because a checkpoint alone imports no code."""
    saved = json.loads((trained / "config.json").read_text())
    config = config_lib.parse(saved)
    assert type(config_lib.network(config.model).module).__name__ == "Convolutional"
    found = weights.find(config, str(trained), meshes()[0])
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    model = sampling.conditioned(config_lib.pipeline(config, found.params, None))
    x = samplers.integrate(process.sampler, model, process.transitions, jnp.ones((2, 8, 8, 1)), jax.random.key(0))
    assert np.isfinite(x).all()


def test_a_nnx_network_is_trained_sampled_and_evaluated_by_commands(trained_nnx, tmp_path):
    """The images are those that the saved parameters give in Python."""
    config = json.loads((trained_nnx / "config.json").read_text())
    assert config["model"]["name"] == NNX and (trained_nnx / "checkpoints" / "20").is_dir()
    sample = ("--config.sample.sampler=ddim", "--config.sample.num_images=4", "--workdir", trained_nnx)
    ok(run("ddim_jax.sample", *LAB, f"--config.model.name={NNX}", *sample, "--out", tmp_path / "samples"))
    drawn = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]

    config = config_lib.parse(config_lib.with_value(config, "sample.sampler", "ddim"))
    network = config_lib.network(config.model)
    assert isinstance(network, network_lib.NNX)
    found = weights.find(config, str(trained_nnx), meshes()[0])
    assert jax.tree.structure(found.params) == jax.tree.structure(network_lib.param_shapes(network))
    expected = sampling.draw(config_lib.pipeline(config, found.params, meshes()[0]), 4)
    assert drawn.shape == (4, 8, 8, 1) and drawn.std() > 1
    assert np.abs(drawn.astype(int) - expected).max() <= 1

    few = ("--config.evaluate.num_images=4", "--config.evaluate.metrics=user_lab.evaluation:mean_distance")
    ok(run("ddim_jax.evaluate", *LAB, *few, "--samples", tmp_path / "samples", "--out", tmp_path / "numbers.json"))
    assert json.loads((tmp_path / "numbers.json").read_text())["mean_distance"] > 0


def test_a_nnx_network_is_resumed(trained_nnx, tmp_path):
    """A run of 10 and 10 steps has the parameters of the run of 20 steps."""
    name, workdir = f"--config.model.name={NNX}", tmp_path / "run"
    for steps in (10, 20):
        ok(run("ddim_jax.train", *LAB, name, f"--config.train.num_steps={steps}", "--workdir", workdir))
    (_, resumed), (_, whole) = leaves(workdir), leaves(trained_nnx)
    assert resumed.keys() == whole.keys() and any("second" in leaf for leaf in whole)
    for leaf in whole:
        np.testing.assert_array_equal(resumed[leaf], whole[leaf], err_msg=leaf)


def test_the_linen_and_the_nnx_network_are_equal():
    """With the same parameters they have the same output."""
    linen, nnx = (
        network_lib.make(factory, {"width": 8}, (8, 8, 1), 0)
        for factory in (lab_networks.Convolutional, lab_networks.NNXConvolutional)
    )
    params = random_params(linen)
    names = {"first": "Conv_0", "second": "Conv_1", "last": "Conv_2", "time": "Dense_0"}
    x, time = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([0, 5, 99])
    expected = linen.apply(params, x, time)
    output = nnx.apply({name: params[other] for name, other in names.items()}, x, time)
    assert expected.shape == x.shape and float(expected.std()) > 0.1
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factory", [lab_networks.Convolutional, lab_networks.NNXConvolutional])
def test_the_networks_from_python(factory):
    """They are trained and sampled without a config."""
    network, noise_schedule = network_lib.make(factory, {"width": 8}, (8, 8, 1), 0), lab_schedules.power(100)
    fitted = training.fit(
        *(network, objectives.noise_prediction(network, noise_schedule), optax.adam(1e-2), lab_data.bars()),
        **dict(num_steps=60, batch_size=16, ema_decay=0.9, mesh=meshes()[0], progress=False),
    )
    assert fitted.losses[-10:].mean() < 0.8 * fitted.losses[:5].mean()
    x_0 = sampling.sample(Denoiser(network, fitted.ema_params), noise_schedule, network.shape, 4, steps=5)
    assert x_0.shape == (4, 8, 8, 1) and np.isfinite(x_0).all() and len(np.unique(x_0, axis=0)) == 4


def test_a_checkpoint_alone_imports_no_code(trained, tmp_path, monkeypatch):
    """A checkpoint that names the code of its author is read only if the user names that code too."""
    values = default.get_config().to_dict()
    values["pretrained"] = str(trained)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with raises(ConfigError, f"config.model.name={LINEN}"):
        weights.completed(values)
    assert weights.read_info(str(trained)).model.name == LINEN
    process = run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "x.safetensors")
    error_line(process, f"--code={LINEN},user_lab.schedules:power")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_checkpoint_is_converted_and_sampled_if_its_code_is_named(trained, tmp_path):
    file = tmp_path / "bars.safetensors"
    code = f"--code={LINEN},user_lab.schedules:power,user_lab.samplers:cubic"
    ok(run("ddim_jax.convert", "--from", trained, "--to", file, code))
    few = ("--config.sample.num_images=2", "--config.sample.steps=2", "--out", tmp_path / "out")
    args = ("--config", "configs/default.py", f"--config.pretrained={file}", *few, f"--config.model.name={LINEN}")
    # The schedule of the file is code too.
    error_line(run("ddim_jax.sample", *args), "--config.schedule.name=user_lab.schedules:power")
    args = (*args, "--config.schedule.name=user_lab.schedules:power")
    # So is its tau, unless the user sets another.
    error_line(run("ddim_jax.sample", *args), "--config.sample.tau=user_lab.samplers:cubic")
    ok(run("ddim_jax.sample", *args, "--config.sample.tau=uniform"))


@pytest.mark.parametrize("field", ["model.name", "schedule.name", "sample.tau"])
def test_no_name_in_a_file_is_imported(field, tmp_path, monkeypatch):
    """By sampling, loading or converting."""
    values = smoke_values()
    params = random_params(config_lib.network(config_lib.parse_saved(values).model))
    file = tmp_path / "hostile.safetensors"
    hostile = config_lib.with_value(values, field, "hostile:run")
    checkpoints.save(file, params, hostile, 5)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    given = config_lib.with_value(default.get_config().to_dict(), "pretrained", str(file))
    with raises(ConfigError, f"config.{field}=hostile:run"):
        config_lib.process(config_lib.parse(weights.completed(given)).sample, schedule.linear())
    if field != "sample.tau":  # `load` does not resolve it
        with raises(CheckpointError, "hostile:run"):
            weights.load(str(file))
    for to in ("out.safetensors", "diffusers"):
        options = dict(to=str(tmp_path / to), format="", ema=True, overwrite=False, code="")
        with raises(ConfigError, "--code=hostile:run"):
            convert.main(types.SimpleNamespace(**{"from": str(file)}, **options))


def test_the_sampler_and_the_schedule_from_python():
    noise_schedule = lab_schedules.power(100, 3.0)
    tau = lab_samplers.cubic(noise_schedule, 10)
    model = oracle.gaussian(noise_schedule, 0.3, 0.5)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(4000))
    x_T = samplers.initial_noise(keys, (1,))
    x_0 = samplers.integrate(lab_samplers.Churn(0.5), model, trajectory.descend(noise_schedule, tau), x_T, keys)
    assert float(x_0.mean()) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("sample.sampler", "user_lab.samplers:Churm", ("config.sample.sampler", "Churm", "'Churn'")),
        ("sample.sampler", "user_lab.sampler:Churn", ("config.sample.sampler", "user_lab.sampler")),
        ("sample.sampler", "user_lab.samplers:np.pi", ("config.sample.sampler", "user_lab.samplers:np.pi", "function")),
        ("sample.sampler", "user_lab.samplers:", ("config.sample.sampler", "module:attribute")),
        ("sample.sampler", "user_lab.samplers:no_sampler", ("config.sample", "churn")),
        ("sample.options", {"chum": 0.1}, ("config.sample", "chum", "'churn'")),
        ("sample.options", {"churn": 2.0}, ("config.sample", "churn", "got 2.0")),
        ("sample.tau", "user_lab.samplers:qubic", ("config.sample.tau", "qubic", "'cubic'")),
        ("schedule.name", "user_lab.schedules:powr", ("config.schedule.name", "powr", "'power'")),
        ("schedule.options", {"exponent": "x"}, ("config.schedule", "options.exponent")),
    ],
)
def test_an_error_names_its_field(field, value, words):
    values = get_config().to_dict()
    section, name = field.split(".")
    values[section][name] = value
    with raises(ConfigError, *words):
        config = config_lib.parse(values)
        config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))


@pytest.mark.parametrize(
    "args, words",
    [
        (("--config.model.widht=4",), ("config.model", "widht", "width")),
        (("--config.model.width=wide",), ("config.model.width", "int")),
        ((f"--config.model.name={NNX}", "--config.model.widht=4"), ("config.model", "widht", "width")),
        (("--config.data.name=user_lab.data:bar",), ("config.data", "user_lab.data", "'bars'")),
        (("--config.model.name=user_lab.networks:Convolution",), ("config.model.name", "'Convolutional'")),
        (("--config.model.name=user_lab.networks:NNXConvolution",), ("config.model.name", "'NNXConvolutional'")),
    ],
)
def test_an_error_of_a_command_is_one_line(args, words, tmp_path):
    error_line(run("ddim_jax.train", *LAB, *args, "--workdir", tmp_path / "run"), *words)
