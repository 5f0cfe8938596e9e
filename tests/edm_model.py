"""The networks of EDM (Karras et al. 2022) in PyTorch, written from their description for the tests: DDPM++ and NCSN++
(Song et al. 2021) and ADM, with the preconditioning; and pickles of them as the published ones are.
"""

import copy
import math
import pickle
import sys
import types

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, group_norm, silu

# --- persistence: an object is pickled as a call with the source code of its class and its state ---

SOURCE = "raise RuntimeError('the source code in a checkpoint was executed')"
FAKES = {"torch_utils.persistence": "_reconstruct_persistent_obj", "dnnlib.util": "EasyDict"}


def _reconstruct_persistent_obj(meta):
    raise RuntimeError("a checkpoint was opened by executing it")


class EasyDict(dict):
    pass


def published(cls):
    """A class whose objects remember their arguments and are pickled by persistence."""
    build = cls.__init__

    def __init__(self, **kwargs):
        build(self, **kwargs)
        self._init_args, self._init_kwargs = (), copy.deepcopy(kwargs)

    def __reduce__(self):
        return _reconstruct_persistent_obj, (meta_of(self),)

    cls.__init__, cls.__reduce__ = __init__, __reduce__
    return cls


def meta_of(thing):
    names = {"class_name": type(thing).__name__, "state": thing.__dict__}
    return {"type": "class", "version": 6, "module_src": SOURCE, **names}


def write(path, content, protocol=4):
    """Pickles with the names of NVIDIA's modules, which are not there."""
    saved = {name: sys.modules.get(name) for name in ("torch_utils", "dnnlib", *FAKES)}
    try:
        for name in saved:
            sys.modules[name] = types.ModuleType(name)
        for name, attribute in FAKES.items():
            thing = globals()[attribute]
            thing.__module__ = name
            setattr(sys.modules[name], attribute, thing)
        path.write_bytes(pickle.dumps(content, protocol))
    finally:
        for name, module in saved.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return path


# --- layers ---


