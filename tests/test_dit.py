import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import raises
from tiny import DIT, random_params

from ddim_jax.models import network as network_lib
from ddim_jax.models.dit import TIME_FEATURES, DiT, attention, modulated_norm
from ddim_jax.models.network import as_network
from ddim_jax.models.unet import sinusoid

GUIDED = DIT.clone(num_classes=3, label_dropout=0.3)


@functools.partial(jax.jit, static_argnames=("model", "train"))  # all tests share it, so each model compiles once
def apply(model, params, x, time, labels=None, train=False, key=None):
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, x, jnp.broadcast_to(time, len(x)), labels, train=train, rngs=rngs)


def inputs(model, batch, dtype=np.float32):
    rng = np.random.default_rng(batch)
    x = rng.normal(size=(batch, model.image_size, model.image_size, model.image_channels)).astype(dtype)
    labels = rng.integers(0, model.num_classes + 1, batch).astype(np.int32) if model.num_classes else None
    return x, labels


def difference(output, reference):
    return float(np.abs(np.asarray(output) - np.asarray(reference)).max() / np.abs(np.asarray(reference)).max())


# --- against diffusers' network ---

VARIANTS = {
    "pixels": dict(sample_size=4, in_channels=3, patch_size=1, num_layers=1, num_attention_heads=2)
    | dict(attention_head_dim=8, num_embeds_ada_norm=5),
    "patches": dict(sample_size=6, in_channels=1, patch_size=2, num_layers=3, num_attention_heads=3)
    | dict(attention_head_dim=4, num_embeds_ada_norm=10),
}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")
    torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(params=VARIANTS)
def variant(request, torch):
    return with_diffusers(torch, **VARIANTS[request.param])


def with_diffusers(torch, **settings):
    """(diffusers' network with random weights, the DiT, its params). diffusers repeats the embedding of time and class
    in every block; the paper's network has one. Two constants also differ and are set here: epsilon of the second norm
    of a block, and the lowest frequency of the timestep.
    """
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(norm_eps=1e-6, **settings).eval()
    shared = net.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in net.transformer_blocks:
        block.norm1.emb = shared
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
    config = net.config
    model = DiT(
        image_size=config.sample_size,
        image_channels=config.in_channels,
        patch_size=config.patch_size,
        depth=config.num_layers,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        num_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        label_dropout=shared.class_embedder.dropout_prob,
    )
    model.check()
    params = params_of(net)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, network_lib.param_shapes(model))
    return net, model, params


def params_of(net):
    """The parameters of a diffusers network. Kernels are transposed; query, key and value become one kernel."""
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}

    def dense(*names):
        kernels = [state[f"{name}.weight"] for name in names]
        if kernels[0].ndim == 4:  # a convolution (D, C, H, W) whose stride is its size: rows, columns, channels
            kernels = [kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1) for kernel in kernels]
        return {"kernel": np.concatenate(kernels).T, "bias": np.concatenate([state[f"{name}.bias"] for name in names])}

    def block(name):
        return {
            "modulation": dense(f"{name}.norm1.linear"),
            "qkv": dense(*(f"{name}.attn1.to_{letter}" for letter in "qkv")),
            "out": dense(f"{name}.attn1.to_out.0"),
            "mlp_0": dense(f"{name}.ff.net.0.proj"),
            "mlp_1": dense(f"{name}.ff.net.2"),
        }

    embedding = "transformer_blocks.0.norm1.emb"
    return {
        "time_0": dense(f"{embedding}.timestep_embedder.linear_1"),
        "time_1": dense(f"{embedding}.timestep_embedder.linear_2"),
        "class": {"embedding": state[f"{embedding}.class_embedder.embedding_table.weight"]},
        "patch_in": dense("pos_embed.proj"),
        **{f"block_{i}": block(f"transformer_blocks.{i}") for i in range(net.config.num_layers)},
        "modulation_out": dense("proj_out_1"),
        "patch_out": dense("proj_out_2"),
    }


