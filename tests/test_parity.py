"""Parity with PyTorch: diffusers' network, schedulers and pipeline, and the network of the official DDIM code, with the
same weights and the same noise.
"""

import dataclasses
import json
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")

from conftest import meshes  # noqa: E402
from messages import raises  # noqa: E402
from official_model import Model  # noqa: E402

from ddim_jax import checkpoints, convert, gaussian, registry, samplers, sampling, schedule, trajectory  # noqa: E402
from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax.checkpoints import diffusers_scheduler  # noqa: E402
from ddim_jax.config import weights  # noqa: E402
from ddim_jax.models.unet import sinusoid  # noqa: E402
from ddim_jax.utils.errors import CheckpointError  # noqa: E402

torch.set_num_threads(1)

# The settings of google/ddpm-cifar10-32, the defaults of diffusers, and other shapes.
DDPM = dict(
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=8
)
CIFAR10 = dict(
    DDPM,
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=32,
)


def blocks(*attends):
    return dict(
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
    )


VARIANTS = {
    "ddpm": dict(DDPM, sample_size=8, block_out_channels=(16, 32), layers_per_block=2, **blocks(0, 1)),
    "diffusers_defaults": dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **blocks(1, 1)
    ),
    "three_levels": dict(
        DDPM, sample_size=(8, 8), block_out_channels=(16, 16, 48), layers_per_block=1, **blocks(0, 1, 0)
    )
    | dict(downsample_padding=1, in_channels=1, out_channels=1),
    "one_level": dict(DDPM, sample_size=4, block_out_channels=(16,), layers_per_block=3, **blocks(0))
    | dict(flip_sin_to_cos=True, dropout=0.5),
    "classes": dict(DDPM, sample_size=8, block_out_channels=(16, 32), layers_per_block=1, **blocks(0, 0))
    | dict(num_class_embeds=5, add_attention=False, freq_shift=0),
}


def randomise(net, seed=0):
    """Sets random weights that keep the variance, with scales and biases that are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight += 1
    return net.eval()


def publish(folder, net, scheduler=None):
    diffusers.DDPMPipeline(net, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def read(where):
    """(CheckpointInfo, Linen module, params)"""
    info = weights.read_info(where)
    params = info.read(weights.params_like(info.model, meshes()[0]), True)
    return info, config_lib.network(info.model).module, params


def to_torch(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def difference(output, reference):
    return float(np.abs(np.asarray(output) - reference).max() / np.abs(reference).max())


def inputs(info, batch, dtype=np.float32):
    rng = np.random.default_rng(batch)
    model = info.model
    x = rng.normal(size=(batch, model.image_size, model.image_size, model.image_channels)).astype(dtype)
    labels = rng.integers(0, model.num_classes, batch).astype(np.int32) if model.num_classes else None
    return x, labels


def torch_labels(labels):
    return {} if labels is None else {"class_labels": torch.tensor(labels)}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    net = randomise(diffusers.UNet2DModel(**VARIANTS[request.param]))
    return net, publish(tmp_path_factory.mktemp("published") / request.param, net)


# --- the network ---


def test_output_is_diffusers_s_in_float32(variant):
    net, where = variant
    info, module, params = read(where)
    apply = jax.jit(module.apply)
    for batch, time, tolerance in [(3, [0, 1, 20], 5e-6), (1, [5], 5e-6), (3, [999, 998, 900], 1e-4)]:
        x, labels = inputs(info, batch)
        with torch.no_grad():
            reference = from_torch(net(to_torch(x), torch.tensor(time), **torch_labels(labels)).sample)
        assert difference(apply({"params": params}, x, jnp.asarray(time), labels), reference) < tolerance


def test_output_is_diffusers_s_in_float64(variant, x64):
    """At timestep 0 diffusers' embedding is exact; at the others it is replaced by `sinusoid`."""
    net, where = variant
    info, module, params = read(where)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
    apply = jax.jit(module.clone(dtype=jnp.float64).apply)
    x, labels = inputs(info, 2, np.float64)
    original = net.time_proj

    class Sinusoid(torch.nn.Module):
        def forward(self, time):
            fields = (info.model.channels, info.model.frequency_shift, info.model.cos_first)
            return torch.tensor(np.asarray(sinusoid(jnp.asarray(time.numpy(), jnp.float64), *fields)))

    try:
        net.double()
        for embedding, time in [(original, [0.0, 0.0]), (Sinusoid(), [0.0, 999.0]), (Sinusoid(), [500.0, 3.0])]:
            net.time_proj = embedding
            with torch.no_grad():
                reference = from_torch(net(to_torch(x), torch.tensor(time), **torch_labels(labels)).sample)
            assert reference.dtype == np.float64
            assert difference(apply({"params": params}, x, jnp.asarray(time), labels), reference) < 1e-12
    finally:
        net.time_proj = original
        net.float()


