"""Statistics of real images in a file that says what they are."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
import zlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ddim_jax import files
from ddim_jax.data import Source
from ddim_jax.evaluation.feature_network import FeatureNetwork
from ddim_jax.evaluation.frechet import Moments
from ddim_jax.evaluation.judge import Judged

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


class Reference(NamedTuple):
    judged: Judged
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
    judged = reference.judged
    arrays = {"mu": judged.moments.mean, "sigma": judged.moments.cov, "features": judged.features}
    with files.replacing(path) as file:
        np.savez(
            file,
            about=np.array(json.dumps(dataclasses.asdict(reference.about))),
            **{name: array for name, array in arrays.items() if array is not None},
        )


def load(path: pathlib.Path) -> Reference:
    """What `save` wrote, or `mu` and `sigma` of somebody else's, about which nothing is known. ValueError if it is
    neither.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name in ("mu", "sigma", "features", "about")}
        known = About(**json.loads(str(found["about"]))) if "about" in found else None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as statistics: {error}") from error
    if not {"mu", "sigma"} <= found.keys():
        raise ValueError(f"{path} holds no statistics: there is no mu and sigma in it")
    mu, sigma = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu must be (D,) and sigma (D, D), all finite, got {mu.shape} and {sigma.shape}")
    features = found.get("features")
    count = known.count if known else 0
    return Reference(Judged(count, Moments(mu, sigma), features), known)


def difference(theirs: About, ours: About, accepted: Collection[str] = ()) -> str | None:
    """How statistics differ from those that belong to the samples, in the first field that is not accepted and that
    both know; None if they do not.
    """
    for field in dataclasses.fields(About):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if a is not None and b is not None and a != b and field.name not in accepted:
            return f"{field.name} is {a!r} there, {b!r} here (to compare all the same, --accept {field.name})"
    return None
