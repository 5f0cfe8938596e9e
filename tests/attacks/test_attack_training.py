"""Training with values that are not finite: no such state replaces a good checkpoint. The command that training prints
at its end works.
"""

import dataclasses
import functools
import shlex
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attacking import holds, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ok, run
from test_commands import leaves, trained  # noqa: F401, a fixture
from tiny import SMOKE

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
    """A loss without a network: factor times the sum of the squares of all parameters minus 1."""

    def loss(params, x_0, *_):
        return factor * sum(jnp.square(leaf - 1).sum() for leaf in jax.tree.leaves(params)) + 0 * x_0.mean((1, 2, 3))

    return objectives.make(100, loss)


# --- the update ---


@functools.cache
def jitted(clip_norm):
    """(Adam whose learning rate is a leaf of the state, the jitted update)"""
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optax.inject_hyperparams(optax.adam)(1.0))
    return optimizer, jax.jit(train_step.build(objective(1.0), optimizer, ema_decay=0.5))


@settings(max_examples=40)
@given(st.floats(-45, 38.5), st.floats(-20, 38), st.sampled_from([1.0, 1e30]))
def test_parameters_that_overflow_are_reported(rate, size, clip_norm):
    """The metrics of the update report it. A state that they report as finite can be saved."""
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
        refuses(lambda: loop.check_finite(RECIPE, 7, metrics), "step 7", "learning_rate", errors=(ConfigError,))
    if not all_finite:
        refuses(lambda: loop.check_state(after), f"step {after.step}", errors=(CheckpointError,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["params", "ema_params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(field, value):
    good = {"a": jnp.ones((3, 2)), "b": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(2**31 - 1)}
    state = TrainState(jnp.int32(3), good, good, good, jnp.int32(0))
    loop.check_state(state)
    for name in ("a", "b"):
        bad = {**good, name: good[name].at[-1].set(value)}
        refuses(lambda bad=bad: loop.check_state(state._replace(**{field: bad})), "step 3", errors=(CheckpointError,))


# --- a run ---

SLOW = pytest.mark.slow


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
def test_skipped_updates_do_not_replace_checkpoints(factor, tmp_path, mesh):
    fitted(tmp_path / "run", mesh, num_steps=10)
    _, before = leaves(tmp_path / "run")
    message = refuses(
        lambda: fitted(tmp_path / "run", mesh, factor, num_steps=100, max_skipped=17),
        *("17", "11", "27"),
        errors=(ConfigError,),
    )
    holds(saved(tmp_path / "run") == [5, 10], message)
    step, after = leaves(tmp_path / "run")
    holds(step == 10 and all((after[name] == before[name]).all() for name in before))


@pytest.mark.parametrize("learning_rate", [pytest.param(1e25, marks=SLOW), pytest.param(1e38, marks=SLOW), 3.4e38])
def test_parameters_that_overflow_end_training(learning_rate, tmp_path, mesh):
    """After the first update, and without a checkpoint."""
    rate = {"learning_rate": learning_rate, "warmup": 0}
    refuses(lambda: fitted(tmp_path / "run", mesh, **rate), "step 1", "learning_rate", errors=(ConfigError,))
    holds(saved(tmp_path / "run") == [])


@SLOW
def test_the_last_step_is_saved_after_a_skipped_update(tmp_path, mesh):
    fitted(tmp_path / "run", mesh, num_steps=7)
    fitted(tmp_path / "run", mesh, np.nan, num_steps=9)
    step, _ = leaves(tmp_path / "run")
    holds(step == 9 and saved(tmp_path / "run") == [5, 7, 9])


def test_a_run_with_fewer_steps_than_before(tmp_path, mesh):
    fitted(tmp_path / "run", mesh, num_steps=10)
    before = (tmp_path / "run" / "config.json").read_bytes()
    for steps in (1, 9):
        words = ("config.train.num_steps", f" {steps}", "step 10")
        refuses(lambda steps=steps: fitted(tmp_path / "run", mesh, num_steps=steps), *words, errors=(ConfigError,))
    holds((tmp_path / "run" / "config.json").read_bytes() == before)


@pytest.mark.slow
def test_an_invalid_config_is_not_written(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    refuses(lambda: fitted(tmp_path / "run", mesh), "config.train.keep", errors=(ConfigError,))
    holds(not (tmp_path / "run" / "config.json").exists())


# --- seeds ---


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(2, 500))
def test_two_seeds_have_different_orders(one, other, epoch, length):
    """Also two seeds that are equal in 32 or in 64 bits."""
    for second in {other, one + 2**32, one + 2**64} - {one}:
        a, b = (order(length, seed, epoch * length, 60 * length) for seed in (one, second))
        holds((a != b).any())


# --- the command that training prints ---


def printed(process):
    """The module and the arguments of the command in the last line."""
    module, *args = shlex.split(ok(process).stdout.splitlines()[-1].split("python -m ")[1])
    return module, args


def test_the_printed_command_samples_a_run_from_pretrained(trained, tmp_path):  # noqa: F811
    """The name of the workdir needs quotes."""
    workdir = tmp_path / "it's a run"
    args = ("--config", "configs/smoke.py", f"--config.pretrained={trained}", "--config.train.num_steps=5")
    module, args = printed(run("ddim_jax.train", *args, "--workdir", workdir))
    done = ok(run(module, *args, "--config.sample.num_images=4", "--out", tmp_path / "out"))
    holds(module == "ddim_jax.sample" and str(workdir) in done.stdout and "step 5" in done.stdout, done.stdout)


def test_the_printed_command_samples_the_run(trained, tmp_path):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    module, args = printed(run("ddim_jax.train", *SMOKE, "--skip_damaged", f"--workdir={tmp_path / 'run'}"))
    done = ok(run(module, *args))
    holds(str(tmp_path / "run" / "samples") in done.stdout, done.stdout)