def diffusers_ddim(net, scheduler, x, steps, labels=None):
    """The loop of DDIMPipeline, from its noise to its image."""
    scheduler.set_timesteps(steps)
    x = to_torch(x)
    with torch.no_grad():
        for time in scheduler.timesteps:
            output = net(x, time, **torch_labels(labels)).sample
            x = scheduler.step(output, time, x, use_clipped_model_output=True).prev_sample
    return from_torch(x)


def ddim(where, params, x, steps, labels=None):
    """DDIM with the settings of the checkpoint."""
    values = config_of(where)
    values["sample"]["steps"] = steps
    config = config_lib.parse(weights.completed(values))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    model = sampling.conditioned(config_lib.pipeline(config, params, None), labels)
    return np.asarray(samplers.integrate(process.sampler, model, process.transitions, x))


def config_of(where):
    from configs import default

    values = default.get_config().to_dict()
    values["pretrained"] = str(where)
    return values


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in ("ddpm", "classes") else [pytest.mark.slow]) for name in VARIANTS],
    indirect=True,
)
@pytest.mark.parametrize("clip", [False, True])
def test_fifty_steps_equal_those_of_diffusers(variant, tmp_path, clip):
    net, _ = variant
    scheduler = diffusers.DDIMScheduler(clip_sample=clip)
    where = publish(tmp_path / "pipeline", net, scheduler)
    info, _, params = read(where)
    x, labels = inputs(info, 2)
    reference = diffusers_ddim(net, scheduler, x, 50, labels)
    assert difference(ddim(where, params, x, 50, labels), reference) < 1e-4


SOLVERS = {  # name in registry.SAMPLERS -> (diffusers' class, settings)
    "plms": ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=True)),
    "dpm_solver_pp_2m": (
        "DPMSolverMultistepScheduler",
        dict(lower_order_final=False, final_sigmas_type="zero", timestep_spacing="linspace"),
    ),
    "unipc": ("UniPCMultistepScheduler", dict(final_sigmas_type="zero", timestep_spacing="linspace")),
}


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_equal_those_of_diffusers(name, steps):
    """With a smooth network, over the levels of diffusers' scheduler."""
    scheduler_class, settings = SOLVERS[name]
    scheduler = getattr(diffusers, scheduler_class)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **settings)
    scheduler.set_timesteps(steps)
    network = lambda x, time, sin: 0.8 * sin(1.3 * x + 0.002 * time) + 0.3 * x
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    reference = torch.tensor(x)
    for time in scheduler.timesteps:
        reference = scheduler.step(network(reference, float(time), torch.sin), time, reference).prev_sample
    tau = [0, *sorted({int(time) + 1 for time in scheduler.timesteps})]
    assert len(tau) == steps + 1
    x_0 = samplers.integrate(
        registry.build(registry.SAMPLERS[name], {}),
        lambda x, t: network(x, t - 1.0, jnp.sin),
        trajectory.descend(schedule.linear(), tau),
        x,
    )
    assert difference(x_0, reference.numpy()) < 1e-5 * float(reference.abs().max())


