"""Folders of diffusers as they are on the hub: the fields that the common programs write, since diffusers 0.3."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")

from test_parity import difference, from_torch, inputs, randomise, read, to_torch  # noqa: E402

torch.set_num_threads(1)

WEIGHTS = "diffusion_pytorch_model"


LEVELS = (32, 32, 64, 64, 128, 128)  # a fourth of those of train_unconditional.py
ATTENDS = (False, False, False, False, True, False)
FIRST = {  # all fields that diffusers 0.3 writes for the network of its train_unconditional.py
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.3.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": list(LEVELS),
    "center_input_sample": False,
    "down_block_types": [("Attn" if attends else "") + "DownBlock2D" for attends in ATTENDS],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": [("Attn" if attends else "") + "UpBlock2D" for attends in ATTENDS[::-1]],
}
FIRST_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.3.0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "tensor_format": "pt",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
GREY = dict(sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64, 64))
GREY |= dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture(scope="module")
def trained():
    """The network of train_unconditional.py. It gives only these fields, the others have their defaults."""
    given = ("sample_size", "in_channels", "out_channels", "layers_per_block", "block_out_channels")
    given += ("down_block_types", "up_block_types")
    return randomise(diffusers.UNet2DModel(**{name: FIRST[name] for name in given}))


@pytest.fixture(scope="module")
def trained_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "ddpm-butterflies"
    diffusers.DDPMPipeline(trained, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def assert_same_network(folder, net):
    """Same output, and DDPM's linear schedule."""
    info, module, params = read(str(folder))
    x, _ = inputs(info, 2)
    with torch.no_grad():
        expected = from_torch(net(to_torch(x), torch.tensor([3, 20])).sample)
    output = jax.jit(module.apply)({"params": params}, x, jnp.asarray([3, 20]))
    assert expected.std() > 0.1 and difference(output, expected) < 5e-6
    assert (info.schedule.name, info.schedule.num_steps, info.model.prediction) == ("linear", 1000, "eps")


def test_the_network_of_train_unconditional(trained, trained_folder):
    assert_same_network(trained_folder, trained)


def test_the_first_field_set(trained, trained_folder, tmp_path):
    """Of diffusers 0.3, with a .bin file and the first names of the attention."""
    folder = tmp_path / "first"
    for name, content in (
        ("unet/config.json", FIRST),
        ("scheduler/scheduler_config.json", FIRST_SCHEDULER),
        ("model_index.json", json.loads((trained_folder / "model_index.json").read_text())),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    state = {}
    for name, tensor in trained.state_dict().items():
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            name = name.replace(new, old)
        state[name] = tensor
    torch.save(state, folder / "unet" / f"{WEIGHTS}.bin")
    assert_same_fields(folder, trained_folder)


def test_all_files_in_the_root(trained_folder, tmp_path):
    """As the Hugging Face course uploads a pipeline: the content of unet/ and of scheduler/ in the root."""
    for file in trained_folder.rglob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert (tmp_path / "config.json").is_file()
    assert_same_fields(tmp_path, trained_folder)


def assert_same_fields(folder, other):
    """Same fields, and the same parameters."""
    (info, _, params), (other_info, _, other_params) = read(str(folder)), read(str(other))
    assert (info.model, info.schedule, info.sample) == (other_info.model, other_info.schedule, other_info.sample)
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


def test_grey_images(tmp_path):
    net = randomise(diffusers.UNet2DModel(**GREY))
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "mnist")
    assert_same_network(tmp_path / "mnist", net)
