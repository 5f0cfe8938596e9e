"""Training that goes wrong: nothing that is not finite is ever saved in the place of something good, the message is
true, and the command that is printed at the end works.
"""

import dataclasses
import functools
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attacking import holds, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ok, run
from test_commands import SMOKE, leaves, trained  # noqa: F401, a fixture

from configs import smoke
from ddim_jax import config as config_lib
from ddim_jax import data, train
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.data.batches import order
from ddim_jax.training import loop, objectives, train_step
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils.errors import CheckpointError, ConfigError

CONFIG = config_lib.parse(smoke.get_config().to_dict())
CONFIG = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, channel_mult=(1,), attention_resolutions=(), middle_attention=False)
)

RECIPE = config_lib.recipe(CONFIG)


def objective(factor, config=None):
    """A loss without a network in it: factor times the squares of all parameters."""

    def loss(params, x_0, *_):
        return factor * sum(jnp.square(leaf - 1).sum() for leaf in jax.tree.leaves(params)) + 0 * x_0.mean((1, 2, 3))

    return objectives.make(100, loss)


# --- the update ---


@functools.cache
def jitted(clip_norm):
    """An update of plain descent whose rate is a leaf of the optimizer's state."""
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optax.inject_hyperparams(optax.adam)(1.0))
    return optimizer, jax.jit(train_step.build(objective(1.0), optimizer, ema_decay=0.5))


@settings(max_examples=40)
@given(st.floats(-45, 38.5), st.floats(-20, 38), st.sampled_from([1.0, 1e30]))
def test_parameters_that_overflow_are_reported(rate, size, clip_norm):
    """By what the update computes anyway; whatever it says are finite parameters can be saved."""
    optimizer, step = jitted(clip_norm)
    params = {"a": jnp.full((3, 4), np.float32(10.0) ** np.float32(size)), "b": jnp.ones(2)}
    opt_state = optimizer.init(params)
    opt_state[1].hyperparams["learning_rate"] = jnp.float32(10.0**rate if rate < 38.5 else np.inf)
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), opt_state, jnp.int32(0))
    after, metrics = step(state, jnp.zeros((2, 4, 4, 1), jnp.uint8), None, jax.random.key(0))
    all_finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    if metrics.finite:
        holds(all_finite and (metrics.skipped or np.isfinite(metrics.ema_distance)))
        loop.check_state(after)
        loop.check_finite(RECIPE, 1, metrics)
    else:
        refuses(lambda: loop.check_finite(RECIPE, 7, metrics), "step 7", "learning_rate", "checkpoints are from before")
    if not all_finite:
        refuses(lambda: loop.check_state(after), "not finite", errors=(CheckpointError,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["params", "ema_params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(field, value):
    good = {"a": jnp.ones((3, 2)), "b": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(2**31 - 1)}
    state = TrainState(jnp.int32(3), good, good, good, jnp.int32(0))
    loop.check_state(state)
    for name in ("a", "b"):
        bad = {**good, name: good[name].at[-1].set(value)}
        refuses(lambda bad=bad: loop.check_state(state._replace(**{field: bad})), "step 3", errors=(CheckpointError,))


SLOW = pytest.mark.slow

# --- a run ---


def fitted(workdir, mesh, factor=1.0, **fields):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **{"grid_every": 0, **fields}))
    workdir.mkdir(exist_ok=True)
    recipe = config_lib.recipe(config, functools.partial(objective, factor))
    return train.run(config, recipe, data.load("digits"), workdir, mesh)


def saved(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.steps()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [pytest.param(np.nan, marks=SLOW), pytest.param(np.inf, marks=SLOW), 1e38])
def test_good_checkpoints_stay_while_updates_are_left_out(factor, tmp_path, mesh):
    """They were all replaced by later ones of the same parameters, or of worse ones; the sentence was not true."""
    fitted(tmp_path / "run", mesh, num_steps=10)
    _, before = leaves(tmp_path / "run")
    message = refuses(
        lambda: fitted(tmp_path / "run", mesh, factor, num_steps=100, max_skipped=17),
        "17 updates in a row, steps 11 to 27",
        "the checkpoints are from before",
    )
    holds(saved(tmp_path / "run") == [5, 10], message)
    step, after = leaves(tmp_path / "run")
    holds(step == 10 and all((after[name] == before[name]).all() for name in before))


@pytest.mark.parametrize("learning_rate", [pytest.param(1e25, marks=SLOW), pytest.param(1e38, marks=SLOW), 3.4e38])
def test_parameters_that_overflow_end_training(learning_rate, tmp_path, mesh):
    """At once, and nothing of it is saved: they are as bad after each further update."""
    rate = {"learning_rate": learning_rate, "warmup": 0}
    refuses(lambda: fitted(tmp_path / "run", mesh, **rate), "not finite after step 1", "checkpoints are from before")
    holds(saved(tmp_path / "run") == [])


@SLOW
def test_the_last_step_is_saved_though_it_was_left_out(tmp_path, mesh):
    fitted(tmp_path / "run", mesh, num_steps=7)
    fitted(tmp_path / "run", mesh, np.nan, num_steps=9)
    (step, _), good = leaves(tmp_path / "run"), saved(tmp_path / "run")
    holds(step == 9 and good == [5, 7, 9])


def test_a_run_does_not_go_back(tmp_path, mesh):
    fitted(tmp_path / "run", mesh, num_steps=10)
    before = (tmp_path / "run" / "config.json").read_bytes()
    for steps in (1, 9):
        refuses(lambda steps=steps: fitted(tmp_path / "run", mesh, num_steps=steps), f"num_steps is {steps}", "step 10")
    holds((tmp_path / "run" / "config.json").read_bytes() == before)


@pytest.mark.slow
def test_a_config_that_is_refused_is_not_written(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1000))
    refuses(lambda: fitted(tmp_path / "run", mesh), "config.train.keep", errors=(ConfigError,))
    holds(not (tmp_path / "run" / "config.json").exists())


# --- seeds ---


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(2, 500))
def test_no_two_seeds_have_the_same_order(one, other, epoch, length):
    """Nor has a seed and what it is in 32 or 64 bits."""
    for second in {other, one + 2**32, one + 2**64} - {one}:
        a, b = (order(length, seed, epoch * length, 60 * length) for seed in (one, second))
        holds((a != b).any())


# --- the command that is printed ---


def printed(process):
    module, *args = shlex.split(ok(process).stdout.splitlines()[-1].removeprefix("sample it: python -m "))
    return module, args


def test_the_command_after_training_on_samples_it(trained, tmp_path):  # noqa: F811
    """Of a network that began as config.pretrained, in a folder whose name has to be quoted."""
    workdir = tmp_path / "it's a run"
    args = ("--config", "configs/smoke.py", f"--config.pretrained={trained}", "--config.train.num_steps=5")
    module, args = printed(run("ddim_jax.train", *args, "--workdir", workdir))
    done = ok(run(module, *args, "--config.sample.num_images=4", "--out", tmp_path / "out"))
    holds(module == "ddim_jax.sample" and f"{workdir}, step 5" in done.stdout, done.stdout)


def test_the_command_after_training_samples_it(trained, tmp_path):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    module, args = printed(run("ddim_jax.train", *SMOKE, "--skip_damaged", f"--workdir={tmp_path / 'run'}"))
    done = ok(run(module, *args))
    holds(str(tmp_path / "run" / "samples") in done.stdout, done.stdout)
