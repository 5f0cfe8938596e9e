"""Every field of every scheduler of diffusers, from version 0.1 to the installed one: it is read, it changes only the
update step, it has one supported value, or its class is refused.

The fields come from the signatures of diffusers, see `diffusers_signatures`.
"""

import importlib.util
import inspect
import math
import pathlib

import diffusers_signatures
import numpy as np
import pytest
from messages import missing, raises

from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_scheduler
from ddim_jax.checkpoints.diffusers_scheduler import noise_fields, update_step
from ddim_jax.checkpoints.diffusers_scheduler_fields import (
    FIXED_NOISE,
    HARMLESS,
    NOISE,
    PREDICT_EPSILON,
    REFUSED,
    SCHEDULERS,
)
from ddim_jax.utils.errors import CheckpointError

READ, UPDATE_STEP, ONE_VALUE, NO_EFFECT = "read", "update step only", "one value", "no effect"


def states(name, field):
    """The states of a field of a class. There must be exactly one."""
    scheduler = SCHEDULERS[name]
    found = {
        READ: field in scheduler.noise or field == PREDICT_EPSILON,
        UPDATE_STEP: field in scheduler.update_step or field in scheduler.removed,
        ONE_VALUE: field in FIXED_NOISE,
        NO_EFFECT: field in HARMLESS,
    }
    return [state for state, holds in found.items() if holds]


