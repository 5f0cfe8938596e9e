"""The evaluator that a config describes: a feature network, metrics, and real images or statistics of them."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Collection

from jax.sharding import Mesh

from ddim_jax import data
from ddim_jax.config.schema import Config
from ddim_jax.data import Source
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.evaluation import reference
from ddim_jax.evaluation.evaluator import Evaluator
from ddim_jax.evaluation.feature_network import FeatureNetwork
from ddim_jax.evaluation.reference import About, Reference
from ddim_jax.registry import lookup
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError, error_context


def accepted_fields(text: str) -> list[str]:
    """The fields of About that --accept lists; ConfigError for one that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    fields = {field.name: None for field in dataclasses.fields(About)}
    with error_context("--accept"):
        for name in names:
            lookup(fields, name)
    return names


def metric_names(config: Config) -> list[str]:
    """The names in config.evaluate.metrics; ConfigError for one that is none."""
    names = [name.strip() for name in config.evaluate.metrics.split(",")]
    with error_context("config.evaluate.metrics"):
        for name in names:
            metrics_lib.metric(name)
    return names


def open_network(config: Config) -> FeatureNetwork:
    """The network that extracts features; ConfigError if it, or its weights, cannot be had."""
    path = pathlib.Path(config.evaluate.weights)
    if config.evaluate.weights and path.exists():
        with error_context("config.evaluate.weights"):
            files.check_regular(path)
    try:
        with error_context("config.evaluate.features"):
            return features_lib.open_features(config.evaluate.features, config.evaluate.weights)
    except CheckpointError as error:
        raise ConfigError(f"config.evaluate.weights: {error}") from error


def load_samples(path: str, config: Config) -> Source:
    """The images at a path; ConfigError if there are fewer than config.evaluate.num_images."""
    source = load_images(path, "--samples")
    warn_of_jpegs(source, path)
    check_enough(source, config, path)
    return source


def check_enough(source: Source, config: Config, path: str) -> None:
    if len(source) < config.evaluate.num_images:
        raise ConfigError(
            f"{path} holds {len(source)} images, and config.evaluate.num_images asks for {config.evaluate.num_images}"
        )


def load_images(path: str, option: str) -> Source:
    if not pathlib.Path(path).exists():
        raise ConfigError(f"{option}: there is no file or folder {path}")
    with error_context(option):
        return data.load("folder" if pathlib.Path(path).is_dir() else "npz", path)


def warn_of_jpegs(source: Source, path: str) -> None:
    if source.jpegs:
        warn(
            f"{source.jpegs} of {len(source)} images of {path} are JPEG files: what compression leaves moves every "
            f"distance (for the same samples FID was 2.50 with PNG references and 5.80 with JPEG); use lossless files"
        )


def warn(message: str) -> None:
    if sharding.is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def evaluator(
    config: Config,
    network: FeatureNetwork,
    mesh: Mesh,
    shape: tuple[int, int, int] | None,
    accepted: Collection[str] = (),
    stored: pathlib.Path | None = None,
) -> Evaluator:
    """The evaluator of config.evaluate.

    shape: (H, W, C) of the samples, None if there are none. accepted: fields of About in which statistics of a file
    may differ. stored: a file of this command's own that keeps what has once been computed. ConfigError where the
    reference does not belong to the samples.
    """
    metrics = metric_names(config)
    evaluate = config.evaluate
    if shape is not None:
        with error_context("config.evaluate.features"):
            size = features_lib.num_features(network, shape)
    path = pathlib.Path(evaluate.reference) if evaluate.reference else None
    if path is not None and not path.exists():
        raise ConfigError(f"config.evaluate.reference: there is no file or folder {path}")
    with error_context("config.evaluate.reference"):
        statistics = path is not None and holds_statistics(path)
        found = reference.load(path) if statistics else None
    if accepted and not statistics:
        raise ConfigError("--accept: has no effect where config.evaluate.reference is not a file of statistics")
    if statistics and found.about is None:
        warn(f"{path} does not say what it is of (data, crop, resize, feature network): its origin is unknown")
    if not statistics and stored is not None and stored.exists():
        found = _stored(stored)
    if found is None:
        found = _compute(config, path, network, metrics, mesh, shape)
        if stored is not None and sharding.is_main_process():
            reference.save(stored, found)
    with error_context("config.evaluate.reference"):
        metrics_lib.check(metrics, found.features)
        if shape is not None and len(found.features.moments.mean) != size:
            raise ConfigError(
                f"{path or 'the data set'} does not belong to the samples: it has {len(found.features.moments.mean)} "
                f"features, {network.name} has {size}"
            )
        if shape is not None and found.about is not None:
            expected = _expected_about(config, network, shape) if statistics else found.about
            expected = dataclasses.replace(expected, resolution=reference.resolution(shape))
            if different := reference.difference(found.about, expected, accepted):
                raise ConfigError(f"{path or 'the data set'} does not belong to the samples: {different}")
    return Evaluator(network, metrics, found, mesh, evaluate.batch_size)


def holds_statistics(path: pathlib.Path) -> bool:
    """Whether a reference is statistics; a folder, and an .npz of images, is not. ValueError for anything else."""
    files.check_regular(path)
    return path.is_file() and reference.is_there(path)


def _stored(path: pathlib.Path) -> Reference | None:
    """Statistics that an earlier command stored to save time; None, with a warning, if they are damaged."""
    try:
        return reference.load(path)
    except ValueError as error:
        warn(f"{error}; they are computed again")
        return None


def _compute(
    config: Config,
    path: pathlib.Path | None,
    network: FeatureNetwork,
    metrics: list[str],
    mesh: Mesh,
    shape: tuple[int, int, int] | None,
) -> Reference:
    """Statistics of the images at a path, or of those of config.data, which must be of the samples' shape."""
    if path is not None:
        source, name, split = load_images(str(path), "config.evaluate.reference"), str(path.name), None
    else:
        name, split = _data_name(config), config.evaluate.split
        with error_context("config.data"):
            source = data.load(config.data.name, config.data.path, split)
    if shape is not None and source.image_shape != shape:
        raise ConfigError(
            f"the real images ({name}) are {reference.resolution(source.image_shape)}, the samples "
            f"{reference.resolution(shape)}"
        )
    warn_of_jpegs(source, name)
    with error_context("the real images"):
        found = features_lib.extract(
            network,
            source,
            mesh,
            config.evaluate.batch_size,
            metrics_lib.needed_of_reference(metrics),
            doing="real images",
        )
    return Reference(found, reference.about(source, reference.resolution(source.image_shape), network, name, split))


def _expected_about(config: Config, network: FeatureNetwork, shape: tuple[int, int, int]) -> About:
    """What statistics that belong to samples of this config are of; of the data set as much as is known here."""
    try:
        source = data.load(config.data.name, config.data.path, config.evaluate.split)
    except ValueError:
        source = None
    return reference.about(source, reference.resolution(shape), network, _data_name(config), config.evaluate.split)


def _data_name(config: Config) -> str | None:
    """The name of config.data in statistics. A folder's or a file's is its own, without where it lies, and that of a
    data set of tensorflow-datasets the one it has there.
    """
    if config.data.name in ("folder", "npz"):
        return pathlib.Path(config.data.path).name or None
    return config.data.path if config.data.name == "tfds" else config.data.name
