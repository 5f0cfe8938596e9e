"""Schedules with alpha_bar[T] = 0 (rescale_betas_zero_snr of diffusers), for networks that predict v or x_0: every step
against diffusers' schedulers, the encoding, and finite values.
"""

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")

from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr  # noqa: E402
from messages import raises  # noqa: E402
from tiny import smoke_values  # noqa: E402

from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax import gaussian, samplers, trajectory  # noqa: E402
from ddim_jax.checkpoints import diffusers_scheduler  # noqa: E402
from ddim_jax.models.denoiser import Denoiser  # noqa: E402
from ddim_jax.utils.errors import CheckpointError  # noqa: E402

torch.set_num_threads(1)

T = 1000
FLOAT32 = float(np.finfo(np.float32).eps)
STEPS = (1, 2, 5, 10, 50)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = {"v_prediction": "v", "sample": "x0"}  # an eps-prediction cannot give x_0 where alpha_bar = 0


def function(x, time, xp):
    """The output of the network: smooth in x and time, and not linear in x."""
    return xp.sin(2 * x) + 0.3 * xp.cos(0.01 * time + 3 * x)


class Toy(nn.Module):
    """`function` as a network without parameters."""

    def __call__(self, x, time, labels=None, train=False):
        return function(x, time.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), jnp)


def betas(settings, dtype):
    """The betas of a DDIMScheduler, in diffusers' order of operations."""
    start, end, num = settings.get("beta_start", 1e-4), settings.get("beta_end", 0.02), settings["num_train_timesteps"]
    match settings.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, num, dtype=dtype)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, num, dtype=dtype) ** 2


def build(scheduler_class=diffusers.DDIMScheduler, **settings):
    """(scheduler of diffusers, noise schedule, config.sample, prediction) of a scheduler_config.json."""
    settings = dict(num_train_timesteps=T, rescale_betas_zero_snr=True) | settings
    scheduler = scheduler_class(**settings)
    fields, prediction, sample = diffusers_scheduler.noise_fields(
        {"_class_name": scheduler_class.__name__, **scheduler.config}, "test"
    )
    section = config_lib.section(config_lib.ScheduleConfig, smoke_values()["schedule"] | fields, "test")
    return scheduler, config_lib.noise_schedule(section), sample, prediction


def in_float64(scheduler):
    """The same scheduler with the alphas_cumprod that diffusers' own functions give in float64."""
    settings = dict(scheduler.config)
    alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(betas(settings, torch.float64)), dim=0)
    # 1 - (1 - 0) is exact, so the last beta is 1 and alpha_bar[T] is 0 in float64 too.
    end = torch.tensor(1.0, dtype=torch.float64) if settings["set_alpha_to_one"] else alphas_cumprod[0]
    scheduler.alphas_cumprod = alphas_cumprod
    scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = end
    return scheduler


def process_of(noise_schedule, sample, steps, eta=0.0):
    """The sampling process of config.sample, with the step of DDIMScheduler: t -> t - T // S."""
    values = smoke_values()["sample"] | sample | {"steps": steps, "eta": eta, "sampler": "ddim", "fixed_stride": True}
    return config_lib.process(config_lib.section(config_lib.SampleConfig, values, "test"), noise_schedule)


def denoiser_of(noise_schedule, sample, prediction, keep_eps=True):
    """The denoiser of `Toy`, with x_0 bounded as the scheduler does."""
    lowest = jax.tree.map(jnp.asarray, noise_schedule.level(1))
    model = Denoiser(Toy(), {}, prediction, lowest=lowest)
    if not sample["clip_x0"]:
        return model
    if sample["clip_quantile"]:
        return gaussian.threshold_x0(model, sample["clip_quantile"], sample["clip_range"], keep_eps=keep_eps)
    return gaussian.clip_x0(model, -sample["clip_range"], sample["clip_range"], keep_eps=keep_eps)


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 4, 3))