def installed():
    """{class: {field: default}} of the installed version, from its source files. {} without diffusers."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None:
        return {}
    found = {}
    for path in sorted((pathlib.Path(spec.origin).parent / "schedulers").rglob("scheduling_*.py")):
        if "flax" not in path.name:
            found |= diffusers_signatures.signatures(path.read_text())
    return found


INSTALLED = installed()
# (class, field) -> its defaults in all versions
FIELDS = {}
for name, _, _, fields in [*diffusers_signatures.recorded(), *((name, "", "", INSTALLED[name]) for name in INSTALLED)]:
    for field, default in fields.items():
        FIELDS.setdefault((name, field), []).append(default)
SUPPORTED = [(name, field) for name, field in FIELDS if name in SCHEDULERS]

# A value that no class has as the default. For fields that are read: with the other fields that it needs to matter.
OTHER = {
    "num_train_timesteps": dict(num_train_timesteps=500),
    "beta_start": dict(beta_start=3e-4),
    "beta_end": dict(beta_end=0.015),
    "beta_schedule": dict(beta_schedule="squaredcos_cap_v2"),
    "trained_betas": dict(trained_betas=[0.1, 0.2], num_train_timesteps=2),
    "prediction_type": dict(prediction_type="sample"),
    "predict_epsilon": dict(predict_epsilon=False),
    "dynamic_thresholding_ratio": dict(dynamic_thresholding_ratio=0.9, thresholding=True),
    "sample_max_value": dict(sample_max_value=1.5, thresholding=True),
    "clip_sample_range": dict(clip_sample_range=2.0, clip_sample=True),
    "timestep_spacing": dict(timestep_spacing="trailing"),
    "steps_offset": dict(steps_offset=1, timestep_spacing="leading"),
    "rescale_betas_zero_snr": dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def other(field, default):
    """A file in which the field has another value than the default, and the file with the default instead."""
    values = OTHER.get(field, {field: another(default)})
    return values, values | {field: default}


def another(default):
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1 if math.isfinite(default) else -5.1
    return {str: "other", list: [0], type(None): 3}[type(default)]


def read(name, **values):
    return noise_fields({"_class_name": name, **values}, "here")


# --- the table ---


def test_every_class_of_diffusers_is_supported_or_refused():
    known = [*SCHEDULERS, *REFUSED]
    assert len(set(known)) == len(known)
    # The newest classes are not in the recorded versions.
    assert set(SCHEDULERS) <= {name for name, _ in FIELDS} <= set(known)


def test_every_class_that_diffusers_exports_is_in_the_table():
    schedulers = pytest.importorskip("diffusers").schedulers
    exported = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    assert exported and exported <= {*SCHEDULERS, *REFUSED}


@pytest.mark.parametrize("name", [name for name in INSTALLED if name in SCHEDULERS])
def test_the_sources_give_the_signature(name):
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if "args" in parameters:
        pytest.skip("needs a further package")
    names = [parameter for parameter in parameters if parameter not in ("self", "kwargs")]
    assert {field: parameters[field].default for field in names} == INSTALLED[name]


@pytest.mark.parametrize("name, field", SUPPORTED)
def test_every_field_has_one_state(name, field):
    assert len(states(name, field)) == 1


def test_no_field_is_invented():
    """Each field of the tables is one of the class, in some version."""
    for name, scheduler in SCHEDULERS.items():
        for field in (*scheduler.noise, *scheduler.update_step, *scheduler.removed):
            assert (name, field) in FIELDS
    fields = {field for _, field in FIELDS}
    assert {*NOISE, *FIXED_NOISE, *HARMLESS, PREDICT_EPSILON} <= fields


# --- what a field does ---


@pytest.mark.parametrize("name, field", [pair for pair in SUPPORTED if states(*pair) == [READ]])
def test_a_field_that_is_read(name, field):
    """Another value changes what is built. A missing field has the default of its class in every version."""
    for default in FIELDS[name, field]:
        changed, unchanged = other(field, default)
        assert read(name, **changed) != read(name, **{f: v for f, v in changed.items() if f != field})
        without = {f: v for f, v in unchanged.items() if f != field}
        if field != "trained_betas":  # its number is that of num_train_timesteps
            assert read(name, **unchanged) == read(name, **without)
        assert update_step({"_class_name": name, **changed}, "here") == ""


@pytest.mark.parametrize("name, field", [pair for pair in SUPPORTED if states(*pair) == [UPDATE_STEP]])
def test_a_field_of_the_update_step(name, field):
    """It changes nothing, and the note names it with its value. The default is not in the note."""
    newest = FIELDS[name, field][-1]
    changed, unchanged = ({"_class_name": name, **values} for values in other(field, newest))
    assert read(name) == noise_fields(changed, "here") == noise_fields(unchanged, "here")
    note = update_step(changed, "here")
    assert not missing(note, "here", field, repr(changed[field])), note
    assert update_step(unchanged, "here") == ""


@pytest.mark.parametrize("name, field", [pair for pair in SUPPORTED if states(*pair) == [ONE_VALUE]])
def test_a_field_with_one_supported_value(name, field):
    """It is the default. Another value raises an error that names the field."""
    for default in FIELDS[name, field]:
        changed, unchanged = other(field, default)
        assert read(name, **unchanged) == read(name)
        with raises(CheckpointError, "here", field, str(default)):
            read(name, **changed)


@pytest.mark.parametrize("name, field", [pair for pair in SUPPORTED if states(*pair) == [NO_EFFECT]])
def test_a_field_without_effect(name, field):
    values = {"_class_name": name, **other(field, FIELDS[name, field][-1])[0]}
    assert noise_fields(values, "here") == read(name) and update_step(values, "here") == ""


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_is_refused(name):
    """The error says why."""
    with raises(CheckpointError, "here", "_class_name", name, "DDIMScheduler") as caught:
        read(name)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_predict_epsilon(name):
    """The field of diffusers 0.8 that prediction_type has replaced."""
    assert read(name, predict_epsilon=False)[1] == read(name, prediction_type="sample")[1] == "x0"
    assert read(name, predict_epsilon=True)[1] == "eps"
    assert read(name, predict_epsilon=False, prediction_type="sample")[1] == "x0"
    for epsilon, prediction in [(False, "epsilon"), (False, "v_prediction"), (True, "sample"), (True, "v_prediction")]:
        with raises(CheckpointError, "here", PREDICT_EPSILON, str(epsilon), prediction):
            read(name, predict_epsilon=epsilon, prediction_type=prediction)


def test_a_variance_that_the_network_outputs_is_refused():
    """variance_type "learned" of DDPMScheduler takes the output as the variance, "learned_range" as a fraction."""
    assert read("DDPMScheduler", variance_type="learned_range") == read("DDPMScheduler")
    with raises(CheckpointError, "here", "variance_type", "learned", "learned_range"):
        read("DDPMScheduler", variance_type="learned")


# --- the meaning of the fields that define alpha_bar ---

ALPHA_BAR = [
    {},
    dict(num_train_timesteps=300),
    dict(beta_start=3e-4, beta_end=0.015),
    *(dict(beta_schedule=name) for name in (*diffusers_scheduler.SCHEDULES, *diffusers_scheduler.SIGNALS)),
    dict(trained_betas=[0.01, 0.02, 0.05], num_train_timesteps=3),
    dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_alpha_bar_is_that_of_every_scheduler(name):
    """With its defaults, and with every field that changes it, as far as the class has them."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    compared = 0
    for values in ALPHA_BAR:
        if not set(values) <= set(SCHEDULERS[name].noise):
            continue
        try:
            scheduler = getattr(diffusers, name)(**values)
        except NotImplementedError:  # a beta_schedule that the class does not have
            continue
        except ImportError:
            pytest.skip("needs a further package")
        fields, *rest = noise_fields({"_class_name": name, **scheduler.config}, "here")
        assert (fields, *rest) == read(name, **values)  # a file need not have the fields with default values
        section = config_lib.section(config_lib.ScheduleConfig, fields, "test")
        # T products in float32. Some classes replace alpha_bar[T] = 0 by 2^-24.
        alpha_bar = config_lib.noise_schedule(section).alpha_bar[1:]
        tolerance = len(alpha_bar) * float(torch.finfo(torch.float32).eps)
        np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod, rtol=tolerance, atol=2**-22)
        compared += 1
    assert compared >= 4


# --- the documentation ---


def documented():
    """The lines of the tables of scheduler fields in docs/checkpoints.md."""
    joined = lambda names: ", ".join(f"`{name}`" for name in names)
    fixed = (f"`{field}` = `{supported!r}`" for field, (supported, _) in FIXED_NOISE.items())
    updates = {field for scheduler in SCHEDULERS.values() for field in (*scheduler.update_step, *scheduler.removed)}
    reasons = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    return [
        "| fields of a scheduler | |",
        "|---|---|",
        f"| read | {joined([*NOISE, PREDICT_EPSILON])} |",
        f"| update step only: ignored, with a note | {joined(sorted(updates))} |",
        f"| one value, others are refused | {', '.join(fixed)} |",
        f"| without effect | {joined(HARMLESS)} |",
        "",
        "| classes | |",
        "|---|---|",
        f"| read | {joined(SCHEDULERS)} |",
        *(f"| refused: {reason} | {joined(names)} |" for reason, names in reasons.items()),
    ]


def test_the_documentation_has_the_tables():
    """A failure prints the tables that belong there."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    assert "\n".join(documented()) in text, "docs/checkpoints.md must contain:\n" + "\n".join(documented())
