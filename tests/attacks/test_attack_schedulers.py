"""Scheduler configs of all versions of diffusers. A field that changes the images is supported, or raises an error."""

import json
import pathlib
import shutil

import mutations
import pytest
from attacking import holds, refuses
from hypothesis import given
from hypothesis import strategies as st
from mutations import WRONG, refuses_or
from processes import ok, run
from tiny import random_params, smoke_values

from configs import smoke
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, diffusers_scheduler
from ddim_jax.config import weights
from ddim_jax.utils.errors import CheckpointError, ConfigError

NOISE = "scheduler/scheduler_config.json"
CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
SOLVERS = (
    *("PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    "UniPCMultistepScheduler",
)
# Fields that change only the update step of the class, with a value that is not a default of any class.
OWN_STEPS = {
    "variance_type": "fixed_large",
    "skip_prk_steps": True,
    "solver_order": 3,
    "algorithm_type": "sde-dpmsolver++",
    "solver_type": "heun",
    "euler_at_final": True,
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -5.1,
    "predict_x0": False,
    "disable_corrector": [0],
    "sigma_min": 0.02,
    "sigma_max": 80.0,
    "flow_shift": 3.0,
}
# Fields that define another noise process, and are not supported.
OTHER_NOISE = {
    "rescale_betas_zero_snr": True,
    "use_flow_sigmas": True,
    "use_dynamic_shifting": True,
    "timestep_type": "continuous",
    "timestep_values": [1, 10, 100],
    "variance_type": "learned",
    "prediction_type": "flow_prediction",
    "beta_schedule": "jsd",
    "timestep_spacing": "logarithmic",
}


def read(**values):
    """(fields of config.schedule, prediction, fields of config.sample) of a file with these values."""
    return diffusers_scheduler.noise_fields(json.loads(json.dumps(values)), "scheduler_config.json")


def refuses_values(*words, **values):
    return refuses(lambda: read(**values), *words, errors=(CheckpointError,))


@pytest.mark.parametrize("name", CLIPPING)
def test_the_default_of_classes_that_can_clip(name):
    holds(read(_class_name=name)[2]["clip_x0"] is True)
    holds(read(_class_name=name, clip_sample=False)[2]["clip_x0"] is False)


@pytest.mark.parametrize("name", SOLVERS)
def test_classes_that_never_clip(name):
    """The file may have fields of another class, which this class ignores."""
    for fields in ({}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.0}):
        holds(read(_class_name=name, **fields)[2]["clip_x0"] is False, f"{name} {fields}")


def test_thresholding_of_classes_that_have_it():
    for name in (*CLIPPING, *SOLVERS):
        holds(read(_class_name=name, thresholding=True)[2]["clip_x0"] is (name != "PNDMScheduler"), name)


@pytest.mark.parametrize(
    "name, tau, end",
    [
        ("DDIMScheduler", "leading", 0),
        ("DDPMScheduler", "leading", 0),
        ("PNDMScheduler", "leading", 1),  # set_alpha_to_one is False by default
        ("DPMSolverMultistepScheduler", "linspace", 0),
        ("DPMSolverSinglestepScheduler", "linspace", 0),
        ("DEISMultistepScheduler", "linspace", 0),
        ("UniPCMultistepScheduler", "linspace", 0),
    ],
)
def test_a_missing_field_has_the_default_of_the_class(name, tau, end):
    sample = read(_class_name=name)[2]
    holds((sample["tau"], sample["tau_end"]) == (tau, end), f"{name}: {sample}")


def test_a_class_named_only_in_model_index(tmp_path):
    params = random_params(config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model))
    diffusers_export.save(tmp_path / "net", params, smoke_values(), "a card\n")
    path, index = tmp_path / "net" / NOISE, tmp_path / "net" / "model_index.json"
    path.write_text(json.dumps({"num_train_timesteps": 100}))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    holds(weights.read_info(str(tmp_path / "net")).sample["clip_x0"] is False)


# --- before version 0.9 ---


@pytest.mark.parametrize("name", (*CLIPPING, *SOLVERS))
def test_predict_epsilon_is_the_old_prediction_type(name):
    holds(read(_class_name=name, predict_epsilon=False)[1] == "x0")
    holds(read(_class_name=name, predict_epsilon=True)[1] == "eps")
    holds(read(_class_name=name, predict_epsilon=False, prediction_type="sample")[1] == "x0")
    holds(read(_class_name=name, predict_epsilon=True, prediction_type="epsilon")[1] == "eps")


@pytest.mark.parametrize("epsilon, prediction", [(False, "epsilon"), (False, "v_prediction"), (True, "sample")])
def test_predict_epsilon_against_prediction_type(epsilon, prediction):
    refuses_values("predict_epsilon", prediction, predict_epsilon=epsilon, prediction_type=prediction)


@pytest.mark.parametrize("value", [None, 0, 1, "false", [], {}], ids=repr)
def test_predict_epsilon_is_a_bool(value):
    refuses_values("predict_epsilon", repr(value), predict_epsilon=value)