# --- the schedule and the timesteps ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(num_train_timesteps=400, beta_start=1e-3, beta_end=0.03),
        dict(num_train_timesteps=2, beta_start=0.1, beta_end=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler_class", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_alpha_bar_is_that_of_diffusers(settings, scheduler_class):
    """In float64 of diffusers' own function, and as its scheduler has it in float32."""
    scheduler, noise_schedule, _, _ = build(scheduler_class, prediction_type="v_prediction", **settings)
    alpha_bar = noise_schedule.alpha_bar
    assert alpha_bar[-1] == 0 and alpha_bar[0] == 1 and (np.diff(alpha_bar) < 0).all()

    settings = dict(scheduler.config)
    exact = torch.cumprod(1 - rescale_zero_terminal_snr(betas(settings, torch.float64)), dim=0).numpy()
    np.testing.assert_allclose(alpha_bar[1:], exact, rtol=1e-11, atol=0)

    # In float32 t products have a relative error of at most t eps. sqrt(alpha_bar) - sqrt(alpha_bar[T]) loses digits
    # where the two are close. Then come the products of the rescaled alphas.
    plain = torch.cumprod(1 - betas(settings, torch.float64), dim=0).numpy()[:-1] ** 0.5
    last = torch.cumprod(1 - betas(settings, torch.float64), dim=0).numpy()[-1] ** 0.5
    num = settings["num_train_timesteps"]
    bound = num * FLOAT32 * (1 + (plain + last) / (plain - last))
    single = scheduler.alphas_cumprod.numpy()
    assert single[-1] == 0
    assert (np.abs(single[:-1] / alpha_bar[1:-1] - 1) < bound).all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_train_steps", [T, 250])
def test_timesteps_are_those_of_diffusers(spacing, num_train_steps):
    """t and s of every step, for every S in 1..50."""
    scheduler, noise_schedule, sample, _ = build(
        timestep_spacing=spacing, prediction_type="v_prediction", num_train_timesteps=num_train_steps
    )
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        transitions = process_of(noise_schedule, sample, steps).transitions
        times = scheduler.timesteps.numpy()
        assert len(times) == steps
        np.testing.assert_array_equal(transitions.t, times + 1, err_msg=str(steps))
        before = times - num_train_steps // steps  # prev_timestep of diffusers; below 0 is the clean image
        np.testing.assert_array_equal(transitions.s, np.maximum(before + 1, 0), err_msg=str(steps))
        # Only leading starts below T, where alpha_bar is not 0.
        assert (transitions.alpha_bar_t == 0).any() == (spacing != "leading" and (spacing, steps) != ("linspace", 1))


# --- every step ---

BOUNDS = {
    "not clipped": dict(clip_sample=False),
    "clipped": dict(clip_sample=True),
    "range": dict(clip_sample=True, clip_sample_range=0.4),
    "thresholding": dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
    "to level 1": dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1),  # as in Stable Diffusion
}


class Steps(NamedTuple):
    """Steps of diffusers' loops. Every leaf has one row per step."""

    t: np.ndarray  # (N,), counts 1..T
    s: np.ndarray
    eta: np.ndarray
    x_t: np.ndarray  # (N, B, ...)
    noise: np.ndarray
    x_s: np.ndarray
    x_0: np.ndarray  # predicted


