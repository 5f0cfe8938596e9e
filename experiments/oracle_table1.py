"""Table 1 without a network: the optimal eps in closed form, so that the only error is that of the sampler.

    python -m experiments.oracle_table1 --config configs/digits.py --config.sample.tau=quadratic --out DIR

There are three data distributions whose optimal eps is known, each with a distance between samples and data:

- `gaussian`: N(0.3, 0.5^2). The samples are Gaussian too, and the Wasserstein-2 distance is computed exactly.
- `ring`: eight narrow Gaussians in the plane. The distance is the sliced Wasserstein-2 distance between --points
  samples and as many points of the data.
- `digits`: narrow Gaussians around 100 real digits. The distance is the Fréchet distance, in the features of the digits
  classifier, between --count samples and as many images of the data.

`floor` is the distance between two independent sets of the data. The schedule, the tau and the seed are those of the
config. The paper uses quadratic tau for CIFAR-10.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import data, gaussian, oracle, samplers
from ddim_jax.config import fingerprint
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.evaluation import digits_classifier, frechet
from ddim_jax.registry import lookup
from ddim_jax.samplers import SamplingProcess
from ddim_jax.schedule import NoiseSchedule
from ddim_jax.utils import images, output_folder
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common, grid
from experiments.common import Cell

DIRECTIONS = 32
BATCH = 10_000
PICTURED = 4000
GAUSSIAN = (0.3, 0.5)  # mean, std

OPTIONS = {
    "out": common.OPTIONS["out"],
    "etas": grid.OPTIONS["etas"],
    "steps": ("10,20,50,100", "The columns: values of S."),
    "data": ("gaussian,ring,digits", "The distributions."),
    "points": ("100000", "The number of samples of the ring."),
    "count": ("20000", "The number of samples of the digits."),
    "images": (None, "The earlier name of --count."),
}


class Mixture(NamedTuple):
    """A mixture of Gaussians N(means[k], std^2 I) with equal weights."""

    means: np.ndarray  # (K, ...) float32
    std: float

    def eps_fn(self, noise_schedule: NoiseSchedule) -> Any:
        return oracle.mixture(noise_schedule, self.means, np.full(len(self.means), self.std, np.float32))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        means = self.means[rng.integers(len(self.means), size=count)]
        return means + self.std * rng.standard_normal(means.shape, np.float32)


def ring() -> Mixture:
    angle = np.arange(8) * np.pi / 4
    return Mixture(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32), 0.05)


def digits() -> Mixture:
    return Mixture(to_unit(data.load("digits")[np.arange(100)].images), 0.1)


MIXTURES: dict[str, Callable[[], Mixture]] = {"ring": ring, "digits": digits}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    counts = {
        "ring": common.ints("points", options.points, 2)[0],
        "digits": common.ints("count", options.images or options.count, 2)[0],
    }
    names = options.data.split(",")
    with error_context("--data"):
        for name in names:
            lookup({"gaussian": None, **MIXTURES}, name)
    if not options.etas:
        raise ConfigError("--etas: must have at least one value")
    noise_schedule = config_lib.noise_schedule(config.schedule)
    places = grid.places(options.etas, options.steps)
    processes = [grid.process_of(grid.at(options, place, 1)) for place in places]
    out = common.begin(
        options,
        [*common.WRITTEN, "distances.png"],
        experiment="oracle_table1",
        schedule=dataclasses.asdict(config.schedule),
        tau=config.sample.tau,
        seed=config.sample.seed,
        counts=counts,
    )
    key = jax.random.key(config.sample.seed)

    @functools.cache
    def reference(name: str) -> tuple[Any, float]:
        """The statistics of the data, and the distance between two independent sets of the data."""
        sets = [MIXTURES[name]().draw(np.random.default_rng(seed), counts[name]) for seed in (1, 2)]
        first, second = map(DISTANCES[name].statistics, sets)
        return first, DISTANCES[name].between(first, second)

    def measure(name: str, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        if name == "gaussian":
            mean, std = law(process, oracle.gaussian(noise_schedule, *GAUSSIAN))
            return {"distance": float(np.hypot(mean - GAUSSIAN[0], std - GAUSSIAN[1])), "floor": 0.0}
        mixture = MIXTURES[name]()
        drawn = draw(process, mixture.eps_fn(noise_schedule), key, mixture.means.shape[1:], counts[name])
        with folder.writing("first.npz") as file:
            np.savez(file, x=drawn[:PICTURED])
        of_data, floor = reference(name)
        return {"distance": DISTANCES[name].between(of_data, DISTANCES[name].statistics(drawn)), "floor": floor}

    rows = common.run(
        out,
        [
            Cell(
                {**place, "data": name},
                {"process": fingerprint.of_process(process.sampler, process.transitions, (1,))},
                len(process.tau) + 20,
                functools.partial(measure, name, process),
            )
            for name in names
            for place, process in zip(places, processes, strict=True)
        ],
    )
    common.write_table(out, rows)
    common.plot(out / "distances.png", functools.partial(draw_distances, rows), (12, 4))
    common.plot(out / "table.png", functools.partial(draw_samples, rows, out), (8, 8))
    lines, columns, table = grid.laid_out(rows, ["eta", "S", "data"])
    body = [[line, *(row and row["distance"] for row in cells)] for line, cells in zip(lines, table, strict=True)]
    floors = {row["data"]: row["floor"] for row in rows if row["floor"]}
    last = "".join(f"\nTwo sets of the data ({name}): {floor:.3g}\n" for name, floor in floors.items())
    text = common.markdown(["distance", *(f"S = {S}" for S in columns)], body)
    common.finish(out, text + last, [*common.FILES, "distances.png"])


def law(process: SamplingProcess, eps_fn: Any) -> tuple[float, float]:
    """The exact mean and standard deviation of the last x, for an eps that is affine in x. Each step is then
    `x_s = a x_t + b + c z`; the coefficients a, b, c follow from its values at three points.
    """
    probe = jnp.array([[0.0], [1.0], [0.0]])
    noise = jnp.array([[0.0], [0.0], [1.0]]) if process.sampler.stochastic else None
    mean, variance, denoise = 0.0, 1.0, gaussian.as_denoise(eps_fn)
    for i in range(len(process.tau) - 1):
        transition = jax.tree.map(lambda leaf, i=i: leaf[i], process.transitions)
        x_s, _ = process.sampler.step(probe, process.sampler.init(probe), transition, denoise, noise)
        b, one, noisy = np.asarray(x_s, np.float64)[:, 0]
        a, c = one - b, noisy - b
        mean, variance = a * mean + b, a**2 * variance + c**2
    return mean, float(np.sqrt(variance))


def draw(process: SamplingProcess, eps_fn: Any, key: Any, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Draws samples (count, ...) of a process in batches. Sample i depends only on (key, i)."""
    parts = []
    for begin in range(0, count, BATCH):
        keys = samplers.image_keys(key, np.arange(begin, min(begin + BATCH, count)))
        x_T = samplers.initial_noise(keys, shape)
        x_0 = samplers.integrate(
            process.sampler, eps_fn, process.transitions, x_T, keys if process.sampler.stochastic else None
        )
        parts.append(np.asarray(x_0))
    return np.concatenate(parts)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The sliced Wasserstein-2 distance `sqrt(E_u W_2(u.a, u.b)^2)` over unit vectors u. a, b: (N, ...), of the same
    size N. In one dimension, the optimal transport pairs the sorted points.
    """
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    directions = np.random.default_rng(0).normal(size=(a.shape[1], DIRECTIONS)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    difference = np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)
    return float(np.sqrt(np.square(difference, dtype=np.float64).mean()))


class Distance(NamedTuple):
    """A distance between two sets of points or images."""

    statistics: Callable[[np.ndarray], Any]  # of a set (N, ...)
    between: Callable[[Any, Any], float]  # two statistics -> their distance


@functools.cache
def classifier_fn() -> Any:
    return digits_classifier.open_network().feature_fn


def classifier_moments(x: np.ndarray) -> frechet.Moments:
    """The moments of the classifier's features of images (N, 8, 8, 1) in [-1, 1]."""
    parts = [classifier_fn()(to_uint8(x[i : i + BATCH])).features for i in range(0, len(x), BATCH)]
    return frechet.moments(np.concatenate(parts))


