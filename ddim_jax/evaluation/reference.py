"""Reference statistics of real images, saved with metadata about the images and the feature network."""

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

VERSION = 1  # of the definition of the statistics


@dataclasses.dataclass(frozen=True)
class About:
    """The metadata of statistics. None means not known: `difference` ignores the field."""

    data: str | None  # the name of the data set
    split: str | None  # "train" or "test", None for images that are not a data set
    crop: str | None  # how the published images were cropped and resized
    count: int | None  # the number of images
    resolution: str  # height x width x channels
    resize: str  # how the feature network resizes its input
    features: str  # the name of the feature network
    weights: str  # SHA-256 of its parameters
    version: int = VERSION


REQUIRED = {field.name for field in dataclasses.fields(About) if field.default is dataclasses.MISSING}


class Reference(NamedTuple):
    features: ImageFeatures
    about: About | None  # None if the file has no metadata


def about(
    source: Source | None, resolution: str, network: FeatureNetwork, data: str | None, split: str | None
) -> About:
    """The metadata of the statistics of a source. source: None for a data set that is not available; crop and count are
    then not known.
    """
    crop, count = (None, None) if source is None else (source.crop, len(source))
    return About(data, split, crop, count, resolution, network.resize, network.name, network.weights)


def resolution(shape: tuple[int, ...]) -> str:
    """The text for `About.resolution`."""
    return "x".join(map(str, shape))


def save(path: pathlib.Path, reference: Reference) -> None:
    """Writes an .npz with `mu` and `sigma`, which are also the names in other programs, `about` as JSON, and the
    features if they are not None.
    """
    features = reference.features
    arrays = {"mu": features.moments.mean, "sigma": features.moments.cov, "features": features.features}
    with files.replacing(path) as file:
        np.savez(
            file,
            about=np.array(json.dumps(dataclasses.asdict(reference.about))),
            **{name: array for name, array in arrays.items() if array is not None},
        )


def is_statistics(path: pathlib.Path) -> bool:
    """Whether an .npz holds statistics, and not images. ValueError if it cannot be read."""
    return bool({"mu", "sigma", "about"} & {*images.npz_names(path)})


def load(path: pathlib.Path) -> Reference:
    """Reads statistics that `save` wrote, or `mu` and `sigma` of another program, without metadata. ValueError if the
    file holds neither, or is damaged.
    """
    try:
        return _reference(images.open_npz(path, verify=True))
    except ValueError as error:
        raise ValueError(
            f"{files.printable(str(path))} cannot be read as statistics: {error}; --save_reference writes new ones"
        ) from error


def _reference(arrays: Mapping[str, np.ndarray]) -> Reference:
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError("it must hold mu and sigma")
    metadata = _about(arrays["about"]) if "about" in arrays else None
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mu must be (D,) and sigma (D, D), got {mu.shape} and {sigma.shape}")
    if features is not None and (features.ndim != 2 or features.shape[1:] != mu.shape):
        raise ValueError(f"features must be (N, {len(mu)}), got {features.shape}")
    if features is not None and metadata is not None and metadata.count != len(features):
        raise ValueError(f"it must have the features of {metadata.count} images, got {len(features)}")
    files.check_memory(3 * 8 * sigma.size + (0 if features is None else features.nbytes), "its arrays")
    for name, array in (("mu", mu), ("sigma", sigma), ("features", features)):
        if array is not None and (array.dtype.kind not in "fiu" or not np.isfinite(array).all()):
            raise ValueError(f"{name} must be numbers, all finite, got {array.dtype}")
    mu, sigma = np.array(mu, np.float64), np.array(sigma, np.float64)
    features = None if features is None else np.array(features)
    if np.diagonal(sigma).min() < 0 or not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-5 * sigma.max()):
        raise ValueError("sigma must be a covariance: symmetric, and no variance below 0")
    count = len(features) if features is not None else metadata.count if metadata else None
    return Reference(ImageFeatures(count or 0, Moments(mu, sigma), features), metadata)


def _about(array: np.ndarray) -> About:
    """The metadata from an array with JSON. ValueError if it is not of this kind."""
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError(f"about must be a string, got {array.dtype} {array.shape}")
    values = files.parse_json(str(array), "about")
    types = typing.get_type_hints(About)
    if not isinstance(values, dict) or not {*values} <= {*types} or not REQUIRED <= {*values}:
        raise ValueError(f"about must have the fields {', '.join(types)}, got {files.shown(values)}")
    for name, value in values.items():
        if not isinstance(value, types[name]) or isinstance(value, bool) or (name == "count" and (value or 1) < 1):
            raise ValueError(f"{name} must be of type {types[name]}, got {files.shown(value)}")
    return About(**values)


def difference(saved: About, current: About, accepted: Collection[str] = ()) -> str | None:
    """The first difference between the metadata of saved statistics and the metadata that the samples require, as text;
    None if there is none. Fields in `accepted`, and fields that are None in one of them, are not compared.
    """
    for field in dataclasses.fields(About):
        a, b = getattr(saved, field.name), getattr(current, field.name)
        if a is not None and b is not None and a != b and field.name not in accepted:
            text = f"{field.name} is {files.shown(a)}, expected {files.shown(b)}"
            return f"{text} (--accept {field.name} allows this difference)"
    return None
