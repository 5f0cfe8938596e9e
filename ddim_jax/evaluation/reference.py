"""Statistics of real images in a file that says what they are."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from ddim_jax.data import Source
from ddim_jax.evaluation.feature_network import FeatureNetwork
from ddim_jax.evaluation.features import ImageFeatures
from ddim_jax.evaluation.frechet import Moments
from ddim_jax.utils import files, images

VERSION = 1  # of what the numbers in the file mean


@dataclasses.dataclass(frozen=True)
class About:
    """What statistics are of. None: not known, and not compared."""

    data: str | None  # the data set
    split: str | None  # train | test | none, for images that are no data set
    crop: str | None  # what was cut out of the images as they are published
    count: int | None  # how many images
    resolution: str  # height x width x channels
    resize: str  # what the feature network does to them first
    features: str  # its name
    weights: str  # SHA-256 of its parameters
    version: int = VERSION


REQUIRED = {field.name for field in dataclasses.fields(About) if field.default is dataclasses.MISSING}


class Reference(NamedTuple):
    features: ImageFeatures
    about: About | None  # None: nobody said


def about(
    source: Source | None, resolution: str, network: FeatureNetwork, data: str | None, split: str | None
) -> About:
    """What statistics of a source are of. Without one, what is known of those of a data set that is not here."""
    crop, count = (None, None) if source is None else (source.crop, len(source))
    return About(data, split, crop, count, resolution, network.resize, network.name, network.weights)


def resolution(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def save(path: pathlib.Path, reference: Reference) -> None:
    """Writes an .npz: `mu` and `sigma` under the names that others read, `about` as JSON, and what else was kept."""
    kept = reference.features
    arrays = {"mu": kept.moments.mean, "sigma": kept.moments.cov, "features": kept.features}
    with files.replacing(path) as file:
        np.savez(
            file,
            about=np.array(json.dumps(dataclasses.asdict(reference.about))),
            **{name: array for name, array in arrays.items() if array is not None},
        )


def is_there(path: pathlib.Path) -> bool:
    """Whether an .npz holds statistics, and not images. ValueError if it is none."""
    return bool({"mu", "sigma", "about"} & {*images.npz_names(path)})


def load(path: pathlib.Path) -> Reference:
    """What `save` wrote, or `mu` and `sigma` of somebody else's, about which nothing is known. ValueError if it is
    neither, or is damaged.
    """
    try:
        return _reference(images.open_npz(path, verify=True))
    except ValueError as error:
        raise ValueError(
            f"{files.printable(str(path))} cannot be read as statistics: {error}; --save_reference makes them anew"
        ) from error


def _reference(arrays: Mapping[str, np.ndarray]) -> Reference:
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError("there is no mu and sigma in it")
    known = _about(arrays["about"]) if "about" in arrays else None
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mu must be (D,) and sigma (D, D), got {mu.shape} and {sigma.shape}")
    if features is not None and (features.ndim != 2 or features.shape[1:] != mu.shape):
        raise ValueError(f"features must be (N, {len(mu)}), got {features.shape}")
    if features is not None and known is not None and known.count != len(features):
        raise ValueError(f"it is of {known.count} images and has the features of {len(features)}")
    files.check_memory(3 * 8 * sigma.size + (0 if features is None else features.nbytes), "what is in it")
    for name, array in (("mu", mu), ("sigma", sigma), ("features", features)):
        if array is not None and (array.dtype.kind not in "fiu" or not np.isfinite(array).all()):
            raise ValueError(f"{name} must be numbers, all finite, got {array.dtype}")
    mu, sigma = np.array(mu, np.float64), np.array(sigma, np.float64)
    features = None if features is None else np.array(features)
    if np.diagonal(sigma).min() < 0 or not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-5 * sigma.max()):
        raise ValueError("sigma must be a covariance: symmetric, and no variance below 0")
    count = len(features) if features is not None else known.count if known else None
    return Reference(ImageFeatures(count or 0, Moments(mu, sigma), features), known)


def _about(array: np.ndarray) -> About:
    """What the JSON in an array says. ValueError where it is not that."""
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError(f"about must be a text, got {array.dtype} {array.shape}")
    values = files.parse_json(str(array), "about")
    types = typing.get_type_hints(About)
    if not isinstance(values, dict) or not {*values} <= {*types} or not REQUIRED <= {*values}:
        raise ValueError(f"about must have the fields {', '.join(types)}, got {files.shown(values)}")
    for name, value in values.items():
        if not isinstance(value, types[name]) or isinstance(value, bool) or (name == "count" and (value or 1) < 1):
            raise ValueError(f"{name} must be of type {types[name]}, got {files.shown(value)}")
    return About(**values)


def difference(theirs: About, ours: About, accepted: Collection[str] = ()) -> str | None:
    """How statistics differ from those that belong to the samples, in the first field that is not accepted and that
    both know; None if they do not.
    """
    for field in dataclasses.fields(About):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if a is not None and b is not None and a != b and field.name not in accepted:
            different = f"{field.name} is {files.shown(a)} there, {files.shown(b)} here"
            return f"{different} (to compare all the same, --accept {field.name})"
    return None
