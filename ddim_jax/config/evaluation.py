"""Builds the evaluator of a config: the feature network, the metrics, and the real images or their statistics."""

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
    """The fields of About in the comma-separated value of --accept. ConfigError for an unknown field."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    fields = {field.name: None for field in dataclasses.fields(About)}
    with error_context("--accept"):
        for name in names:
            lookup(fields, name)
    return names


def metric_names(config: Config) -> list[str]:
    """The names in config.evaluate.metrics. ConfigError for an unknown metric."""
    names = [name.strip() for name in config.evaluate.metrics.split(",")]
    with error_context("config.evaluate.metrics"):
        for name in names:
            metrics_lib.metric(name)
    return names


def open_network(config: Config) -> FeatureNetwork:
    """The feature network of config.evaluate. ConfigError if the network or its weights cannot be loaded."""
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
    """The images of --samples. ConfigError if there are fewer than config.evaluate.num_images."""
    source = load_images(path, "--samples")
    warn_of_jpegs(source, path)
    check_enough(source, config, path)
    return source


def check_enough(source: Source, config: Config, path: str) -> None:
    """ConfigError if the source has fewer than config.evaluate.num_images images. path: for the message."""
    if len(source) < config.evaluate.num_images:
        raise ConfigError(
            f"{path} holds {len(source)} images, but config.evaluate.num_images is {config.evaluate.num_images}"
        )


def load_images(path: str, option: str) -> Source:
    """The images of a folder or an .npz file. ConfigError that names the option if they cannot be read."""
    if not pathlib.Path(path).exists():
        raise ConfigError(f"{option}: there is no file or folder {path}")
    with error_context(option):
        return data.load("folder" if pathlib.Path(path).is_dir() else "npz", path)


def real_images(config: Config) -> tuple[Source, str]:
    """The real images, and the field that names them: config.evaluate.reference if it is set, else config.data.
    ConfigError if they cannot be read, or if the reference holds statistics.
    """
    evaluate = config.evaluate
    if not evaluate.reference:
        with error_context("config.data"):
            return data.load(config.data.name, config.data.path, evaluate.split, config.data.options), "config.data"
    field, path = "config.evaluate.reference", pathlib.Path(evaluate.reference)
    if path.exists():
        with error_context(field):
            is_statistics = holds_statistics(path)
        if is_statistics:
            raise ConfigError(f"{field}: must hold images, {path} holds statistics")
    return load_images(evaluate.reference, field), field


def warn_of_jpegs(source: Source, path: str) -> None:
    """Prints a warning if images of the source are JPEG files."""
    if source.jpegs:
        warn(
            f"{source.jpegs} of {len(source)} images of {path} are JPEG files: compression artifacts change every "
            f"metric (for the same samples, FID was 2.50 with PNG references and 5.80 with JPEG); use lossless files"
        )


def warn(message: str) -> None:
    """Prints a warning to stderr in the main process."""
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

    network: the feature network, see `open_network`.
    shape: (H, W, C) of the samples, None without samples.
    accepted: the fields of About in which statistics from a file may differ from the samples.
    stored: a file in which the computed statistics are cached.

    ConfigError if the reference does not match the samples.
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
        is_statistics = path is not None and holds_statistics(path)
        real = reference.load(path) if is_statistics else None
    if accepted and not is_statistics:
        raise ConfigError("--accept: has no effect unless config.evaluate.reference is a file of statistics")
    if is_statistics and real.about is None:
        warn(f"{path} has no metadata (data, crop, resize, feature network): its origin is unknown")
    if not is_statistics and stored is not None and stored.exists():
        real = _stored(stored)
    if real is None:
        real = _compute(config, path, network, metrics, mesh, shape)
        if stored is not None and sharding.is_main_process():
            reference.save(stored, real)
    with error_context("config.evaluate.reference"):
        metrics_lib.check(metrics, real.features)
        if shape is not None and len(real.features.moments.mean) != size:
            raise ConfigError(
                f"{path or 'the data set'} does not match the samples: it has {len(real.features.moments.mean)} "
                f"features, {network.name} has {size}"
            )
        if shape is not None and real.about is not None:
            expected = _expected_about(config, network, shape) if is_statistics else real.about
            expected = dataclasses.replace(expected, resolution=reference.resolution(shape))
            if different := reference.difference(real.about, expected, accepted):
                raise ConfigError(f"{path or 'the data set'} does not match the samples: {different}")
    return Evaluator(network, metrics, real, mesh, evaluate.batch_size)


def holds_statistics(path: pathlib.Path) -> bool:
    """True for a file of statistics, False for a folder or an .npz file of images. ValueError for any other file."""
    files.check_regular(path)
    return path.is_file() and reference.is_statistics(path)


def _stored(path: pathlib.Path) -> Reference | None:
    """The statistics that an earlier command cached. None, after a warning, if the file is damaged."""
    try:
        return reference.load(path)
    except ValueError as error:
        warn(f"{error}; the statistics are recomputed")
        return None


def _compute(
    config: Config,
    path: pathlib.Path | None,
    network: FeatureNetwork,
    metrics: list[str],
    mesh: Mesh,
    shape: tuple[int, int, int] | None,
) -> Reference:
    """The statistics of the images at `path`, or of config.data if it is None. ConfigError if the shape of the images
    is not `shape`, that of the samples.
    """
    if path is not None:
        source, name, split = load_images(str(path), "config.evaluate.reference"), str(path.name), None
    else:
        name, split = _data_name(config), config.evaluate.split
        with error_context("config.data"):
            source = data.load(config.data.name, config.data.path, split, config.data.options)
    if shape is not None and source.image_shape != shape:
        raise ConfigError(
            f"the real images ({name}) are {reference.resolution(source.image_shape)}, the samples "
            f"{reference.resolution(shape)}"
        )
    warn_of_jpegs(source, name)
    with error_context("the real images"):
        features = features_lib.extract(
            network,
            source,
            mesh,
            config.evaluate.batch_size,
            metrics_lib.needed_of_reference(metrics),
            doing="real images",
        )
    return Reference(features, reference.about(source, reference.resolution(source.image_shape), network, name, split))


def _expected_about(config: Config, network: FeatureNetwork, shape: tuple[int, int, int]) -> About:
    """The metadata that statistics must have to match samples of this config. If the data set is not available on this
    machine, its crop and count are None.
    """
    try:
        source = data.load(config.data.name, config.data.path, config.evaluate.split, config.data.options)
    except ValueError:
        source = None
    return reference.about(source, reference.resolution(shape), network, _data_name(config), config.evaluate.split)


def _data_name(config: Config) -> str | None:
    """The name of config.data in the metadata of statistics: the base name of a folder or a file, the name in
    tensorflow-datasets for "tfds", else config.data.name.
    """
    if config.data.name in ("folder", "npz"):
        return pathlib.Path(config.data.path).name or None
    return config.data.path if config.data.name == "tfds" else config.data.name