def test_a_folder_of_an_old_version(tmp_path):
    """It becomes an x_0 prediction. The note of convert names the field that it ignores."""
    params = random_params(config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model))
    diffusers_export.save(tmp_path / "old", params, smoke_values(), "a card\n")
    noise = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.6.0", "num_train_timesteps": 100}
    noise |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
    noise |= {"variance_type": "fixed_large", "clip_sample": True, "predict_epsilon": False}
    (tmp_path / "old" / NOISE).write_text(json.dumps(noise))
    holds(weights.read_info(str(tmp_path / "old")).model.prediction == "x0")
    done = ok(run("ddim_jax.convert", "--from", tmp_path / "old", "--to", tmp_path / "new"))
    holds(json.loads((tmp_path / "new" / NOISE).read_text())["prediction_type"] == "sample")
    (line,) = done.stderr.splitlines()
    holds(line.startswith("note: ") and "variance_type" in line and "fixed_large" in line, done.stderr)


# --- fields ---


@pytest.mark.parametrize("field", OTHER_NOISE)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_another_noise_process_is_refused(name, field):
    refuses_values(field, _class_name=name, **{field: OTHER_NOISE[field]})


@pytest.mark.parametrize("field", OWN_STEPS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_field_of_the_update_step_is_in_the_note(name, field):
    """It does not raise an error, and it is not ignored silently."""
    values = {"_class_name": name, field: OWN_STEPS[field]}
    holds(read(**values) == read(_class_name=name))
    note = diffusers_scheduler.own_steps(values, "here")
    holds(field in note and "\n" not in note, note)


@pytest.mark.parametrize("name", (*CLIPPING, *SOLVERS))
def test_defaults_are_not_in_the_note(name):
    values = {"_class_name": name, **diffusers_scheduler.SCHEDULERS[name].own_steps}
    holds(diffusers_scheduler.own_steps(values, "here") == "")


def misspelt(name):
    """A letter removed, doubled, replaced, or added."""
    i = len(name) // 2
    yield from {name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name[:i] + "q" + name[i + 1 :], name + "s"}


@pytest.mark.parametrize("field", [*diffusers_scheduler.NOISE, *OWN_STEPS])
def test_a_misspelt_field(field):
    """The error suggests the nearest name."""
    for wrong in misspelt(field):
        value = diffusers_scheduler.NOISE.get(field, OWN_STEPS.get(field))
        refuses_values(repr(wrong), repr(field), **{wrong: value})


@given(field=st.from_regex(r"[a-z][a-z_]{3,20}", fullmatch=True), value=st.sampled_from([None, 1, 0.5, True, "x", []]))
def test_an_unknown_field(field, value):
    if field not in diffusers_scheduler.KNOWN:
        refuses_values(field, **{field: value})


def test_metadata_of_diffusers_is_ignored():
    holds(read(_diffusers_version="0.6.0", _use_default_values=["x"], _name_or_path="y") == read())
    holds(read(tensor_format="pt") == read())


@given(
    name=st.sampled_from([*CLIPPING, *SOLVERS]),
    field=st.sampled_from([*diffusers_scheduler.NOISE, "predict_epsilon", "_class_name"]),
    value=st.sampled_from(WRONG),
)
def test_a_value_of_another_type(name, field, value):
    """An error of one line, or valid sections of a config."""
    values = {"_class_name": name, field: value}

    def checked():
        schedule, prediction, sample = diffusers_scheduler.noise_fields(values, "here")
        try:
            config_lib.section(config_lib.ScheduleConfig, schedule, "schedule")
            config_lib.part_of_section(config_lib.SampleConfig, sample, "sample")
        except ConfigError as error:  # as `weights.read_info` does
            raise CheckpointError(str(error)) from error
        return prediction in ("eps", "x0", "v")

    refuses_or(checked, bool)


def test_the_note_of_sample_is_printed_once(tmp_path):
    params = random_params(config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model))
    diffusers_export.save(tmp_path / "net", params, smoke_values(), "a card\n")
    path = pathlib.Path(tmp_path / "net" / NOISE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": True, "solver_order": 3}))
    given_ = ("--config", "configs/default.py", f"--config.pretrained={tmp_path / 'net'}", "--config.sample.steps=2")
    done = ok(run("ddim_jax.sample", *given_, "--config.sample.num_images=2", "--out", tmp_path / "out"))
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    holds(len(notes) == 1 and "use_karras_sigmas" in notes[0] and "solver_order" in notes[0], done.stderr)
    shutil.rmtree(tmp_path / "out")


def test_ddim_jax_reads_the_configs_that_it_writes():
    for prediction in ("eps", "x0", "v"):
        values = smoke_values()
        values["model"]["prediction"] = prediction
        written = diffusers_scheduler.scheduler_config(values)
        holds(diffusers_scheduler.noise_fields(written, "here")[1] == prediction)
        holds(diffusers_scheduler.own_steps(written, "here") == "")


def test_num_train_timesteps_is_the_number_of_betas():
    """For a schedule of given betas config.schedule.num_steps has no effect."""
    values = smoke_values()
    values["schedule"] |= {"name": "from_betas", "betas": (0.01,) * 7}
    written = diffusers_scheduler.scheduler_config(values)
    holds(written["num_train_timesteps"] == 7 and len(written["trained_betas"]) == 7)
    mutations.refuses_or(lambda: diffusers_scheduler.noise_fields(written, "here"))