@pytest.mark.slow
def test_the_cifar10_network_at_full_size(tmp_path):
    net = randomise(diffusers.UNet2DModel(**CIFAR10))
    where = publish(tmp_path / "ddpm-cifar10-32", net)
    info, module, params = read(where)
    assert info.name == "ddpm-cifar10-32"
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    from configs import cifar10

    cifar10 = config_lib.parse(cifar10.get_config().to_dict())
    assert dataclasses.replace(info.model, dropout=0.1) == cifar10.model and info.schedule == cifar10.schedule
    apply = jax.jit(module.apply)
    x, _ = inputs(info, 2)
    for time, tolerance in [([0, 10], 5e-6), ([999, 999], 1e-4)]:
        with torch.no_grad():
            reference = from_torch(net(to_torch(x), torch.tensor(time)).sample)
        assert difference(apply({"params": params}, x, jnp.asarray(time)), reference) < tolerance
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(tmp_path / "ddpm-cifar10-32" / "scheduler")
    reference = diffusers_ddim(net, scheduler, x[:1], 50)
    assert difference(ddim(where, params, x[:1], 50), reference) < 1e-4


# --- conversion ---


def tensors_of(folder):
    return safetensors.numpy.load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")


def convert_(source, to, format_=None):
    given = {"from": str(source), "to": str(to), "format": format_, "ema": True, "overwrite": False, "paths": False}
    convert.main(types.SimpleNamespace(**given))


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name == "classes" else [pytest.mark.slow]) for name in VARIANTS],
    indirect=True,
)
def test_a_conversion_and_its_inverse_keep_all_bits(variant, tmp_path):
    """Through each format: the tensors, and the config of the network."""
    net, where = variant
    for format_, to in [("safetensors", "w.safetensors"), ("orbax", "run"), ("diffusers", "folder")]:
        convert_(where, tmp_path / to, format_)
        convert_(tmp_path / to, tmp_path / f"back_{format_}")
        original, back = tensors_of(where), tensors_of(tmp_path / f"back_{format_}")
        assert original.keys() == back.keys()
        for name in original:
            assert original[name].dtype == back[name].dtype and original[name].shape == back[name].shape
            np.testing.assert_array_equal(original[name], back[name], err_msg=name)
        loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path / f"back_{format_}").unet.config
        before, after = (json.loads(json.dumps(dict(config))) for config in (net.config, loaded))
        if isinstance(before["sample_size"], list):
            before["sample_size"] = before["sample_size"][0]
        for name in VARIANTS["ddpm"] | VARIANTS["classes"] | {"dropout": 0, "in_channels": 0, "act_fn": 0}:
            assert before[name] == after[name], name


def test_the_shipped_network_draws_the_same_images_in_diffusers(tmp_path):
    """The shipped digits, from the same noise."""
    from configs import digits

    digits = config_lib.parse(digits.get_config().to_dict())
    convert_(checkpoints.shipped("digits"), tmp_path / "digits")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "digits")
    _, x = sampling.start(config_lib.pipeline(digits, None, None), jnp.arange(9))
    pipeline.scheduler.set_timesteps(50)
    reference = diffusers_ddim(pipeline.unet, pipeline.scheduler, x, 50)
    config = dataclasses.replace(digits, sample=dataclasses.replace(digits.sample, steps=50, num_images=9))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    params = weights.find(config, None, meshes()[0]).params
    model = sampling.conditioned(config_lib.pipeline(config, params, None))
    assert difference(samplers.integrate(process.sampler, model, process.transitions, x), reference) < 1e-4
    assert len(pipeline(batch_size=2, num_inference_steps=2, output_type="np").images) == 2
    card = (tmp_path / "digits" / "README.md").read_text()
    assert "DDIMPipeline.from_pretrained" in card and '"learning_rate": 0.001' in card


