"""What a data set is: images at random, by their numbers."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

MOST_CLASSES = 1 << 20


class Batch(NamedTuple):
    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray | None  # (B,) int32, None where the data set has none


class Source(Protocol):
    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # 0 where there are no labels
    crop: str  # what was cut out of the images as they are published, in words
    jpegs: int  # how many of the images are JPEG files
    instant: bool  # whether reading takes too little time to be done ahead

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Batch: ...


def check_labels(labels: np.ndarray, num_classes: int = MOST_CLASSES, numbers: np.ndarray | None = None) -> None:
    """ValueError, naming the first that is not, unless labels (N,) are whole numbers in 0 .. num_classes - 1. numbers:
    those of the images that they are of, (N,); default: 0 .. N - 1.
    """
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    bad = np.flatnonzero(~((labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))))
    if len(bad):
        image = bad[0] if numbers is None else numbers[bad[0]]
        raise ValueError(
            f"labels must be whole numbers in 0..{num_classes - 1}, that of image {image} is {labels[bad[0]]}"
        )


def fingerprint(source: Source) -> str:
    """What tells one data set from another: SHA-256 of its length, its shape and 64 images at even places."""
    digest = hashlib.sha256(f"{len(source)} {tuple(map(int, source.image_shape))}".encode())
    digest.update(source[np.unique(np.linspace(0, len(source) - 1, 64).astype(int))].images.tobytes())
    return digest.hexdigest()
