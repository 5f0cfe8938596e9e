"""Changes of a config that need less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A changed config."""

    options: str  # the options that change it
    config: Any
    images: int  # that the program has in memory at once, over all devices


def changes(config: Any, program: str, count: int) -> Iterator[Change]:
    """Changes of a config with which a program needs less memory, the one that costs least first. config: a Config.
    program: "train" or "sample". count: of devices.
    """
    return smaller_batches(config, count) if program == "sample" else training(config, count)


def smaller_batches(config: Any, count: int) -> Iterator[Change]:
    """Batches of the sampler, each half as large as the one before."""
    batch = config.sample.batch_size
    while batch > count:
        batch = -(-batch // (2 * count)) * count
        sample = dataclasses.replace(config.sample, batch_size=batch)
        yield Change(f"--config.sample.batch_size={batch}", dataclasses.replace(config, sample=sample), batch)


def training(config: Any, count: int) -> Iterator[Change]:
    """More accumulation steps, which compute the same update; then also rematerialisation, a third more operations;
    then also sharded parameters and optimizer state, more communication. The images of one step halve until each device
    has one.
    """
    train = config.train
    for fsdp in (False, True) if count > 1 and config.mesh.fsdp == 1 else (False,):
        for remat in (False, True) if getattr(config.model, "remat", None) is False else (False,):
            accumulate = train.accumulate
            while train.batch_size % (accumulate * count) == 0:
                options = [f"--config.train.accumulate={accumulate}"] * (accumulate != train.accumulate)
                options += ["--config.model.remat=True"] * remat + [f"--config.mesh.fsdp={count}"] * fsdp
                changed = dataclasses.replace(
                    config,
                    train=dataclasses.replace(train, accumulate=accumulate),
                    model=dataclasses.replace(config.model, remat=True) if remat else config.model,
                    mesh=dataclasses.replace(config.mesh, data=-1, fsdp=count) if fsdp else config.mesh,
                )
                if options:
                    yield Change(" ".join(options), changed, train.batch_size // accumulate)
                accumulate *= 2