def test_old_attention_names_and_the_flat_layout_are_read(tmp_path):
    """As in the first repositories: config and tensors in the root, query, key, value, proj_attn, a .bin file."""
    net = randomise(diffusers.UNet2DModel(**VARIANTS["ddpm"]))
    where = publish(tmp_path / "new", net)
    flat = tmp_path / "flat"
    flat.mkdir()
    new = tmp_path / "new"
    (flat / "config.json").write_text((new / "unet" / "config.json").read_text())
    (flat / "scheduler_config.json").write_text((new / "scheduler" / "scheduler_config.json").read_text())
    (flat / "model_index.json").write_text((new / "model_index.json").read_text())
    old = {}
    for name, tensor in net.state_dict().items():
        for new_name, old_name in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            name = name.replace(new_name, old_name)
        old[name] = tensor
    torch.save(old, flat / "diffusion_pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, read(str(flat))[2], read(where)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_as_float32(tmp_path, dtype):
    net = randomise(diffusers.UNet2DModel(**VARIANTS["ddpm"])).to(dtype)
    params = read(publish(tmp_path / "half", net))[2]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["conv_in"]["kernel"], net.conv_in.weight.detach().float().numpy().transpose(2, 3, 1, 0)
    )


# --- the official code ---

OFFICIAL = dict(ch=32, ch_mult=[1, 2], num_res_blocks=2, attn_resolutions=[16], in_channels=3, out_ch=3, dropout=0.1)


