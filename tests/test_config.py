"""Invalid values of a config, and the fields that their errors name."""

import copy
import dataclasses
import json

import pytest
from messages import raises

from configs import default, digits
from ddim_jax import config as config_lib
from ddim_jax.utils.errors import ConfigError

DEFAULT = default.get_config().to_dict()


def changed(field, value):
    values = copy.deepcopy(DEFAULT)
    section, name = field.split(".")
    values[section][name] = value
    return values


def build(values):
    config = config_lib.parse(values)
    config_lib.network(config.model)
    config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    return config


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("data.name", "cifar11", ("'cifar11'", "digits", "folder", "npz")),
        ("data.name", "digit", ("'digit'", "'digits'")),
        ("sample.sampler", "dimm", ("'dimm'", "'ddim'", "ddpm_hat", "heun", "unipc")),
        ("schedule.name", "linaer", ("'linaer'", "'linear'")),
        ("sample.tau", "quadratc", ("'quadratc'", "'quadratic'")),
        ("model.prediction", "noise", ("'noise'", "eps", "x0", "v")),
        ("model.dtype", "float16", ("'float16'", "float32", "bfloat16")),
        ("sample.steps", 0, ("got 0",)),
        ("sample.steps", 1001, ("1..1000", "got 1001")),
        ("sample.tau", "1,50,20", ("50", "20")),
        ("sample.tau", "1,50,2000", ("1..1000", "got 2000")),
        ("sample.tau", "-5,50", ("0", "-5")),
        ("sample.tau", "", ("''", "uniform")),
        ("sample.guidance", 2.0, ("config.model.label_dropout", "got 2.0")),
        ("sample.clip_range", 0.0, ("got 0.0",)),
        ("sample.clip_quantile", 1.0, ("got 1.0",)),
        ("model.downsample_padding", "ends", ("'ends'", "end", "both", "'end'")),
        ("sample.eta", -0.1, ("got -0.1",)),
        ("sample.eta", 3.0, ("got 3.0",)),
        ("sample.eta", float("nan"), ("got nan",)),
        ("sample.eta", "0.5", ("float", "got '0.5'")),
        ("sample.steps", 10.0, ("int", "got 10.0")),
        ("sample.clip_x0", 1, ("bool", "got 1")),
        ("sample.label", 3, ("-1", "0", "got 3")),
        ("model.channel_mult", (1, "2"), ("float", "got '2'")),
        ("model.channel_mult", (1, True), ("int", "got True")),
        ("model.channel_mult", (1, 0), ()),
        ("model.channel_mult", (), ()),
        ("model.channel_mult", "1,2", ("tuple", "got '1,2'")),
        ("model.dropout", 1.0, ("got 1.0",)),
        ("train.learning_rate", 0.0, ("got 0.0",)),
        ("train.checkpoint_every", 150, ("log_every", "100", "150")),
    ],
)
def test_an_error_names_its_field(field, value, words):
    with raises(ConfigError, f"config.{field}", *words):
        build(changed(field, value))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("train.gamma", "snr", ("config.train", "gamma")),
        ("sample.stepz", 5, ("config.sample", "stepz", "'steps'")),
        ("model.label_dropout", 0.1, ("config.model", "label_dropout", "num_classes", "got 0.1")),
        ("sample.tau_offset", 1, ("config.sample.tau_offset", "tau_end", "1..1000", "got 1001")),
        ("sample.tau_end", 1000, ("config.sample.tau_offset", "tau_end", "[1000]")),
        ("model.image_size", 36, ("config.model", "image_size", "36", "3")),
        ("schedule.beta_end", 1e-5, ("config.schedule", "beta_start", "beta_end")),
    ],
)
def test_an_error_of_several_fields_names_their_section(field, value, words):
    with raises(ConfigError, *words):
        build(changed(field, value))


def test_eta_of_a_sampler_without_eta_is_refused():
    values = changed("sample.eta", 0.5)
    values["sample"]["sampler"] = "ddpm_hat"
    with raises(ConfigError, "config.sample.eta", "'ddpm_hat'"):
        build(values)


def test_a_missing_field_or_section_is_named():
    values = copy.deepcopy(DEFAULT)
    del values["sample"]["eta"]
    with raises(ConfigError, "config.sample.eta"):
        build(values)
    with raises(ConfigError, "config.sample"):
        build({**DEFAULT, "sample": 3})


def test_a_config_survives_json():
    config = config_lib.parse(digits.get_config().to_dict())
    assert config_lib.parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_values_reach_the_process():
    values = changed("sample.tau", "1, 50,1000")
    values["sample"].update(eta=0.25)
    values["schedule"].update(name="from_betas", betas=[0.1] * 1000)
    with raises(ConfigError, "config.schedule", "alpha_bar"):
        build(values)
    values["schedule"]["betas"] = [0.01] * 1000
    config = build(values)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    assert process.tau.tolist() == [0, 1, 50, 1000] and process.sampler.eta == 0.25
    assert process.transitions.alpha_bar_t[-1] == pytest.approx(0.99)


def test_which_fields_may_change_between_a_run_and_its_use():
    config = config_lib.parse(DEFAULT)
    for field, value, resumed, sampled in [
        ("train.batch_size", 64, False, True),
        ("model.channels", 64, False, False),
        ("model.dtype", "bfloat16", False, True),
        ("schedule.beta_end", 0.03, False, False),
        ("train.num_steps", 10, True, True),
        ("sample.eta", 0.5, True, True),
        ("model.prediction", "v", False, False),
    ]:
        other = config_lib.parse(changed(field, value))
        for check, same in ((config_lib.check_resumed, resumed), (config_lib.check_sampled, sampled)):
            if same:
                check(other, config, "the run")
            else:
                with raises(ConfigError, f"config.{field}", str(value), "the run"):
                    check(other, config, "the run")
