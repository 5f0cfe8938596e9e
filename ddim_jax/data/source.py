"""The interface of a data set: random access to images by index."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

MOST_CLASSES = 1 << 20


class Batch(NamedTuple):
    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray | None  # (B,) int32, None for a data set without labels


class Source(Protocol):
    """A data set with random access. `source[indices]`, with indices (B,) in 0..len(source) - 1, is a Batch."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # 0 if there are no labels
    crop: str  # how the published images were cropped and resized, as text
    jpegs: int  # the number of images that are JPEG files
    instant: bool  # whether reading is so fast that no prefetching is needed

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Batch: ...


def check_labels(labels: np.ndarray, num_classes: int = MOST_CLASSES, numbers: np.ndarray | None = None) -> None:
    """ValueError, naming the first wrong one, unless all labels (N,) are integers in 0..num_classes - 1. numbers: the
    indices of their images, (N,), for the message; default: 0..N - 1.
    """
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    bad = np.flatnonzero(~((labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))))
    if len(bad):
        image = bad[0] if numbers is None else numbers[bad[0]]
        raise ValueError(
            f"labels must be integers in 0..{num_classes - 1}, the label of image {image} is {labels[bad[0]]}"
        )


def fingerprint(source: Source) -> str:
    """A digest that identifies a data set: the SHA-256 of its length, its image shape and 64 evenly spaced images."""
    digest = hashlib.sha256(f"{len(source)} {tuple(map(int, source.image_shape))}".encode())
    digest.update(source[np.unique(np.linspace(0, len(source) - 1, 64).astype(int))].images.tobytes())
    return digest.hexdigest()