def official_yaml(image_size):
    """As the official code dumps its argparse.Namespace."""
    lines = ["!!python/object:argparse.Namespace"]
    sections = {
        "data": dict(dataset="CIFAR10", image_size=image_size, channels=3, logit_transform=False, rescaled=True),
        "model": dict(OFFICIAL, type="simple", resamp_with_conv=True, ema=True, ema_rate=0.9999),
        "diffusion": dict(beta_schedule="quad", beta_start=0.0002, beta_end=0.01, num_diffusion_timesteps=500),
    }
    for section, fields in sections.items():
        lines.append(f"{section}: !!python/object:argparse.Namespace")
        lines += [f"  {name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def assert_same_output(net, module, params):
    x = np.random.default_rng(0).normal(size=(2, module.image_size, module.image_size, 3)).astype(np.float32)
    for time, tolerance in [([0, 20], 5e-6), ([999, 400], 1e-4)]:
        with torch.no_grad():
            reference = from_torch(net(to_torch(x), torch.tensor(time)))
        assert difference(jax.jit(module.apply)({"params": params}, x, jnp.asarray(time)), reference) < tolerance


def test_the_official_checkpoint_and_its_moving_average(tmp_path):
    raw, ema = (randomise(Model(resolution=32, **OFFICIAL), seed) for seed in (0, 1))
    folder = tmp_path / "cifar10_run"
    folder.mkdir()
    optimizer = torch.optim.Adam(raw.parameters())
    parallel = {f"module.{name}": tensor for name, tensor in raw.state_dict().items()}
    torch.save([parallel, optimizer.state_dict(), 3, 1234, dict(ema.state_dict())], folder / "ckpt.pth")
    (folder / "config.yml").write_text(official_yaml(32))
    for where in (folder, folder / "ckpt.pth"):
        info, module, params = read(str(where))
        assert info.name == "cifar10_run"
        assert_same_output(ema, module, params)
    assert (info.schedule.name, info.schedule.num_steps) == ("scaled_linear", 500)
    assert (info.schedule.beta_start, info.schedule.beta_end) == (0.0002, 0.01)
    raw_params = info.read(weights.params_like(info.model, meshes()[0]), False)
    assert_same_output(raw, module, raw_params)


def test_a_state_dict_with_a_config_in_its_folder(tmp_path):
    """As in the port of Ho's models, in PyTorch's format and as safetensors."""
    net = randomise(Model(resolution=32, **OFFICIAL))
    torch.save(net.state_dict(), tmp_path / "ema_cifar10.ckpt")
    safetensors.numpy.save_file({n: t.numpy() for n, t in net.state_dict().items()}, tmp_path / "ema.safetensors")
    for name in ("ema_cifar10.ckpt", "ema.safetensors"):
        with raises(CheckpointError, name, "config.yml"):
            read(str(tmp_path / name))
    (tmp_path / "config.yml").write_text(official_yaml(32))
    for name in ("ema_cifar10.ckpt", "ema.safetensors"):
        info, module, params = read(str(tmp_path / name))
        assert info.name == name.split(".")[0]
        assert module.image_size == 32 and info.schedule.num_steps == 500
        assert_same_output(net, module, params)


def test_the_networks_of_ho_are_known_by_their_file_names(tmp_path):
    """By the published names, and by those of the official code."""
    state = {"conv_in.weight": torch.ones(1), "temb.dense.0.weight": torch.ones(1)}
    (tmp_path / "diffusion_lsun_cat_model").mkdir()
    for name, size in [
        ("ema_diffusion_cifar10_model-790000.ckpt", 32),
        ("diffusion_lsun_church_model-4432000.ckpt", 256),
        ("diffusion_lsun_cat_model/model-1761000.ckpt", 256),
    ]:
        torch.save(state, tmp_path / name)
        model = weights.read_info(str(tmp_path / name)).model
        assert model.image_size == size and model.attention_resolutions == (16,) and model.channels == 128
        with raises(CheckpointError, name, "conv_in.bias"):
            read(str(tmp_path / name))
    torch.save(state, tmp_path / "ema_diffusion_celeba_model-1.ckpt")
    with raises(CheckpointError, "ema_diffusion_celeba_model-1.ckpt", "config.yml"):
        weights.read_info(str(tmp_path / "ema_diffusion_celeba_model-1.ckpt"))


def test_the_official_model_of_this_test_has_the_published_size():
    cifar10 = dict(ch=128, ch_mult=[1, 2, 2, 2], num_res_blocks=2, attn_resolutions=[16])
    net = Model(resolution=32, in_channels=3, out_ch=3, dropout=0.1, **cifar10)
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307


class Code:
    """An object whose pickle calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save(content, legacy=False):
    return lambda path: torch.save(content(path), path, _use_new_zipfile_serialization=not legacy)


STATE = Model(resolution=32, **OFFICIAL).state_dict()
MALICIOUS = {
    "code": save(lambda path: [STATE, Code(path.with_name("executed"))]),
    "code in the old format": save(lambda path: {"state_dict": Code(path.with_name("executed"))}, legacy=True),
    "code in a bare pickle": lambda path: path.write_bytes(pickle.dumps(Code(path.with_name("executed")))),
}


@pytest.mark.parametrize("write", MALICIOUS.values(), ids=MALICIOUS)
@pytest.mark.parametrize("name", ["ckpt.pth", "unet/diffusion_pytorch_model.bin"])
def test_code_in_a_pickle_is_never_executed(tmp_path, write, name):
    if name.startswith("unet"):
        publish(tmp_path, diffusers.UNet2DModel(**VARIANTS["one_level"]))
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write(tmp_path / name)
    with raises(CheckpointError, str(tmp_path / name)):
        read(str(tmp_path))
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(
    "write, words",
    [
        (save(lambda path: {"epoch": 3, "loss": 0.1}), ("'epoch'", "'loss'")),
        (save(lambda path: []), ("NoneType",)),
        (save(lambda path: torch.ones(3)), ("Tensor",)),
        (save(lambda path: {"layer.weight": torch.ones(3)}), ("layer.weight",)),
        (lambda path: path.write_bytes(b"PK" + bytes(300)), ()),
        (lambda path: path.write_bytes(b""), ()),
        (save(lambda path: {**STATE, "extra": torch.ones(1)}), ("extra", "(1,)")),
        (
            save(lambda path: {name: tensor for name, tensor in STATE.items() if name != "mid.attn_1.q.bias"}),
            ("mid.attn_1.q.bias",),
        ),
    ],
)
def test_other_pickles_are_named(tmp_path, write, words):
    write(tmp_path / "ckpt.pth")
    (tmp_path / "config.yml").write_text(official_yaml(32))
    with raises(CheckpointError, "ckpt.pth", *words):
        read(str(tmp_path))


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("resamp_with_conv: true", "resamp_with_conv: false", ("config.yml", "resamp_with_conv", "False", "True")),
        ("rescaled: true", "rescaled: false", ("config.yml", "rescaled", "False")),
        ('"quad"', '"jsd"', ("config.yml", "beta_schedule", "'jsd'", "linear", "quad", "sigmoid", "const")),
        ("image_size: 32", "image_size: 33", ("config.model", "image_size", "33")),
        ("ch: 32", "ch: many", ("config.yml", "model.ch", "int", "got 'many'")),
        ("diffusion:", "diffusor:", ("config.yml", "diffusion")),
        (
            "ch: 32",
            "ch: !!python/object/apply:os.system ['touch executed']",
            ("config.yml", "model.ch", "int", "got None"),
        ),
        ("ch: 32", "ch: [", ("config.yml",)),
    ],
)
def test_the_official_config_is_checked(tmp_path, monkeypatch, old, new, words):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, tmp_path / "ckpt.pth")
    (tmp_path / "config.yml").write_text(official_yaml(32))
    read(str(tmp_path))
    text = official_yaml(32)
    assert old in text
    (tmp_path / "config.yml").write_text(text.replace(old, new, 1))
    with raises(CheckpointError, *words):
        read(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_the_old_file_format_and_a_list_without_average(tmp_path):
    torch.save([STATE, {}, 1, 2], tmp_path / "ckpt.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "config.yml").write_text(official_yaml(32))
    np.testing.assert_array_equal(read(str(tmp_path))[2]["conv_in"]["bias"], STATE["conv_in.bias"].numpy())


# --- the scheduler ---

T = 1000
BASE = dict(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02)
GRID = [
    {},
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    dict(beta_schedule="squaredcos_cap_v2"),
    dict(trained_betas=np.geomspace(1e-4, 0.05, T).tolist()),
    dict(num_train_timesteps=400),
    dict(prediction_type="sample"),
    dict(prediction_type="v_prediction"),
    dict(clip_sample=False),
    dict(clip_sample=False, prediction_type="v_prediction", beta_schedule="scaled_linear"),
    dict(clip_sample_range=0.4),
    dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
    dict(thresholding=True, clip_sample=False, prediction_type="v_prediction"),
    dict(set_alpha_to_one=False),
    dict(set_alpha_to_one=False, steps_offset=1),
    dict(steps_offset=3, clip_sample=False, prediction_type="sample"),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="trailing", set_alpha_to_one=False, prediction_type="v_prediction"),
    dict(timestep_spacing="linspace"),
    dict(timestep_spacing="linspace", set_alpha_to_one=False, beta_schedule="squaredcos_cap_v2", clip_sample=False),
]


def model_output(x, time, xp):
    """Any function of x and time."""
    return xp.sin(2 * x) + 0.3 * xp.cos(0.01 * time + 3 * x)


def bounded(prediction, sample, keep_eps):
    """The denoiser that model_output is, with x_0 bounded as a scheduler's settings say."""
    model = gaussian.Denoise(
        lambda x, level: gaussian.PREDICTIONS[prediction].prediction(x, model_output(x, level.t - 1, jnp), level)
    )
    if sample["clip_x0"] and sample["clip_quantile"]:
        return gaussian.threshold_x0(model, sample["clip_quantile"], sample["clip_range"], keep_eps=keep_eps)
    if sample["clip_x0"]:
        return gaussian.clip_x0(model, -sample["clip_range"], sample["clip_range"], keep_eps=keep_eps)
    return model


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", GRID, ids=lambda settings: "-".join(map(str, settings))[:60] or "defaults")
def test_every_step_equals_that_of_diffusers(settings, eta, x64):
    """A step between the pairs of levels of diffusers, for the same x and the same noise."""
    settings = BASE | settings
    scheduler = diffusers.DDIMScheduler(**settings)
    noise_config, prediction, sample = diffusers_scheduler.noise_fields(dict(scheduler.config), "test")
    noise_schedule = config_lib.noise_schedule(config_lib.section(config_lib.ScheduleConfig, noise_config, "test"))
    table = schedule.levels(noise_schedule)
    np.testing.assert_allclose(table.alpha_bar[1:], scheduler.alphas_cumprod.numpy(), rtol=2e-5)

    steps = 50
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.numpy() + 1
    s = np.maximum(t - settings["num_train_timesteps"] // steps, sample["tau_end"])
    moves = t != s  # to itself: where set_alpha_to_one is False and t = 1
    transitions = trajectory.transitions(noise_schedule, t[moves], s[moves])

    sampler, denoise = samplers.ddim(eta), bounded(prediction, sample, keep_eps=False)
    step = jax.jit(lambda x, transition, noise: sampler.step(x, (), transition, denoise, noise)[0])

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 3))
    for i, (time, moved) in enumerate(zip(scheduler.timesteps, moves, strict=True)):
        noise = rng.normal(size=x.shape)
        reference = scheduler.step(
            model_output(to_torch(x), float(time), torch),
            time,
            to_torch(x),
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=to_torch(noise) if eta else None,
        ).prev_sample
        if moved:
            transition = jax.tree.map(lambda leaf, i=i: leaf[i], transitions)
            np.testing.assert_allclose(step(x, transition, noise), from_torch(reference), rtol=1e-5, atol=2e-5)
        else:
            np.testing.assert_allclose(x, from_torch(reference), rtol=1e-5, atol=1e-5)
        x = from_torch(reference)


