"""Likelihood bounds of real images."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from ddim_jax import sampling
from ddim_jax.data import Source
from ddim_jax.sampling import Pipeline
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import error_context


def bits_per_dim(pipeline: Pipeline, source: Source, count: int, eta: float, where: str) -> np.ndarray:
    """J_sigma, Eq. (11), in bits per dimension, of each of the first `count` images: (count,) float64.

    It is an upper bound of the negative log-likelihood, for the tau of the pipeline and eta > 0. ConfigError, which
    begins with `where`, if an image cannot be read, and if a bound is not finite.
    """
    bits = []
    indices = list(sampling.batch_indices(pipeline.batch_size, pipeline.mesh, 0, count))
    for index in tqdm(indices, "bits_per_dim", unit="batch", disable=not sharding.is_main_process()):
        with error_context(where):
            images, labels = sampling.real_batch(pipeline, source, index, count)
        nats = sampling.likelihood_bound(pipeline, images, index, labels, eta)
        bits.append(nats[: count - index[0]] / (np.log(2) * np.prod(source.image_shape)))
    return np.concatenate(bits)