def diffusers_output(torch, net, x, time, labels):
    with torch.no_grad():
        out = net(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(time), torch.tensor(labels)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def test_output_is_diffusers_s_in_float32(torch, variant):
    net, model, params = variant
    x, labels = inputs(model, 3)
    # diffusers rounds the frequencies to float32.
    for time, tolerance in [([0, 1, 20], 1e-5), ([999, 998, 900], 1e-4)]:
        output = apply(model, params, x, np.asarray(time), labels)
        assert difference(output, diffusers_output(torch, net, x, time, labels)) < tolerance


def test_output_is_diffusers_s_in_float64(torch, variant, x64):
    """At timestep 0 diffusers' embedding of the timestep is exact; at the others it is replaced by `sinusoid`. The
    embedding of positions is that of diffusers before it rounds to float32.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    net, model, params = variant
    net.double()
    side = model.image_size // model.patch_size
    net.pos_embed.pos_embed = get_2d_sincos_pos_embed(model.hidden_size, side, base_size=side)[None]
    shared = net.transformer_blocks[0].norm1.emb

    class Sinusoid(torch.nn.Module):
        def forward(self, time):
            return torch.tensor(np.asarray(sinusoid(jnp.asarray(time.numpy(), jnp.float64), TIME_FEATURES, 0.0, True)))

    params = jax.tree.map(np.float64, params)
    x, labels = inputs(model, 2, np.float64)
    for embedding, time in [(shared.time_proj, [0.0, 0.0]), (Sinusoid(), [0.0, 999.0]), (Sinusoid(), [500.0, 3.0])]:
        shared.time_proj = embedding
        reference = diffusers_output(torch, net, x, time, labels)
        assert reference.dtype == np.float64
        output = apply(model.clone(dtype=jnp.float64), params, x, np.asarray(time), labels)
        assert difference(output, reference) < 1e-12


# --- without diffusers ---


def test_dit_xl_2_has_the_published_number_of_parameters():
    """The published number also counts the fixed embedding of 256 positions, and a variance for each of 4 channels."""
    model = DiT(32, 4, 2, depth=28, hidden_size=1152, num_heads=16, num_classes=1000, label_dropout=0.1)
    model.check()
    count = sum(leaf.size for leaf in jax.tree.leaves(network_lib.param_shapes(model)))
    assert count + 256 * 1152 + 2 * 2 * 4 * (1152 + 1) == 675_129_632


def test_the_initial_output_is_zero():
    x, labels = inputs(GUIDED, 4)
    params = jax.jit(as_network(GUIDED).init)(jax.random.key(0))
    out = apply(GUIDED, params, x, 500, labels)
    assert out.shape == x.shape and not np.any(out)
    zero = lambda dense: not np.any(dense["kernel"])
    block = params["block_0"]
    assert {name for name in block if zero(block[name])} == {"modulation"}
    assert zero(params["modulation_out"]) and zero(params["patch_out"]) and not zero(params["patch_in"])


def test_an_unconditional_network_has_no_embedding_of_classes():
    assert network_lib.param_shapes(GUIDED).keys() - network_lib.param_shapes(DIT).keys() == {"class"}


def test_bfloat16_computes_near_float32_with_float32_parameters():
    params, (x, labels) = random_params(GUIDED), inputs(GUIDED, 4)
    low = GUIDED.clone(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(network_lib.param_shapes(low)))
    exact, rough = apply(GUIDED, params, x, 10, labels), apply(low, params, x, 10, labels)
    assert exact.dtype == rough.dtype == jnp.float32
    assert 1e-4 < difference(rough, exact) < 0.05
    watched = functools.partial(low.apply, capture_intermediates=True, mutable=["intermediates"])
    _, kept = jax.eval_shape(watched, {"params": params}, x, np.full(4, 10), labels)
    kept["intermediates"].pop("__call__")  # the output
    products = jax.tree.leaves(kept)
    assert len(products) > 10 and all(leaf.dtype == jnp.bfloat16 for leaf in products)


def test_bfloat16_is_normalised_in_float32():
    """The spacing of bfloat16 is 1/2 near 100, and 1/128 near 1."""
    x = np.random.default_rng(0).normal(100, 2, (1, 3, 64)).astype(jnp.bfloat16)
    shift = scale = np.full((1, 64), 7 / 2048, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True) * (1 + 7 / 2048) + 7 / 2048
    out = modulated_norm(*map(jnp.asarray, (x, shift, scale)))  # not jitted: a fused program may round less
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=1.01 * 2**-8)


def test_attention_by_hand_and_its_softmax_in_float32():
    """For each head, with loops. The logits are near 30, where the spacing of bfloat16 is 1/8."""
    draw = np.random.default_rng(0)
    query, key, value = (draw.normal(0, size, (2, 5, 3, 16)).astype(jnp.bfloat16) for size in (5, 5, 1))
    out = np.asarray(jax.jit(attention)(query, key, value))
    assert out.dtype == jnp.bfloat16
    out, query, key, value = (a.astype(np.float64) for a in (out, query, key, value))
    for b, i, head in np.ndindex(2, 5, 3):
        weights = np.exp(query[b, i, head] @ key[b, :, head].T / 4)
        expected = weights @ value[b, :, head] / weights.sum()
        np.testing.assert_allclose(out[b, i, head], expected, rtol=0.01, atol=0.01)


def test_classes_and_time_matter_and_are_required():
    params, (x, _) = random_params(GUIDED), inputs(GUIDED, 4)
    run = lambda time, labels: np.asarray(apply(GUIDED, params, x, time, np.asarray(labels, np.int32)))
    out = run(5, [0, 1, 2, 3])
    changes = np.abs(run(5, [0, 3, 1, 2]) - out).max(axis=(1, 2, 3))
    assert changes[0] == 0 and changes[1:].min() > 1e-2
    assert np.abs(run(6, [0, 1, 2, 3]) - out).max(axis=(1, 2, 3)).min() > 1e-2
    with raises(ValueError, "num_classes", "3"):
        apply(GUIDED, params, x, 5)
    with raises(ValueError, "num_classes", "0"):
        apply(DIT, params, x, 5, np.zeros(4, np.int32))
    with raises(ValueError, "8x8x1", "got 8x4x1"):
        apply(DIT, params, x[:, :, :4], 5)


def test_labels_are_hidden_in_training_alone_with_their_probability():
    model, n = GUIDED.clone(image_size=2), 4000
    params, x, shown = random_params(model), np.ones((n, 2, 2, 1), np.float32), np.arange(n) % 3
    run = lambda labels, **kwargs: np.asarray(apply(model, params, x, 7, labels, **kwargs)).reshape(n, -1)
    seen, none = run(shown), run(np.full(n, 3))
    trained = run(shown, train=True, key=jax.random.key(0))
    near = lambda a: np.abs(trained - a).max(axis=1) < 1e-4
    assert np.abs(seen - none).max(axis=1).min() > 1e-2
    assert (near(seen) ^ near(none)).all()
    for label in range(3):
        assert abs(near(none)[label::3].mean() - 0.3) < 5 * (0.3 * 0.7 * 3 / n) ** 0.5


def test_dropout_acts_in_training_alone_on_the_attention_and_on_the_mlp():
    model, (x, _), keys = DIT.clone(dropout=0.5), inputs(DIT, 2), [jax.random.key(seed) for seed in (0, 1)]
    for closed in (2, 5):  # the gate of one of them, of the six parts of the modulation
        params = random_params(model)
        gate = np.s_[..., 16 * closed : 16 * (closed + 1)]
        params["block_0"]["modulation"] = {
            name: leaf.at[gate].set(0) for name, leaf in params["block_0"]["modulation"].items()
        }
        exact = apply(DIT, params, x, 10)
        np.testing.assert_array_equal(apply(model, params, x, 10), exact)
        first, second = (apply(model, params, x, 10, None, True, key) for key in keys)
        assert min(difference(first, exact), difference(second, exact), difference(first, second)) > 1e-2


def test_the_gradient_reaches_every_parameter_through_remat():
    checkpointed = GUIDED.clone(remat=True)
    params, labels = random_params(GUIDED, scale=0.3), np.arange(4, dtype=np.int32)  # 3: no class
    x, _ = inputs(GUIDED, 4)
    loss = lambda model, params: jnp.square(apply(model, params, x, 10, labels) - x).sum()
    gradient = lambda model: jax.value_and_grad(functools.partial(loss, model))
    remat = lambda model: str(jax.make_jaxpr(gradient(model))(params)).count("remat")
    assert remat(checkpointed) > 0 == remat(GUIDED)
    value, gradients = jax.jit(gradient(checkpointed))(params)
    np.testing.assert_allclose(value, loss(GUIDED, params), rtol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        leaf = np.array(leaf)
        if path[-2:] == (jax.tree_util.DictKey("qkv"), jax.tree_util.DictKey("bias")):
            leaf = np.delete(leaf, np.s_[16:32])  # a bias of the keys shifts all logits of a query equally
        assert (np.abs(leaf) > 1e-6).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(patch_size=3), ("patch_size", "3", "image_size", "8")),
        (dict(patch_size=16), ("patch_size", "16", "image_size", "8")),
        (dict(hidden_size=18), ("hidden_size", "got 18")),
        (dict(num_heads=3), ("num_heads", "3", "hidden_size", "16")),
        (dict(num_heads=0), ("num_heads", "got 0")),
        (dict(depth=0), ("depth", "got 0")),
        (dict(mlp_ratio=0.05), ("mlp_ratio", "0.05", "hidden_size", "16")),
        (dict(mlp_ratio=float("nan")), ("mlp_ratio", "nan")),
        (dict(label_dropout=0.1), ("label_dropout", "num_classes", "got 0.1")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    DIT.check()
    with raises(ValueError, *words):
        DIT.clone(**sizes).check()
