"""The likelihood of real images under a network."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from ddim_jax import sampling
from ddim_jax.data import Source
from ddim_jax.sampling import Pipeline
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import error_context


def bits_per_dim(pipeline: Pipeline, source: Source, count: int, eta: float, where: str) -> np.ndarray:
    """Of each of the first `count` images: J_sigma, Eq. (11), in bits a value, (count,) float64; an upper bound of the
    negative log-likelihood under the pipeline's tau and eta > 0. ConfigError, beginning with `where`, for images that
    cannot be read, and where a bound is not finite.
    """
    bits = []
    indices = list(sampling.batch_indices(pipeline.batch_size, pipeline.mesh, 0, count))
    for index in tqdm(indices, "bits_per_dim", unit="batch", disable=not sharding.is_main_process()):
        with error_context(where):
            images, labels = sampling.real_batch(pipeline, source, index, count)
        nats = sampling.likelihood_bound(pipeline, images, index, labels, eta)
        bits.append(nats[: count - index[0]] / (np.log(2) * np.prod(source.image_shape)))
    return np.concatenate(bits)