@published
class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@published
class Conv2d(nn.Module):
    """kernel 0: resampling alone. fused_resample: the filter comes after the convolution of an enlarged image."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, resample_filter=(1, 1), **more):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        self.fused_resample, self.weight, self.bias = more.get("fused_resample", False), None, None
        if kernel:
            scale = 1 / (in_channels * kernel**2) ** 0.5
            del self.weight, self.bias
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) * scale)
            self.bias = nn.Parameter(torch.zeros(out_channels))
        row = torch.tensor([float(weight) for weight in resample_filter])
        both = (row[:, None] * row[None, :] / row.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", both if up or down else None)

    def filtered(self, x, padding):
        channels = x.shape[1]
        weight = self.resample_filter.to(x.dtype).repeat(channels, 1, 1, 1)
        if self.up:
            return conv_transpose2d(x, 4 * weight, stride=2, padding=padding, groups=channels)
        return conv2d(x, weight, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        border = 0 if self.resample_filter is None else self.resample_filter.shape[-1] // 2 - 1
        if self.fused_resample:
            return self.filtered(conv2d(x, self.weight, padding=1 + border), 0) + self.bias[:, None, None]
        x = self.filtered(x, border) if self.up or self.down else x
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


@published
class GroupNorm(nn.Module):
    def __init__(self, num_channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@published
class UNetBlock(nn.Module):
    """song: the settings of DDPM++ and NCSN++, otherwise those of ADM."""

    def __init__(self, in_channels, out_channels, emb_channels, song, attention=False, filter=(1, 1), **resample):
        super().__init__()
        self.in_channels, self.out_channels, self.adaptive_scale = in_channels, out_channels, not song
        self.num_heads = (1 if song else out_channels // 64) if attention else 0
        self.skip_scale = np.sqrt(0.5) if song else 1  # a NumPy number
        norm = lambda channels: GroupNorm(num_channels=channels, eps=1e-6 if song else 1e-5)
        common = dict(out_channels=out_channels)
        resampled = dict(in_channels=in_channels, resample_filter=filter, **common, **resample)
        self.norm0, self.conv0 = norm(in_channels), Conv2d(kernel=3, **resampled)
        self.affine = Linear(in_features=emb_channels, out_features=out_channels * (1 if song else 2))
        self.norm1, self.conv1 = norm(out_channels), Conv2d(in_channels=out_channels, kernel=3, **common)
        self.skip = None
        if in_channels != out_channels or resample:
            self.skip = Conv2d(kernel=1 if song or in_channels != out_channels else 0, **resampled)
        if attention:
            self.norm2 = norm(out_channels)
            self.qkv = Conv2d(in_channels=out_channels, out_channels=3 * out_channels, kernel=1)
            self.proj = Conv2d(in_channels=out_channels, kernel=1, **common)

    def forward(self, x, embedding):
        h, condition = self.conv0(silu(self.norm0(x))), self.affine(embedding)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + condition)
        h = (self.conv1(silu(h)) + (x if self.skip is None else self.skip(x))) * float(self.skip_scale)
        if not self.num_heads:
            return h
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm2(h)).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        query, key, value = qkv.unbind(3)
        weights = torch.einsum("bhcq,bhck->bhqk", query, key) / math.sqrt(channels // self.num_heads)
        mixed = torch.einsum("bhqk,bhck->bhcq", weights.softmax(-1), value).reshape(h.shape)
        return (h + self.proj(mixed)) * float(self.skip_scale)


@published
class PositionalEmbedding(nn.Module):
    def __init__(self, num_channels, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, 10000, endpoint

    def forward(self, time):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=time.dtype) / (half - self.endpoint)
        angles = time[:, None] * (self.max_positions**-exponents)[None]
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@published
class FourierEmbedding(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num_channels // 2))

    def forward(self, time):
        angles = time[:, None] * (2 * math.pi * self.freqs)[None]
        return torch.cat([angles.cos(), angles.sin()], dim=1)


# --- networks ---


class _Base(nn.Module):
    def size(self, level):
        return f"{self.resolution >> level}x{self.resolution >> level}"

    def embed(self, time, labels):
        raise NotImplementedError

    def encode(self, x, embedding):
        raise NotImplementedError

    def up_blocks(self, level):
        """The blocks of the decoder at a level that take a skip connection."""
        prefix = f"{self.size(level)}_block"
        return [block for name, block in self.dec.items() if name.startswith(prefix)]


@published
class SongUNet(_Base):
    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.1,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        super().__init__()
        self.resolution, self.label_dropout, self.levels = img_resolution, label_dropout, len(channel_mult)
        self.encoder, self.decoder = encoder_type, decoder_type
        features, width = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        fourier = embedding_type == "fourier"
        embedding = dict(num_channels=features) if fourier else dict(num_channels=features, endpoint=True)
        self.map_noise = (FourierEmbedding if fourier else PositionalEmbedding)(**embedding)
        self.map_label = Linear(in_features=label_dim, out_features=features) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(in_features=augment_dim, out_features=features, bias=False)
        self.map_layer0 = Linear(in_features=features, out_features=width)
        self.map_layer1 = Linear(in_features=width, out_features=width)

        filtered = dict(resample_filter=resample_filter)
        block = lambda channels, out, attention=False, **resample: UNetBlock(
            in_channels=channels,
            out_channels=out,
            emb_channels=width,
            song=True,
            attention=attention,
            filter=resample_filter,
            **resample,
        )
        self.enc, h, aux = nn.ModuleDict(), model_channels, in_channels
        self.enc[f"{self.size(0)}_conv"] = Conv2d(in_channels=in_channels, out_channels=h, kernel=3)
        skips = [h]
        for level, mult in enumerate(channel_mult):
            if level:
                self.enc[f"{self.size(level)}_down"] = block(h, h, down=True)
                if encoder_type == "skip":
                    down = Conv2d(in_channels=aux, out_channels=aux, kernel=0, down=True, **filtered)
                    self.enc[f"{self.size(level)}_aux_down"] = down
                    self.enc[f"{self.size(level)}_aux_skip"] = Conv2d(in_channels=aux, out_channels=h, kernel=1)
                if encoder_type == "residual":
                    self.enc[f"{self.size(level)}_aux_residual"] = Conv2d(
                        in_channels=aux, out_channels=h, kernel=3, down=True, fused_resample=True, **filtered
                    )
                    aux = h
                skips.append(h)
            for i in range(num_blocks):
                attention = img_resolution >> level in attn_resolutions
                self.enc[f"{self.size(level)}_block{i}"] = block(h, model_channels * mult, attention)
                h = model_channels * mult
                skips.append(h)
        self.dec = nn.ModuleDict()
        for level, mult in list(enumerate(channel_mult))[::-1]:
            if level == self.levels - 1:
                self.dec[f"{self.size(level)}_in0"] = block(h, h, True)
                self.dec[f"{self.size(level)}_in1"] = block(h, h)
            else:
                self.dec[f"{self.size(level)}_up"] = block(h, h, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and img_resolution >> level in attn_resolutions
                self.dec[f"{self.size(level)}_block{i}"] = block(h + skips.pop(), model_channels * mult, attention)
                h = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < self.levels - 1:
                    up = Conv2d(in_channels=out_channels, out_channels=out_channels, kernel=0, up=True, **filtered)
                    self.dec[f"{self.size(level)}_aux_up"] = up
                self.dec[f"{self.size(level)}_aux_norm"] = GroupNorm(num_channels=h, eps=1e-6)
                self.dec[f"{self.size(level)}_aux_conv"] = Conv2d(in_channels=h, out_channels=out_channels, kernel=3)

    def forward(self, x, time, labels=None):
        cos, sin = self.map_noise(time).chunk(2, dim=1)
        embedding = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            embedding = embedding + self.map_label(labels * self.map_label.in_features**0.5)
        embedding = silu(self.map_layer1(silu(self.map_layer0(embedding))))

        image = aux = x
        h = self.enc[f"{self.size(0)}_conv"](image)
        skips = [h]
        for level in range(self.levels):
            at = self.size(level)
            if level:
                h = self.enc[f"{at}_down"](h, embedding)
                if self.encoder == "skip":
                    aux = self.enc[f"{at}_aux_down"](aux)
                    h = h + self.enc[f"{at}_aux_skip"](aux)
                if self.encoder == "residual":
                    h = aux = (h + self.enc[f"{at}_aux_residual"](aux)) / math.sqrt(2)
                skips.append(h)
            for name, block in self.enc.items():
                if name.startswith(f"{at}_block"):
                    h = block(h, embedding)
                    skips.append(h)
        output = None
        for level in range(self.levels)[::-1]:
            at = self.size(level)
            for name in ("in0", "in1") if level == self.levels - 1 else ("up",):
                h = self.dec[f"{at}_{name}"](h, embedding)
            for block in self.up_blocks(level):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
            if f"{at}_aux_conv" in self.dec:
                added = self.dec[f"{at}_aux_conv"](silu(self.dec[f"{at}_aux_norm"](h)))
                output = added if output is None else self.dec[f"{at}_aux_up"](output) + added
        return output


@published
class DhariwalUNet(_Base):
    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.1,
        label_dropout=0,
    ):
        super().__init__()
        self.resolution, self.levels, width = img_resolution, len(channel_mult), model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(num_channels=model_channels)
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(in_features=augment_dim, out_features=model_channels, bias=False)
        self.map_layer0 = Linear(in_features=model_channels, out_features=width)
        self.map_layer1 = Linear(in_features=width, out_features=width)
        self.map_label = Linear(in_features=label_dim, out_features=width, bias=False) if label_dim else None
        attends = lambda level: img_resolution >> level in attn_resolutions
        block = lambda channels, out, attention=False, **resample: UNetBlock(
            in_channels=channels,
            out_channels=out,
            emb_channels=width,
            song=False,
            attention=attention,
            **resample,
        )
        h = model_channels * channel_mult[0]
        self.enc = nn.ModuleDict({f"{self.size(0)}_conv": Conv2d(in_channels=in_channels, out_channels=h, kernel=3)})
        skips = [h]
        for level, mult in enumerate(channel_mult):
            if level:
                self.enc[f"{self.size(level)}_down"] = block(h, h, down=True)
                skips.append(h)
            for i in range(num_blocks):
                self.enc[f"{self.size(level)}_block{i}"] = block(h, model_channels * mult, attends(level))
                h = model_channels * mult
                skips.append(h)
        self.dec = nn.ModuleDict()
        for level, mult in list(enumerate(channel_mult))[::-1]:
            if level == self.levels - 1:
                self.dec[f"{self.size(level)}_in0"] = block(h, h, True)
                self.dec[f"{self.size(level)}_in1"] = block(h, h)
            else:
                self.dec[f"{self.size(level)}_up"] = block(h, h, up=True)
            for i in range(num_blocks + 1):
                name = f"{self.size(level)}_block{i}"
                self.dec[name] = block(h + skips.pop(), model_channels * mult, attends(level))
                h = model_channels * mult
        self.out_norm = GroupNorm(num_channels=h)
        self.out_conv = Conv2d(in_channels=h, out_channels=out_channels, kernel=3)

    def forward(self, x, time, labels=None):
        embedding = self.map_layer1(silu(self.map_layer0(self.map_noise(time))))
        if self.map_label is not None:
            embedding = embedding + self.map_label(labels)
        embedding, h, skips = silu(embedding), x, []
        for block in self.enc.values():
            h = block(h) if isinstance(block, Conv2d) else block(h, embedding)
            skips.append(h)
        for level in range(self.levels)[::-1]:
            for name in ("in0", "in1") if level == self.levels - 1 else ("up",):
                h = self.dec[f"{self.size(level)}_{name}"](h, embedding)
            for block in self.up_blocks(level):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out_conv(silu(self.out_norm(h)))


@published
class EDMPrecond(nn.Module):
    """D(x, sigma), the denoised image (Karras et al. 2022, Eq. 7 and table 1)."""

    def __init__(self, img_resolution, img_channels, label_dim=0, model_type="SongUNet", sigma_data=0.5, **more):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = False, 0, float("inf"), sigma_data
        sizes = dict(img_resolution=img_resolution, in_channels=img_channels, out_channels=img_channels)
        self.model = globals()[model_type](**sizes, label_dim=label_dim, **more)

    def forward(self, x, sigma, labels=None):
        variance, data = sigma**2, self.sigma_data**2
        time = torch.full((len(x),), math.log(sigma) / 4, dtype=x.dtype)
        output = self.model(x / math.sqrt(variance + data), time, labels)
        return data / (variance + data) * x + sigma * self.sigma_data / math.sqrt(variance + data) * output


@published
class EDMLoss:
    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data


# Small networks of each family. GroupNorm of a DhariwalUNet has 32 groups from 128 channels on.
SMALL = dict(img_resolution=8, img_channels=3)
SONG = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.13)
VE = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
KINDS = {
    "DDPM++": SMALL | SONG | dict(augment_dim=9),
    "DDPM++ with classes": SMALL | SONG | dict(label_dim=10, channel_mult=[2, 2], num_blocks=2),
    "NCSN++": SMALL | SONG | VE,
    "NCSN++ with classes": SMALL | SONG | VE | dict(label_dim=7, augment_dim=9, channel_mult=[1, 2, 2]),
    "skip connections": SMALL | SONG | VE | dict(encoder_type="skip", decoder_type="skip", channel_mult=[1, 2, 2]),
    "ADM": SMALL
    | dict(model_type="DhariwalUNet", model_channels=128, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    | dict(label_dim=5),
}


def network_of(kind, seed=0):
    """An `EDMPrecond` with random weights."""
    torch.manual_seed(seed)
    network = EDMPrecond(**copy.deepcopy(KINDS[kind])).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return network


def save(path, network, **more):
    """Writes the pickle of a network as the training of EDM does."""
    content = dict(ema=network, loss_fn=EDMLoss(), augment_pipe=None, dataset_kwargs={"path": "data.zip"})
    return write(path, content | {"training": EasyDict(seed=0)} | more)
