"""Real images by name: `load` gives a data set, `batches` the endless stream of uint8 batches that training reads.

A data set is a random-access source: `len(source)` and `source[indices] -> Batch`. To add one, write a function
`(path, split) -> Source` and put it into DATASETS.
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
