"""One training step: its result, and the devices of its arrays."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import meshes
from tiny import UNET_ONE_LEVEL as MODEL

from ddim_jax import data, losses, schedule
from ddim_jax.data.scaling import to_unit
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.training import objectives, optimizers, train_state, train_step
from ddim_jax.utils import sharding

LINEAR = schedule.linear(100)
TABLE = schedule.levels(LINEAR)
KEY = jax.random.key(5)


ADAM = optimizers.adam(1e-2, 5, 1.0)


@functools.cache
def begun(mesh, model, optimizer):
    init = functools.partial(train_state.init, model, optimizer)
    return jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))


@functools.cache
def jitted(mesh, model, optimizer, options):
    options = {"prediction": "eps", "gamma": "one", "ema_decay": 0.9, **dict(options)}
    objective = objectives.noise_prediction(model, LINEAR, options.pop("prediction"), options.pop("gamma"))
    return jax.jit(train_step.build(objective, optimizer, **options), out_shardings=sharding.replicated(mesh))


def train(mesh, steps, model=MODEL, optimizer=ADAM, state=None, first=0, **options):
    state = begun(mesh, model, optimizer) if state is None else state
    step = jitted(mesh, model, optimizer, tuple(options.items()))
    metrics = []
    for _, batch in zip(range(steps), data.batches(data.Plan(data.load("digits"), 16, seed=0), first), strict=False):
        batch = sharding.put_batch(mesh, batch)
        state, step_metrics = step(state, batch.images, batch.labels if model.num_classes else None, KEY)
        metrics.append(jax.device_get(step_metrics))
    return state, metrics


@pytest.mark.slow
def test_parameters_on_eight_devices_equal_those_on_one():
    """With SGD: Adam turns the rounding error of a zero gradient, such as that of the attention's key bias, into steps
    of full size.
    """
    descent = optax.sgd(0.1)
    states = [train(mesh, 10, optimizer=descent)[0] for mesh in meshes()]
    chex.assert_trees_all_close(states[0].ema_params, states[1].ema_params, rtol=1e-4, atol=1e-6)
    assert len(jax.tree.leaves(states[1].params)[0].sharding.device_set) == 8


@functools.cache
def compiled(fsdp, optimizer=ADAM, accumulate=1, model=MODEL):
    """(mesh, state, compiled update) on eight devices. The parameters are divided over fsdp of them."""
    mesh = sharding.data_mesh(fsdp=fsdp)
    init = functools.partial(train_state.init, model, optimizer)
    placement = sharding.fully_sharded(mesh, jax.eval_shape(init, KEY))
    state = jax.jit(init, out_shardings=placement)(jax.random.key(0))
    step = jax.jit(
        train_step.build(objectives.noise_prediction(model, LINEAR), optimizer, ema_decay=0.9, accumulate=accumulate),
        out_shardings=(placement, sharding.replicated(mesh)),
    )
    images = sharding.put_batch(mesh, next(data.batches(data.Plan(data.load("digits"), 16, seed=0))).images)
    return mesh, state, step.lower(state, images, None, KEY).compile()


def curve(mesh, state, step, steps=20, batch=16):
    values = []
    for _, read in zip(range(steps), data.batches(data.Plan(data.load("digits"), batch, seed=0)), strict=False):
        state, metrics = step(state, sharding.put_batch(mesh, read.images), None, KEY)
        values.append(float(metrics.loss))
    return values, state


@pytest.mark.parametrize("fsdp", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 8])
def test_eight_devices_train_as_one(fsdp):
    """The loss curve, with parameters and optimizer state divided over fsdp devices."""
    one = [float(m.loss) for m in train(meshes()[0], 20)[1]]
    mesh, state, step = compiled(fsdp)
    values, state = curve(mesh, state, step)
    np.testing.assert_allclose(values, one, rtol=1e-5)
    kernel = state.params["conv_out"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // fsdp
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)


@pytest.mark.slow
def test_the_collectives_of_an_update():
    """Data-parallel training only sums gradients and metrics. Divided parameters are also gathered. There are no other
    collectives.
    """
    found = {
        fsdp: set(
            re.findall(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
        )
        for fsdp, text in ((fsdp, compiled(fsdp)[2].as_text()) for fsdp in (1, 8))
    }
    assert found[1] == {"all-reduce"}
    assert {"all-reduce", "all-gather"} <= found[8] <= {"all-reduce", "all-gather", "reduce-scatter"}, found


@pytest.mark.slow
def test_gradient_accumulation_equals_the_whole_batch():
    """Without dropout, because each part draws its own masks. One device against eight."""
    model = MODEL.clone(dropout=0.0)
    whole = [float(m.loss) for m in train(meshes()[0], 20, model)[1]]
    np.testing.assert_allclose(curve(*compiled(1, accumulate=2, model=model))[0], whole, rtol=1e-5)


@pytest.mark.slow
def test_remat_changes_no_result(mesh):
    plain, remat = (train(mesh, 5, MODEL.clone(remat=remat))[1] for remat in (False, True))
    np.testing.assert_allclose([m.loss for m in remat], [m.loss for m in plain], rtol=1e-5)
    np.testing.assert_allclose([m.grad_norm for m in remat], [m.grad_norm for m in plain], rtol=1e-4)


def test_an_update_that_is_not_finite_is_skipped(mesh):
    """Only the step and the counter of skipped updates change. The next finite update resets the counter."""
    start = begun(mesh, MODEL, ADAM)
    broken = start._replace(
        params={**start.params, "conv_in": jax.tree.map(lambda x: x * jnp.nan, start.params["conv_in"])}
    )
    state, metrics = train(mesh, 3, state=broken)
    assert [int(m.skipped) for m in metrics] == [1, 2, 3] and int(state.skipped) == 3 and int(state.step) == 3
    chex.assert_trees_all_equal(
        (state.params, state.ema_params, state.opt_state), (broken.params, broken.ema_params, broken.opt_state)
    )
    resumed, metrics = train(mesh, 1, state=state._replace(params=start.params), first=3)
    assert int(metrics[0].skipped) == 0 == int(resumed.skipped)
    assert not np.array_equal(resumed.params["conv_out"]["bias"], start.params["conv_out"]["bias"])


def test_the_losses_of_four_ranges_of_t(mesh):
    (metrics,) = train(mesh, 1)[1]
    assert metrics.bin_counts.sum() == 16
    assert metrics.bin_losses.sum() / 16 == pytest.approx(float(metrics.loss), rel=1e-5)
    t_key, _, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t = np.asarray(jax.random.randint(t_key, (16,), 1, 101))
    np.testing.assert_array_equal(metrics.bin_counts, np.histogram(t, [1, 26, 51, 76, 101])[0])


def test_the_distance_of_the_moving_average(mesh):
    state, [metrics] = train(mesh, 1)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    distance = np.linalg.norm(flat(state.params) - flat(state.ema_params)) / np.linalg.norm(flat(state.params))
    assert float(metrics.ema_distance) == pytest.approx(distance, rel=1e-4) and distance > 0


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(mesh):
    whole, _ = train(mesh, 10)
    half, _ = train(mesh, 5)
    resumed, _ = train(mesh, 5, state=jax.device_get(half), first=5)
    chex.assert_trees_all_equal(whole, resumed)


def test_one_step_by_hand(mesh):
    """The loss of the batch at the drawn t and eps, the clipped gradient, SGD and the moving average."""
    model = MODEL.clone(dropout=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.5))
    start = begun(mesh, model, optimizer)
    before, start = start.params, start._replace(params=jax.tree.map(lambda leaf: leaf + 0.05, start.params))
    state, [metrics] = train(mesh, 1, model, optimizer, start, ema_decay=0.75)

    images = to_unit(next(data.batches(data.Plan(data.load("digits"), 16, seed=0))).images)
    t_key, eps_key, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t, eps = jax.random.randint(t_key, (16,), 1, 101), jax.random.normal(eps_key, images.shape)
    loss = lambda params: losses.l_gamma(Denoiser(model, params), TABLE, images, t, eps).mean()
    value, grads = jax.jit(jax.value_and_grad(loss))(start.params)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    assert metrics.loss == pytest.approx(float(value), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4) and norm > 0.01
    updated = jax.tree.map(lambda old, grad: old - 0.5 * 0.01 / norm * grad, start.params, grads)
    chex.assert_trees_all_close(state.params, updated, rtol=1e-4, atol=1e-6)
    averaged = jax.tree.map(lambda average, new: 0.75 * average + 0.25 * new, before, state.params)
    chex.assert_trees_all_close(state.ema_params, averaged, rtol=1e-5, atol=1e-7)
    assert int(state.step) == 1


def test_the_learning_rate_warms_up_and_stays():
    """On a constant gradient a step of Adam is the learning rate: k / warmup of it in update k, then all of it."""
    optimizer = optimizers.adam(0.1, 4, 1e9)
    x = jnp.zeros(1)
    state, sizes = optimizer.init(x), []
    for _ in range(6):
        step, state = optimizer.update(jnp.ones(1), state)
        sizes.append(-float(step[0]))
    np.testing.assert_allclose(sizes, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)
    for warmup in (0, 1):
        optimizer = optimizers.adam(0.1, warmup, 1e9)
        assert -float(optimizer.update(jnp.ones(1), optimizer.init(x))[0][0]) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.slow
def test_dropout_acts_in_training_and_differs_by_step(mesh):
    frozen = optax.set_to_zero()
    start = begun(mesh, MODEL, frozen)
    start = start._replace(params=jax.tree.map(lambda leaf: leaf + 0.05, start.params))
    losses_of = lambda model: train(mesh, 1, model, frozen, start)[1][0].loss
    assert losses_of(MODEL) != losses_of(MODEL.clone(dropout=0.0))
    assert losses_of(MODEL) == losses_of(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prediction, gamma",
    [("eps", "one"), *(pytest.param(name, name, marks=pytest.mark.slow) for name in ("x0", "v"))],
)
def test_every_prediction_learns_the_digits(mesh, prediction, gamma):
    """60 steps reduce the loss by a quarter."""
    model = MODEL.clone(dropout=0.0)
    _, metrics = train(mesh, 60, model, prediction=prediction, gamma=gamma)
    values = [float(m.loss) for m in metrics]
    assert np.mean(values[-10:]) < 0.75 * np.mean(values[:5])


@pytest.mark.slow
def test_a_class_conditional_network_trains(mesh):
    _, metrics = train(mesh, 3, MODEL.clone(num_classes=10))
    assert np.isfinite([m.loss for m in metrics]).all()


def test_floating_point_images_are_not_scaled():
    """uint8 images are scaled to [-1, 1]; floating point images are taken as scaled."""
    pixels = next(data.batches(data.Plan(data.load("digits"), 16, seed=0))).images
    draw = lambda images: objectives.noise_prediction(MODEL, LINEAR).draw((), images, None, KEY, KEY).x_0
    np.testing.assert_array_equal(draw(pixels), draw(to_unit(pixels)))
