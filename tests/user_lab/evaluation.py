"""A feature network and a metric of the user."""

import jax.numpy as jnp
import numpy as np

from ddim_jax.evaluation.feature_network import Output, feature_network
from ddim_jax.evaluation.metrics import Metric


def pixel_rows(weights=""):
    """The means of rows and columns."""

    def features(params, images):
        x = images[..., 0].astype(jnp.float32) * params["scale"]
        return Output(jnp.concatenate([x.mean(1), x.mean(2)], axis=1), jnp.stack([x.max((1, 2)), -x.max((1, 2))], 1))

    return feature_network("pixel_rows", features, {"scale": np.float32(1 / 255)})


def mean_distance():
    compute = lambda samples, reference: {
        "mean_distance": float(np.abs(samples.features.mean(0) - reference.features.mean(0)).max())
    }
    return Metric(("features",), ("features",), compute)
