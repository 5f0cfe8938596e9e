"""Table 1 without a network: the optimal eps in closed form, so that what is seen is the sampler's error alone.

    python -m experiments.oracle_table1 --config configs/digits.py --config.sample.tau=quadratic --out DIR

Three distributions whose optimal eps is known, each with its own distance between samples and data:

- `gaussian`: N(0.3, 0.5^2). The samples are Gaussian too; the Wasserstein-2 distance of the two is computed exactly.
- `ring`: eight narrow Gaussians in the plane. The sliced Wasserstein-2 distance of --points samples and as many points
  of the data.
- `digits`: narrow Gaussians around 100 real digits. The Fréchet distance, in the digits classifier's features, of
  --count samples and as many images of the data.

`floor` is the distance between two sets of the data. Of the config it takes the schedule, the tau and the seed. The
paper used quadratic tau for CIFAR-10.
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
SHOWN = 4000
GAUSSIAN = (0.3, 0.5)  # mean, std

OPTIONS = {
    "out": common.OPTIONS["out"],
    "etas": grid.OPTIONS["etas"],
    "steps": ("10,20,50,100", "The columns: values of S."),
    "data": ("gaussian,ring,digits", "The distributions."),
    "points": ("100000", "Samples of the ring."),
    "count": ("20000", "Samples of the digits."),
    "images": (None, "The earlier name of --count."),
}


class Mixture(NamedTuple):
    """Gaussians N(means[k], std^2 I), each equally likely."""

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
        raise ConfigError("--etas: needs a value")
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
    def real(name: str) -> tuple[Any, float]:
        """What samples are compared with, and the distance of the data from itself."""
        sets = [MIXTURES[name]().draw(np.random.default_rng(seed), counts[name]) for seed in (1, 2)]
        told, again = map(DISTANCES[name].read, sets)
        return told, DISTANCES[name].between(told, again)

    def measure(name: str, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        if name == "gaussian":
            mean, std = law(process, oracle.gaussian(noise_schedule, *GAUSSIAN))
            return {"distance": float(np.hypot(mean - GAUSSIAN[0], std - GAUSSIAN[1])), "floor": 0.0}
        mixture = MIXTURES[name]()
        drawn = draw(process, mixture.eps_fn(noise_schedule), key, mixture.means.shape[1:], counts[name])
        with folder.writing("first.npz") as file:
            np.savez(file, x=drawn[:SHOWN])
        told, floor = real(name)
        return {"distance": DISTANCES[name].between(told, DISTANCES[name].read(drawn)), "floor": floor}

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
    shown = [[line, *(row and row["distance"] for row in cells)] for line, cells in zip(lines, table, strict=True)]
    floors = {row["data"]: row["floor"] for row in rows if row["floor"]}
    said = "".join(f"\nTwo sets of the data ({name}): {floor:.3g}\n" for name, floor in floors.items())
    text = common.markdown(["distance", *(f"S = {S}" for S in columns)], shown)
    common.finish(out, text + said, [*common.FILES, "distances.png"])


def law(process: SamplingProcess, eps_fn: Any) -> tuple[float, float]:
    """Mean and standard deviation of the last x, exactly, for an eps that is affine in x: so is each step then,
    `x_s = a x_t + b + c z`, and a, b, c are read off it.
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
    """Samples (count, ...) of a process, batch by batch; sample i by (key, i) alone."""
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
    """`sqrt(E_u W_2(u.a, u.b)^2)` over unit vectors u, for two sets (N, ...) of as many points: in one dimension the
    optimal transport pairs them by size.
    """
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    directions = np.random.default_rng(0).normal(size=(a.shape[1], DIRECTIONS)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    apart = np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)
    return float(np.sqrt(np.square(apart, dtype=np.float64).mean()))


class Distance(NamedTuple):
    read: Callable[[np.ndarray], Any]  # what is needed of a set (N, ...)
    between: Callable[[Any, Any], float]


@functools.cache
def judge() -> Any:
    return digits_classifier.open_network().feature_fn


def judged(x: np.ndarray) -> frechet.Moments:
    """Moments of the classifier's features of images (N, 8, 8, 1) in [-1, 1]."""
    parts = [judge()(to_uint8(x[i : i + BATCH])).features for i in range(0, len(x), BATCH)]
    return frechet.moments(np.concatenate(parts))


DISTANCES = {
    "ring": Distance(lambda x: x, sliced_wasserstein),
    "digits": Distance(judged, frechet.distance),
}


def draw_distances(rows: list[dict[str, Any]], figure: Any) -> None:
    names = list(dict.fromkeys(row["data"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["data"] == name]
        for eta in dict.fromkeys(row["eta"] for row in own):
            line = [(row["S"], row["distance"]) for row in own if row["eta"] == eta]
            axes.plot(*zip(*line, strict=True), "o-", label="sigma-hat" if eta == "hat" else f"eta {eta}")
        if own[0]["floor"]:
            axes.axhline(own[0]["floor"], color="grey", linestyle=":", label="two sets of data")
        axes.set(title=name, xlabel="S", ylabel="distance", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def draw_samples(rows: list[dict[str, Any]], out: output_folder.Folder, figure: Any) -> None:
    """Samples of the ring, or else of the digits: rows of eta and columns of S."""
    name = next((name for name in MIXTURES if any(row["data"] == name for row in rows)), None)
    lines, columns, cells = grid.laid_out([row for row in rows if row["data"] == name], ["eta", "S"])
    for line, own, word in zip(figure.subplots(len(lines), len(columns), squeeze=False), cells, lines, strict=True):
        for axes, row, S in zip(line, own, columns, strict=True):
            axes.set(aspect="equal", xticks=[], yticks=[])
            axes.set_title(f"{word}, S = {S}", fontsize=8)
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
