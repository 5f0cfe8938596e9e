"""Every form of the 3x3 convolution equals the direct one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT

from ddim_jax.models import convolution


def arrays(batch, height, width, channels, features, dtype=np.float64):
    rng = np.random.default_rng(0)
    x, kernel, gradient = (
        rng.normal(size=shape).astype(dtype)
        for shape in (
            (batch, height, width, channels),
            (3, 3, channels, features),
            (batch, height, width, features),
        )
    )
    return jnp.asarray(x), jnp.asarray(kernel / np.sqrt(9 * channels).astype(dtype)), jnp.asarray(gradient)


@pytest.mark.parametrize("form", [convolution.winograd, convolution.patched])
@pytest.mark.parametrize("size", [(2, 3, 4, 5, 3), (1, 1, 1, 2, 4)])
def test_the_form_and_its_gradients_equal_the_convolution(form, size):
    batch, height, width, channels, features = size
    with jax.enable_x64(True):
        x, kernel, gradient = arrays(batch, 2 * height, 2 * width, channels, features)
        (output, vjp), (expected, expected_vjp) = (jax.vjp(f, x, kernel) for f in (form, convolution.direct))
        np.testing.assert_allclose(output, expected, atol=1e-12)
        for a, b in zip(vjp(gradient), expected_vjp(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 3, 4, 5, 3), (1, 1, 1, 2, 4)])
def test_the_folded_convolution_equals_upsampling_and_convolution(size):
    """Outputs and gradients."""
    batch, height, width, channels, features = size
    upsampled = lambda x, kernel: convolution.direct(jnp.kron(x, jnp.ones((1, 2, 2, 1))), kernel)
    with jax.enable_x64(True):
        _, kernel, gradient = arrays(batch, 2 * height, 2 * width, channels, features)
        x = arrays(batch, height, width, channels, features)[0]
        (output, vjp), (expected, expected_vjp) = (jax.vjp(f, x, kernel) for f in (convolution.folded, upsampled))
        np.testing.assert_allclose(output, expected, atol=1e-12)
        for a, b in zip(vjp(gradient), expected_vjp(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 16])
def test_the_form_of_the_upsampled_convolution_depends_on_its_size(batch):
    """One 3x3 convolution for a small batch, four 2x2 convolutions for a large one."""
    x, kernel, _ = arrays(batch, 8, 8, 3, 5, np.float32)
    np.testing.assert_allclose(convolution.convolve_upsampled(x, kernel), convolution.folded(x, kernel), atol=1e-5)
    text = jax.jit(convolution.convolve_upsampled).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == (4 if batch == 16 else 1)


def test_winograd_keeps_the_precision():
    """Its float32 error against float64 is at most twice that of the direct form, in outputs and gradients."""
    x, kernel, gradient = arrays(4, 16, 16, 128, 128, np.float32)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, kernel, gradient)]
        exact, vjp = jax.vjp(convolution.direct, *wide[:2])
        exact = [np.asarray(a) for a in (exact, *vjp(wide[2]))]

    def errors(form):
        out, vjp = jax.vjp(form, x, kernel)
        return [np.sqrt(np.square(a - b).mean()) for a, b in zip((out, *vjp(gradient)), exact, strict=True)]

    for winograd, direct in zip(errors(convolution.winograd), errors(convolution.direct), strict=True):
        assert winograd < 2 * direct


@pytest.mark.parametrize(
    "shape, features, dtype, form",
    [
        ((16, 16, 16, 128), 128, jnp.float32, "products"),
        ((16, 16, 16, 128), 128, jnp.bfloat16, "convolution"),
        ((16, 16, 16, 64), 128, jnp.float32, "convolution"),
        ((16, 15, 16, 128), 128, jnp.float32, "convolution"),
        ((2, 16, 16, 128), 128, jnp.float32, "convolution"),
        ((1, 16, 16, 128), 128, jnp.float32, "products"),
        ((1, 15, 15, 128), 128, jnp.float32, "products"),
        ((1, 15, 15, 128), 64, jnp.float32, "convolution"),
    ],
)
def test_a_cpu_uses_matrix_products_where_they_are_faster(shape, features, dtype, form):
    args = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((3, 3, shape[-1], features), dtype)
    traced = jax.jit(convolution.convolve).trace(*args)
    cpu, tpu = traced.lower().as_text(), traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("dot_general" in cpu) == (form == "products") != ("stablehlo.convolution" in cpu)
    assert "dot_general" not in tpu and "stablehlo.convolution" in tpu


@pytest.mark.parametrize(
    "batch, width, environment, devices",
    [
        (128, 64, {}, None),
        (3, 64, {}, 1),
        (128, 256, {}, 1),
        (128, 64, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (128, 64, {"XLA_FLAGS": "FIVE"}, 5),
    ],
)
def test_a_cpu_is_split_into_devices_for_a_small_network(batch, width, environment, devices):
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {
        name: value.replace("FIVE", "--xla_force_host_platform_device_count=5") for name, value in environment.items()
    }
    split = f"from ddim_jax.utils.sharding import split_cpu_into_devices; split_cpu_into_devices({batch}, {width})"
    code = f"{split}; import jax; print(jax.device_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0))
    assert int(done.stdout) == (devices or (4 if cores >= 4 else 2 if cores >= 2 else 1))
