"""What somebody brings is used from the command line by "module:attribute" and from Python, and no file of ddim_jax
knows of it.
"""

import json
import types

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest
from conftest import meshes, once
from processes import ROOT, error_line, ok, run
from user_lab import samplers as lab_samplers
from user_lab import schedules as lab_schedules

from configs import default
from ddim_jax import checkpoints, convert, oracle, registry, samplers, sampling, schedule, trajectory
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.models import network as network_lib
from ddim_jax.utils.errors import CheckpointError, ConfigError

LAB = ("--config", "tests/user_lab/config.py")
SMOKE = ("--config", "configs/smoke.py", "--config.model.channel_mult=(1,)", "--config.model.attention_resolutions=()")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT / "tests"))
            more = ("--config.train.optimizer.momentum=0.7", "--config.train.objective.options.delta=0.3")
            ok(run("ddim_jax.train", *LAB, *more, "--workdir", folder))

    return once(tmp_path_factory, "user-lab", make)


def test_the_package_knows_nothing_of_the_lab():
    for file in (ROOT / "ddim_jax").rglob("*.py"):
        assert "user_lab" not in file.read_text()


def test_what_was_trained_is_what_was_asked_for(trained):
    train = json.loads((trained / "config.json").read_text())["train"]
    assert train["optimizer"]["momentum"] == 0.7 and train["optimizer"]["peak"] == 1e-2
    assert train["objective"]["options"] == {"delta": 0.3}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["large"] <= 1 for line in lines)
    # t is drawn late: there are no losses of the first quarter worth a line, and its share of the draws is 1/16.
    assert all(line["ema_distance"] == 0 for line in lines if line["step"] <= 10)  # no average yet


def test_a_weight_of_ones_own_from_the_command_line(tmp_path):
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


def test_another_hyper_parameter_is_another_folder(trained):
    """Of the sampler: its options are in the name of the default folder and in what images depend on."""
    say = lambda churn: ok(run("ddim_jax.sample", *LAB, f"--config.sample.options.churn={churn}", "--workdir", trained))
    assert "churn0.2" in say(0.2).stdout and "churn0.9" in say(0.9).stdout


def test_what_is_trained_is_read_in_python(trained):
    """By a config that names the network: a file alone imports nothing."""
    saved = json.loads((trained / "config.json").read_text())
    config = config_lib.parse(saved)
    assert type(config_lib.network(config.model).module).__name__ == "Convolutional"
    found = weights.find(config, str(trained), meshes()[0])
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    model = sampling.conditioned(config_lib.pipeline(config, found.params, None))
    x = samplers.integrate(process.sampler, model, process.transitions, jnp.ones((2, 8, 8, 1)), jax.random.key(0))
    assert np.isfinite(x).all()


def test_a_file_alone_imports_nothing(trained, tmp_path, monkeypatch):
    """A run, or a file, that names its author's code is read only by who names that code too."""
    values = default.get_config().to_dict()
    values["pretrained"] = str(trained)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(ConfigError, match="config.model.name=user_lab.networks:Convolutional"):
        weights.completed(values)
    assert weights.read_info(str(trained)).model.name == "user_lab.networks:Convolutional"
    said = error_line(run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "x.safetensors"))
    assert "--code=user_lab.networks:Convolutional,user_lab.schedules:power" in said


def test_converted_and_sampled_by_who_names_the_code(trained, tmp_path):
    name = "user_lab.networks:Convolutional"
    file = tmp_path / "bars.safetensors"
    code = f"--code={name},user_lab.schedules:power,user_lab.samplers:cubic"
    ok(run("ddim_jax.convert", "--from", trained, "--to", file, code))
    args = ("--config", "configs/default.py", f"--config.pretrained={file}", f"--config.model.name={name}")
    # The schedule of the file is code too.
    few = ("--config.sample.num_images=2", "--config.sample.steps=2")
    said = error_line(run("ddim_jax.sample", *args, *few, "--out", tmp_path / "out"))
    assert "--config.schedule.name=user_lab.schedules:power" in said
    args = (*args, "--config.schedule.name=user_lab.schedules:power")
    said = error_line(run("ddim_jax.sample", *args, *few, "--out", tmp_path / "out"))
    assert "--config.sample.tau=user_lab.samplers:cubic" in said  # and so is its tau, unless another is given
    ok(run("ddim_jax.sample", *args, *few, "--config.sample.tau=uniform", "--out", tmp_path / "out"))


@pytest.mark.parametrize("field", ["model.name", "schedule.name", "sample.tau"])
def test_no_name_in_a_file_is_imported(field, tmp_path, monkeypatch):
    """Of a file that somebody else has written, whichever way it is opened."""
    values = mutations.smoke_values()
    like = network_lib.param_shapes(config_lib.network(config_lib.parse_saved(values).model))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    file = tmp_path / "theirs.safetensors"
    hostile = config_lib.with_value(values, field, "hostile:run")
    checkpoints.save(file, params, hostile, 5)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    given = config_lib.with_value(default.get_config().to_dict(), "pretrained", str(file))
    with pytest.raises(ConfigError, match=f"config.{field}=hostile:run"):
        config_lib.process(config_lib.parse(weights.completed(given)).sample, schedule.linear())
    if field != "sample.tau":  # which loading and converting do not look up
        with pytest.raises(CheckpointError, match="hostile:run"):
            weights.load(str(file))
    for to in ("out.safetensors", "diffusers"):
        options = dict(to=str(tmp_path / to), format="", ema=True, overwrite=False, code="")
        with pytest.raises(ConfigError, match="--code=hostile:run"):
            convert.main(types.SimpleNamespace(**{"from": str(file)}, **options))


def test_from_python_without_a_config():
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
        ("sample.sampler", "user_lab.samplers:Churm", ("config.sample.sampler", "did you mean 'Churn'")),
        ("sample.sampler", "user_lab.sampler:Churn", ("config.sample.sampler", "cannot be imported")),
        ("sample.sampler", "user_lab.samplers:np.pi", ("config.sample.sampler", "must be a function")),
        ("sample.sampler", "user_lab.samplers:", ("config.sample.sampler", "module:attribute")),
        ("sample.sampler", "user_lab.samplers:no_sampler", ("config.sample", "churn", "missing")),
        ("sample.options", {"chum": 0.1}, ("config.sample", "did you mean 'churn'")),
        ("sample.options", {"churn": 2.0}, ("config.sample", "churn must be in [0, 1]")),
        ("sample.tau", "user_lab.samplers:qubic", ("config.sample.tau", "did you mean 'cubic'")),
        ("schedule.name", "user_lab.schedules:powr", ("config.schedule.name", "did you mean 'power'")),
        ("schedule.options", {"exponent": "x"}, ("config.schedule",)),
    ],
)
def test_mistakes_are_one_line(field, value, words):
    from user_lab.config import get_config

    values = get_config().to_dict()
    section, name = field.split(".")
    values[section][name] = value
    with pytest.raises(ConfigError) as error:
        config = config_lib.parse(values)
        config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    "args, words",
    [
        (("--config.model.widht=4",), ("config.model has no field 'widht'", "width")),
        (("--config.model.width=wide",), ("config.model.width", "int")),
        (("--config.data.name=user_lab.data:bar",), ("config.data", "did you mean 'bars'")),
        (("--config.model.name=user_lab.networks:Convolution",), ("config.model.name", "did you mean")),
    ],
)
def test_mistakes_of_commands_are_one_line(args, words, tmp_path):
    said = error_line(run("ddim_jax.train", *LAB, *args, "--workdir", tmp_path / "run"))
    assert all(word in said for word in words), said