LOOPS = [  # whole loops with the defaults of diffusers: where x_0 is bounded, eps stays as predicted
    *(
        dict(prediction_type=prediction, timestep_spacing=spacing, rescale_betas_zero_snr=zero, clip_sample=clip)
        for prediction in ("epsilon", "sample", "v_prediction")
        for spacing in ("leading", "trailing", "linspace")
        for zero in (False, True)
        for clip in (False, True)
        if not (zero and prediction == "epsilon")
    ),
    dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", thresholding=True),
    # With clipping its last step, from level 1 to itself, changes x; ddim_jax has no such step.
    dict(prediction_type="sample", set_alpha_to_one=False, beta_schedule="squaredcos_cap_v2", clip_sample=False),
]


def loop(settings, stepping=diffusers.DDIMScheduler, steps=30, **fields):
    """(diffusers' scheduler in float64, the noise schedule, the process, the denoiser) of the same settings."""
    scheduler = stepping(**settings)
    noise, prediction, sample = diffusers_scheduler.noise_fields(
        {**scheduler.config, "_class_name": "DDIMScheduler"}, "test"
    )
    values = config_of("")
    values["schedule"] |= noise
    values["model"]["prediction"] = prediction
    values["sample"] |= sample | fields | {"steps": steps, "fixed_stride": True}
    values["sample"]["keep_eps"] = values["sample"]["clip_x0"]
    config = config_lib.typed(values)
    noise_schedule = config_lib.noise_schedule(config.schedule)
    np.testing.assert_allclose(scheduler.alphas_cumprod, noise_schedule.alpha_bar[1:], rtol=1e-4, atol=1e-7)
    scheduler.alphas_cumprod = torch.tensor(noise_schedule.alpha_bar[1:])
    final = 1.0 if settings.get("set_alpha_to_one", True) else noise_schedule.alpha_bar[1]
    scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = torch.tensor(final, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    process = config_lib.process(config.sample, noise_schedule)
    return scheduler, noise_schedule, process, bounded(prediction, values["sample"], keep_eps=True)


@pytest.mark.parametrize("settings", LOOPS, ids=lambda settings: "-".join(map(str, settings.values()))[:60])
def test_loops_of_diffusers(settings, x64):
    """From the same x_T. In float64 to 1e-9, and in float32 with an error like that of diffusers."""
    scheduler, _, process, denoise = loop(settings)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3))

    def diffusers_loop(dtype):
        x_t = to_torch(x).to(dtype)
        for time in scheduler.timesteps:
            x_t = scheduler.step(model_output(x_t, float(time), torch), time, x_t).prev_sample.to(dtype)
        return from_torch(x_t).astype(np.float64)

    integrate = lambda dtype: samplers.integrate(samplers.ddim(), denoise, process.transitions, jnp.asarray(x, dtype))
    exact = diffusers_loop(torch.float64)
    np.testing.assert_allclose(integrate(jnp.float64), exact, rtol=1e-9, atol=1e-9)
    spread = np.abs(diffusers_loop(torch.float32) - exact).max()
    assert np.abs(integrate(jnp.float32) - exact).max() <= 10 * max(spread, 1e-6)


