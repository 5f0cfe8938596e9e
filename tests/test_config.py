"""What a config must not say, and what is said then."""

import copy
import dataclasses
import json

import pytest

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
    "field, value, said",
    [
        ("data.name", "cifar11", "config.data.name: 'cifar11' is not one of digits, folder, npz"),
        ("data.name", "digit", "did you mean 'digits'"),
        (
            "sample.sampler",
            "dimm",
            "config.sample.sampler: 'dimm' is not one of ddim, ddpm, ddpm_hat, heun, ab2, ab4, plms, dpm_solver_pp_2m, "
            "dpm_solver_pp_3m, unipc (did you mean 'ddim'?)",
        ),
        ("schedule.name", "linaer", "config.schedule.name: 'linaer' .* (did you mean 'linear'?)"),
        ("sample.tau", "quadratc", "config.sample.tau: 'quadratc' .* (did you mean 'quadratic'?)"),
        ("model.prediction", "noise", "config.model.prediction: 'noise' is not one of eps, x0, v"),
        ("model.dtype", "float16", "config.model.dtype: 'float16' is not one of float32, bfloat16"),
        ("train.gamma", "snr", "config.train has no field 'gamma'"),
        ("sample.steps", 0, "config.sample.steps: must be at least 1, got 0"),
        ("sample.steps", 1001, "config.sample.steps: num_steps must be in 1..1000, got 1001"),
        ("sample.tau", "1,50,20", "config.sample.tau: tau must ascend strictly, got 50 and then 20"),
        ("sample.tau", "1,50,2000", "config.sample.tau: tau must stay within 1..1000, got 2000"),
        ("sample.tau", "-5,50", "config.sample.tau: tau must ascend strictly, got 0 and then -5"),
        ("sample.tau", "", "config.sample.tau: '' is not one of uniform"),
        (
            "sample.guidance",
            2.0,
            "config.sample.guidance: must be 1 for a network without classes, or trained without "
            "config.model.label_dropout: it cannot tell what a class adds; got 2.0",
        ),
        ("model.label_dropout", 0.1, "config.model: label_dropout needs num_classes above 0, got 0.1"),
        ("sample.tau_offset", 1, "config.sample.tau_offset and tau_end: tau must stay within 1..1000, got 1001"),
        ("sample.tau_end", 1000, "config.sample.tau_offset and tau_end: tau needs at least one step"),
        ("sample.clip_range", 0.0, "config.sample.clip_range: must be above 0, got 0.0"),
        ("sample.clip_quantile", 1.0, "config.sample.clip_quantile: must be in [0, 1), got 1.0"),
        (
            "model.downsample_padding",
            "ends",
            "config.model.downsample_padding: 'ends' is not one of end, both (did you mean 'end'?)",
        ),
        ("sample.eta", -0.1, "config.sample.eta: must be at least 0, got -0.1"),
        ("sample.eta", 3.0, "config.sample.eta: eta must be in [0, 1.* got 3.0"),
        ("sample.eta", float("nan"), "config.sample.eta: must be finite, got nan"),
        ("sample.eta", "0.5", "config.sample.eta: must be of type float, got '0.5'"),
        ("sample.steps", 10.0, "config.sample.steps: must be of type int, got 10.0"),
        ("sample.clip_x0", 1, "config.sample.clip_x0: must be of type bool, got 1"),
        ("sample.label", 3, "config.sample.label: must be -1 .* has 0; got 3"),
        ("model.channel_mult", (1, 2.5), "config.model.channel_mult: must be of type int, got 2.5"),
        ("model.channel_mult", (), "config.model.channel_mult: must hold at least one number"),
        ("model.channel_mult", "1,2", "config.model.channel_mult: must be a tuple, got '1,2'"),
        ("model.image_size", 36, "config.model: image_size 36 cannot be halved 3 times"),
        ("model.dropout", 1.0, "config.model.dropout: must be in [0, 1), got 1.0"),
        ("train.learning_rate", 0.0, "config.train.learning_rate: must be above 0, got 0.0"),
        ("train.checkpoint_every", 150, "config.train.checkpoint_every: must be a multiple of log_every (100)"),
        ("schedule.beta_end", 1e-5, "config.schedule: beta_start and beta_end must satisfy"),
        ("sample.stepz", 5, "config.sample has no field 'stepz' (did you mean 'steps'?)"),
    ],
)
def test_a_mistake_names_its_field(field, value, said):
    with pytest.raises(ConfigError) as error:
        build(changed(field, value))
    message, position = str(error.value), 0
    for part in said.split(".*"):
        assert part.strip() in message[position:], message
        position = message.index(part.strip()) + len(part.strip())
    assert "\n" not in message


def test_eta_of_a_sampler_without_eta_is_refused():
    values = changed("sample.eta", 0.5)
    values["sample"]["sampler"] = "ddpm_hat"
    with pytest.raises(ConfigError, match="the sampler 'ddpm_hat' has no eta"):
        build(values)


def test_a_missing_field_or_section_is_named():
    values = copy.deepcopy(DEFAULT)
    del values["sample"]["eta"]
    with pytest.raises(ConfigError, match="config.sample.eta is missing"):
        build(values)
    with pytest.raises(ConfigError, match="config.sample: must be a section"):
        build({**DEFAULT, "sample": 3})


def test_a_config_survives_json():
    config = config_lib.parse(digits.get_config().to_dict())
    assert config_lib.parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_values_reach_what_they_name():
    values = changed("sample.tau", "1, 50,1000")
    values["sample"].update(eta=0.25)
    values["schedule"].update(name="from_betas", betas=[0.1] * 1000)
    with pytest.raises(ConfigError, match="config.schedule: alpha_bar"):
        build(values)
    values["schedule"]["betas"] = [0.01] * 1000
    config = build(values)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    assert process.tau.tolist() == [0, 1, 50, 1000] and process.sampler.eta == 0.25
    assert process.transitions.alpha_bar_t[-1] == pytest.approx(0.99)


def test_a_run_is_continued_and_sampled_as_it_was_made():
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
                with pytest.raises(ConfigError, match=f"config.{field} is .*the run was made with"):
                    check(other, config, "the run")