def steps_of_diffusers(scheduler, corrected):
    """The `Steps` of its loops for every S in STEPS and every eta, without those from a level to itself, which ddim_jax
    does not have. corrected: whether eps is recomputed from the clipped x_0.
    """
    rng, rows = np.random.default_rng(1), []
    end = 0 if scheduler.config.set_alpha_to_one else 1
    for steps, eta in itertools.product(STEPS, (0.0, 0.5, 1.0)):
        scheduler.set_timesteps(steps)
        x_t = torch.as_tensor(images())
        for time in scheduler.timesteps.numpy():
            noise = torch.as_tensor(rng.normal(size=x_t.shape))
            options = dict(eta=eta, use_clipped_model_output=corrected, variance_noise=noise if eta else None)
            x_s, x_0 = scheduler.step(function(x_t, float(time), torch), time, x_t, **options, return_dict=False)
            t, s = time + 1, max(time + 1 - T // steps, end)
            if not x_s.isfinite().all():
                # 1 - alpha_bar_s - sigma^2 is 0 here, and diffusers takes the root of its rounding error, which may be
                # negative. What remains of Eq. (12) are the x_0 and the noise.
                assert eta == 1 and t == T
                alpha_bar = scheduler.alphas_cumprod[s - 1] if s else torch.tensor(1.0)
                x_s = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * noise
            if t != s:
                rows.append(Steps(t, s, eta, *(value.numpy() for value in (x_t, noise, x_s, x_0))))
            x_t = x_s
    return Steps(*(np.asarray(column) for column in zip(*rows, strict=True)))


@jax.jit
def all_steps(model, transitions, eta, x_t, noise):
    """(x_s, x_0, eps) of one step of DDIM in every row."""

    def one(transition, eta, x_t, noise):
        x_s, _ = samplers.DDIM(eta).step(x_t, (), transition, model, noise)
        return x_s, *model(x_t, transition.level_t)

    return jax.vmap(one)(transitions, eta, x_t, noise)


def check_steps(model, noise_schedule, steps, error):
    """Compares the steps with those of ddim_jax. error: (N,), the error of alpha_bar in the `steps`."""
    transitions = trajectory.transitions(noise_schedule, steps.t, steps.s)
    x_s, x_0, eps = all_steps(model, jax.tree.map(jnp.asarray, transitions), steps.eta, steps.x_t, steps.noise)
    largest = lambda values: np.abs(values).max(axis=tuple(range(1, values.ndim)))
    size = np.max([largest(values) for values in (steps.x_t, x_s, x_0, eps)], axis=0)
    assert np.isfinite(size).all()
    # sqrt(alpha_bar), sqrt(1 - alpha_bar) and the coefficient of the direction are roots. The error of a root is large
    # where the value is small: that coefficient is 0 at eta = 1 from T.
    of_root = lambda value: np.sqrt(value + error) - np.sqrt(value)
    direction = np.maximum(transitions.one_minus_alpha_bar_s - steps.eta**2 * transitions.posterior_variance, 0)
    for name, found, expected, value in [
        ("x_s", x_s, steps.x_s, direction),
        ("x_0", x_0, steps.x_0, transitions.alpha_bar_t),
    ]:
        tolerance = size * (4 * error + of_root(value) + of_root(transitions.one_minus_alpha_bar_t))
        ratio = largest(found - expected) / tolerance
        worst = ratio.argmax()
        assert ratio[worst] <= 1, (name, steps.t[worst], steps.s[worst], steps.eta[worst], ratio[worst])


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_every_step_is_that_of_diffusers(prediction_type, spacing, bound, x64):
    """From the same x_t with the same noise: in float64 to its precision, and an unchanged scheduler to that of its
    alphas_cumprod, which are in float32.
    """
    settings = dict(prediction_type=prediction_type, timestep_spacing=spacing, **BOUNDS[bound])
    scheduler, noise_schedule, sample, prediction = build(**settings)
    assert prediction == PREDICTIONS[prediction_type]
    error = np.abs(np.append(1, scheduler.alphas_cumprod.numpy()) - noise_schedule.alpha_bar)
    for corrected in (False, True) if sample["clip_x0"] else (False,):
        model = denoiser_of(noise_schedule, sample, prediction, keep_eps=not corrected)
        steps = steps_of_diffusers(scheduler, corrected)
        check_steps(model, noise_schedule, steps, 4 * (error[steps.t] + error[steps.s] + FLOAT32))
        steps = steps_of_diffusers(in_float64(build(**settings)[0]), corrected)
        check_steps(model, noise_schedule, steps, np.full(steps.t.shape, 4 * np.finfo(np.float64).eps))


@pytest.mark.parametrize("bound", ["not clipped", "clipped", "thresholding"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_whole_loops_with_noise(prediction_type, spacing, bound, eta, x64):
    """All x_t of `samplers.trajectory` are those of diffusers' loop with the noise of the same keys, and are finite in
    float32 and float16 too.
    """
    settings = dict(prediction_type=prediction_type, timestep_spacing=spacing, **BOUNDS[bound])
    scheduler, noise_schedule, sample, prediction = build(**settings)
    in_float64(scheduler).set_timesteps(10)
    model, process = denoiser_of(noise_schedule, sample, prediction), process_of(noise_schedule, sample, 10, eta)
    keys, x = samplers.image_keys(jax.random.key(0), jnp.arange(2)), images()
    run = lambda x: samplers.trajectory(process.sampler, model, process.transitions, x, keys)[1]
    expected = [torch.as_tensor(x)]
    for time in scheduler.timesteps.numpy():
        noise = torch.as_tensor(np.asarray(gaussian.noise(keys, jnp.int32(time + 1), x.shape[1:], jnp.float64)))
        output = function(expected[-1], float(time), torch)
        step = scheduler.step(output, time, expected[-1], eta=eta, variance_noise=noise if eta else None)
        expected.append(step.prev_sample)
    # At eta = 1 the coefficient of the direction from T is the root of a rounding error, see `check_steps`.
    np.testing.assert_allclose(run(x).x, torch.stack(expected), rtol=0, atol=1e-6 if eta == 1 else 1e-11)
    for dtype in (jnp.float32, jnp.float16):
        assert all(np.isfinite(leaf).all() for leaf in run(jnp.asarray(x, dtype)))


def test_at_eta_one_the_first_step_from_T_forgets_x_T(x64):
    """alpha_bar[T] = 0: x_T is noise only, sigma^2 = 1 - alpha_bar_s, and x_s does not depend on x_T given x_0."""
    _, noise_schedule, _, _ = build(prediction_type="v_prediction")
    transitions = trajectory.descend(noise_schedule, trajectory.trailing(T, 7))
    first = jax.tree.map(lambda leaf: leaf[0], transitions)
    assert first.t == T and first.alpha_bar_t == 0
    assert gaussian.max_eta(transitions) == 1
    x_0, x_T, noise = images(0), images(1), images(2)
    model = gaussian.Denoise(lambda x, level: gaussian.Prediction(x_0, x))
    for eta in (0.0, 0.6, 1.0):
        x_s, _ = samplers.DDIM(eta).step(x_T, (), first, model, noise)
        expected = np.sqrt(first.one_minus_alpha_bar_s) * (eta * noise + np.sqrt(1 - eta**2) * x_T)
        np.testing.assert_allclose(x_s, np.sqrt(first.alpha_bar_s) * x_0 + expected, rtol=0, atol=1e-12)


# --- encoding ---


class Gaussian(nn.Module):
    """The optimal network for images N(0.3, 0.5^2). At alpha_bar = 0 its x_0 is the mean."""

    prediction: str
    alpha_bar: tuple

    def __call__(self, x, time, labels=None, train=False):
        alpha_bar = jnp.asarray(self.alpha_bar, x.dtype)[time + 1].reshape(-1, *[1] * (x.ndim - 1))
        signal, variance = jnp.sqrt(alpha_bar), alpha_bar * STD**2 + 1 - alpha_bar
        x_0 = MEAN + signal * STD**2 / variance * (x - signal * MEAN)
        eps = jnp.sqrt(1 - alpha_bar) / variance * (x - signal * MEAN)
        return x_0 if self.prediction == "x0" else signal * eps - jnp.sqrt(1 - alpha_bar) * x_0


MEAN, STD = 0.3, 0.5


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_encoding_and_the_round_trip_converge(prediction_type, x64):
    """Eq. (14) keeps (x - sqrt(alpha_bar) mean) / std(x), so x_T = (x_0 - mean) / std. Both errors fall like 1 / S."""
    _, noise_schedule, _, prediction = build(prediction_type=prediction_type)
    lowest = jax.tree.map(jnp.asarray, noise_schedule.level(1))
    model = Denoiser(Gaussian(prediction, tuple(noise_schedule.alpha_bar)), {}, prediction, lowest=lowest)
    x_0 = MEAN + STD * images()
    errors = []
    for steps in (25, 50, 100, 200):
        tau = trajectory.trailing(T, steps)
        x_T = samplers.invert(model, noise_schedule, tau, x_0)
        back = samplers.integrate(samplers.ddim(), model, trajectory.descend(noise_schedule, tau), x_T)
        errors.append([np.abs(x_T - images()).max(), np.abs(back - x_0).max()])
    ratios = np.divide(errors[:-1], errors[1:])
    assert (np.abs(ratios - 2) < 0.15).all(), ratios


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_encoding_and_decoding_are_finite(prediction_type, clip):
    """In float32, for every spacing, whether the network is evaluated at the current or at the next timestep."""
    for spacing in SPACINGS:
        _, noise_schedule, sample, prediction = build(
            prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=clip
        )
        model = denoiser_of(noise_schedule, sample, prediction)
        for steps in (1, 5, 50):
            process = process_of(noise_schedule, sample, steps)
            x_0 = np.tanh(images()).astype(np.float32)
            for evaluate_at in ("current", "next"):
                x_T = samplers.invert(model, noise_schedule, process.tau, x_0, evaluate_at, stride=process.stride)
                _, path = samplers.trajectory(process.sampler, model, process.transitions, x_T)
                assert all(np.isfinite(leaf).all() for leaf in path), (spacing, steps, evaluate_at)


@pytest.mark.parametrize("scheduler_class", ["DDIMScheduler", "DDPMScheduler"])
def test_a_network_that_predicts_eps_is_refused(scheduler_class):
    values = {"_class_name": scheduler_class, "rescale_betas_zero_snr": True}
    with raises(CheckpointError, "here", "rescale_betas_zero_snr", "True", "sample", "v_prediction"):
        diffusers_scheduler.noise_fields(values, "here")
    with raises(CheckpointError, "here", "rescale_betas_zero_snr"):
        diffusers_scheduler.noise_fields(values | {"predict_epsilon": True}, "here")
    fields, prediction, _ = diffusers_scheduler.noise_fields(values | {"predict_epsilon": False}, "here")
    assert fields["zero_terminal_snr"] and prediction == "x0"
