"""The smallest networks that have every kind of layer, with random parameters, for all tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs import default, smoke
from ddim_jax import config as config_lib
from ddim_jax import gaussian
from ddim_jax.models import network as network_lib
from ddim_jax.models.dit import DiT
from ddim_jax.models.unet import UNet
from ddim_jax.utils import sharding

MODEL = dict(image_size=8, image_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1)
MODEL |= dict(attention_resolutions=(4,), groups=4)
# One resolution compiles in seconds. It has every kind of layer but the change of resolution.
ONE_LEVEL = dict(channel_mult=(1,), attention_resolutions=())

UNET = UNet(**MODEL, dropout=0.0)
UNET_ONE_LEVEL = UNET.clone(**ONE_LEVEL, dropout=0.1)
DIT = DiT(image_size=8, image_channels=1, depth=1, hidden_size=16, num_heads=2)

# The options of a command for the smoke config with one resolution.
SMOKE = ("--config", "configs/smoke.py", *(f"--config.model.{field}={value}" for field, value in ONE_LEVEL.items()))


def smoke_values():
    """The values of the smoke config, as a run saves them: tau and clip_x0 are set."""
    values = smoke.get_config().to_dict()
    config = config_lib.parse(values)
    values["sample"] |= {"tau": config.sample.tau, "clip_x0": config.sample.clip_x0}
    return values


def smoke_config():
    return config_lib.parse(smoke.get_config().to_dict())


def make(eta=0.5, num_images=11, batch_size=8, **model):
    """(the smoke config with these fields of config.sample and config.model, its sampling process)"""
    config = smoke_config()
    config = dataclasses.replace(
        config,
        sample=dataclasses.replace(config.sample, eta=eta, num_images=num_images, batch_size=batch_size),
        model=dataclasses.replace(config.model, **model),
    )
    return config, config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))


def random_params(network, seed=0, scale=1.0):
    """Random parameters of a module or a Network: kernels of variance scale^2 / fan_in, vectors around 1.

    The initial parameters would give the output 0.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = max(np.prod(leaf.shape[:-1]), 1)
        return jnp.asarray(scale * rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32) + (leaf.ndim == 1)

    return jax.tree.map(draw, network_lib.param_shapes(network))


def sampling_config(found, **sample):
    """A config for two images of a checkpoint, with these fields of config.sample."""
    values = default.get_config().to_dict()
    values |= {"name": "test", "model": dataclasses.asdict(found.model), "schedule": dataclasses.asdict(found.schedule)}
    values["sample"] |= {**found.sample, "num_images": 2, "batch_size": 2, **sample}
    return config_lib.typed(values)


def params_of(config):
    """Random parameters for config.model, as NumPy arrays. The output has about unit size: images vary and stay in
    range.
    """
    return jax.tree.map(np.asarray, random_params(config_lib.network(config.model), scale=0.3))


def pipeline(config, mesh, process=None, params=None):
    """The Pipeline of a config with these parameters on the mesh. Default: `params_of`."""
    params = params_of(config) if params is None else params
    return config_lib.pipeline(config, sharding.put_replicated(mesh, params), mesh, process)


def model_for(sampler, model):
    """The model, with a predicted variance if the sampler needs one."""
    return gaussian.with_variance(model, 0.4) if getattr(sampler, "needs_variance", False) else model
