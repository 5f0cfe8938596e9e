"""Data sets of real images: `load` returns a data set by its name, `batches` the infinite stream of uint8 batches for
training.

A data set is a source with random access: `len(source)` and `source[indices] -> Batch`. To add a data set, write a
function `(path, split) -> Source` and add it to DATASETS. Its further arguments, with defaults, are the options of
`load`.
"""

from ddim_jax.data.batches import Plan, batches
from ddim_jax.data.source import Batch, Source, check_labels, fingerprint
from ddim_jax.data.sources import DATASETS, SPLITS, ArraySource, in_memory, load

__all__ = [
    "DATASETS",
    "SPLITS",
    "ArraySource",
    "Batch",
    "Plan",
    "Source",
    "batches",
    "check_labels",
    "fingerprint",
    "in_memory",
    "load",
]
