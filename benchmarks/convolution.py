"""The 3x3 convolution in two formulations, by default at the shapes of the CIFAR-10 network.

    python -m benchmarks.convolution --batch 16

Times of the forward pass, and of the forward pass with both gradients, in milliseconds. The two forms are the direct
convolution of XLA and Winograd's (`ddim_jax/models/convolution.py`). The rate of one matrix product is printed for
comparison.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import statistics
import types

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import cli
from ddim_jax.models import convolution
from ddim_jax.planning.measure import matrix_product_rate, timed
from experiments import common

OPTIONS = {
    "batch": ("16", "The batch size."),
    "shapes": ("32x128x128,16x256x256,8x256x256,4x256x256,32x256x128", "Height and width, input and output channels."),
}
FORMS = {"direct": convolution.direct, "winograd": convolution.winograd}


def main(options: types.SimpleNamespace) -> None:
    (batch,) = common.ints("batch", options.batch)
    print(
        f"batch {batch}, {jax.devices()[0].device_kind}, jax {jax.__version__}; one matrix product: "
        f"{matrix_product_rate(jnp.float32) / 1e9:,.0f} GFLOP/s\n"
    )
    head = ["H = W, C -> K", *(f"{name}, {what}" for what in ("ms", "GFLOP/s", "ms with gradients") for name in FORMS)]
    print(common.markdown(head, [row(batch, *map(int, shape.split("x"))) for shape in options.shapes.split(",")]))


def row(batch: int, size: int, channels: int, features: int) -> list[str]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, kernel = draw(batch, size, size, channels), draw(3, 3, channels, features)
    operations = 2 * batch * size**2 * 9 * channels * features
    forward = {name: median(jax.jit(form), x, kernel) for name, form in FORMS.items()}
    gradients_of = lambda form: jax.jit(jax.grad(lambda x, kernel: jnp.sum(form(x, kernel) ** 2), (0, 1)))
    gradients = {name: median(gradients_of(form), x, kernel) for name, form in FORMS.items()}
    return [
        f"{size}, {channels} -> {features}",
        *(f"{1e3 * seconds:.2f}" for seconds in forward.values()),
        *(f"{operations / seconds / 1e9:.0f}" for seconds in forward.values()),
        *(f"{1e3 * seconds:.2f}" for seconds in gradients.values()),
    ]


def median(run, *args) -> float:
    return statistics.median(timed(lambda: run(*args)))


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