# From an x_0-prediction eps cannot be computed at alpha_bar = 1, where diffusers divides by 0. From an eps-prediction
# x_0 cannot be computed at alpha_bar = 0.
INVERSE_LOOPS = [
    dict(prediction_type=prediction, timestep_spacing=spacing, rescale_betas_zero_snr=zero, set_alpha_to_one=end)
    for prediction in ("epsilon", "sample", "v_prediction")
    for spacing in ("leading", "trailing")
    for zero in (False, True)
    for end in (True, False)
    if (prediction, end) != ("sample", True) and (prediction, zero) != ("epsilon", True)
]


@pytest.mark.parametrize("settings", INVERSE_LOOPS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_inverse_loops_of_diffusers(settings, x64):
    """The network is evaluated at the next timestep, and its output is used at the level of x."""
    settings = dict(clip_sample=False) | settings
    end = settings["set_alpha_to_one"]
    scheduler, noise_schedule, process, denoise = loop(settings, diffusers.DDIMInverseScheduler)
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3))
    x_t = to_torch(x)
    visited = []
    for time in scheduler.timesteps:
        visited.append(int(time) + 1)
        x_t = scheduler.step(model_output(x_t, float(time), torch), time, x_t).prev_sample
    tau = [0 if end else 1, *visited]
    if visited[0] == tau[0]:  # a step from a level to itself
        tau = tau[1:]
    x_T = samplers.invert(denoise, noise_schedule, tau, x, "next", tau[0], process.stride)
    np.testing.assert_allclose(x_T, from_torch(x_t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_train_steps", [1000, 250])
def test_tau_is_diffusers_s_list_of_timesteps(spacing, num_train_steps):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=num_train_steps, timestep_spacing=spacing)
    for steps in range(1, num_train_steps + 1):
        scheduler.set_timesteps(steps)
        expected = [0, *(scheduler.timesteps.numpy()[::-1] + 1)]
        if (
            len(expected) == steps + 2
        ):  # trailing: its sum of floats may end slightly above 0, with a further timestep -1
            assert spacing == "trailing" and expected.pop(0) == expected[0] == 0
        np.testing.assert_array_equal(registry.TAUS[spacing](num_train_steps, steps), expected, err_msg=str(steps))


def test_sigmoid_is_that_of_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid", beta_start=3e-4, beta_end=0.01)
    fields, _, _ = diffusers_scheduler.noise_fields(dict(scheduler.config), "test")
    alpha_bar = config_lib.noise_schedule(config_lib.section(config_lib.ScheduleConfig, fields, "test")).alpha_bar
    np.testing.assert_allclose(alpha_bar[1:], scheduler.alphas_cumprod.numpy(), rtol=1e-6)


@pytest.mark.parametrize("settings", GRID, ids=lambda settings: "-".join(map(str, settings))[:60] or "defaults")
def test_the_settings_of_a_scheduler_are_written_unchanged(settings):
    original = dict(diffusers.DDIMScheduler(**(BASE | settings)).config)
    noise_fields = diffusers_scheduler.noise_fields
    noise, prediction, sample = noise_fields(original, "test")
    written = diffusers_scheduler.scheduler_config(
        {"model": {"prediction": prediction}, "schedule": noise, "sample": sample}
    )
    assert noise_fields(written, "test") == (noise, prediction, sample)
    known = dict(diffusers.DDIMScheduler.from_config(written).config)
    for name in BASE | settings:
        if name != "trained_betas" and not (name == "num_train_timesteps" and "trained_betas" in settings):
            assert known[name] == (BASE | settings)[name], name