DISTANCES = {
    "ring": Distance(lambda x: x, sliced_wasserstein),
    "digits": Distance(classifier_moments, frechet.distance),
}


def draw_distances(rows: list[dict[str, Any]], figure: Any) -> None:
    """Plots the distance over S: one panel for each distribution, one curve for each eta."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        of_data = [row for row in rows if row["data"] == name]
        for eta in dict.fromkeys(row["eta"] for row in of_data):
            line = [(row["S"], row["distance"]) for row in of_data if row["eta"] == eta]
            axes.plot(*zip(*line, strict=True), "o-", label="sigma-hat" if eta == "hat" else f"eta {eta}")
        if of_data[0]["floor"]:
            axes.axhline(of_data[0]["floor"], color="grey", linestyle=":", label="two sets of data")
        axes.set(title=name, xlabel="S", ylabel="distance", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def draw_samples(rows: list[dict[str, Any]], out: output_folder.Folder, figure: Any) -> None:
    """Plots samples of the ring, or of the digits if there is no ring: rows of eta and columns of S."""
    name = next((name for name in MIXTURES if any(row["data"] == name for row in rows)), None)
    lines, columns, cells = grid.laid_out([row for row in rows if row["data"] == name], ["eta", "S"])
    panels = figure.subplots(len(lines), len(columns), squeeze=False)
    for panels_of_line, rows_of_line, label in zip(panels, cells, lines, strict=True):
        for axes, row, S in zip(panels_of_line, rows_of_line, columns, strict=True):
            axes.set(aspect="equal", xticks=[], yticks=[])
            axes.set_title(f"{label}, S = {S}", fontsize=8)
            if row is not None:
                folder = out / common.folder_of({axis: row[axis] for axis in ("eta", "S", "data")})
                x = images.open_npz(folder / "first.npz")["x"]
                if name == "ring":
                    axes.scatter(*x.T, s=0.2, linewidths=0)
                    axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
                else:
                    axes.imshow(images.grid(to_uint8(x[:16]))[..., 0], cmap="gray")


if __name__ == "__main__":
    common.start(main, OPTIONS)
