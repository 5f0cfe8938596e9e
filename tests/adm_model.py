"""The network of ADM (Dhariwal and Nichol 2021) and improved DDPM (Nichol and Dhariwal 2021) in PyTorch, written from
its description for the tests: a published state dict has these names and shapes.
"""

import math

import torch
from torch import nn


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-5)


def embed(time, features):
    """cos, then sin, of time * 10000^(-i / half), i = 0..half-1."""
    half = features // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64)).to(time.dtype)
    angles = time[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def resampled(x, how):
    if how == "down":
        return nn.functional.avg_pool2d(x, 2)
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


class Residual(nn.Module):
    """Norm, SiLU, [resampling], convolution; the embedding, added or as scale and shift; norm, SiLU, convolution."""

    def __init__(self, channels, out, embedding, scale_shift, how=None):
        super().__init__()
        self.scale_shift, self.how = scale_shift, how
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x, embedding):
        h = self.in_layers[2](resampled(self.in_layers[1](self.in_layers[0](x)), self.how))
        x = resampled(x, self.how)
        embedded = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[3](self.out_layers[1](h))
        else:
            h = self.out_layers(h + embedded)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv, self.proj_out = (
            norm(channels),
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x):
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(batch, channels, -1))
        size = channels // self.heads
        if self.new_order:  # query, key and value first, then the heads of each
            query, key, value = (part.reshape(batch * self.heads, size, -1) for part in qkv.chunk(3, dim=1))
        else:  # the heads first, then query, key and value of each
            query, key, value = qkv.reshape(batch * self.heads, 3 * size, -1).split(size, dim=1)
        weights = torch.einsum("bct,bcs->bts", query * size**-0.25, key * size**-0.25).softmax(dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, value).reshape(batch, channels, -1)
        return x + self.proj_out(h).reshape(x.shape)


class Layers(nn.Sequential):
    """The layers that one skip connection joins."""

    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, Residual) else layer(x)
        return x


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(resampled(x, "up"))


class Network(nn.Module):
    """Called as (x (B, 3, H, W), time (B,), labels)."""

    def __init__(self, flags, num_classes=0):
        super().__init__()
        f = lambda name: flags[name]
        self.channels = f("num_channels")
        widths = [int(float(mult) * self.channels) for mult in f("channel_mult").split(",")]
        embedding, shift = 4 * self.channels, f("use_scale_shift_norm")
        attended = [int(size) for size in f("attention_resolutions").split(",")]
        heads = lambda width: f("num_heads") if f("num_head_channels") == -1 else width // f("num_head_channels")
        attention = lambda width: Attention(width, heads(width), f("use_new_attention_order"))
        block = lambda channels, out, how=None: Residual(channels, out, embedding, shift, how)
        self.time_embed = nn.Sequential(nn.Linear(self.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, embedding)
        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(3, widths[0], 3, padding=1))])
        skips, width, size = [widths[0]], widths[0], f("image_size")
        for level, out in enumerate(widths):
            for _ in range(f("num_res_blocks")):
                self.input_blocks.append(Layers(block(width, out), *([attention(out)] if size in attended else [])))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                down = block(width, width, "down") if f("resblock_updown") else Downsample(width)
                self.input_blocks.append(Layers(down))
                skips.append(width)
                size //= 2
        self.middle_block = Layers(block(width, width), attention(width), block(width, width))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(f("num_res_blocks") + 1):
                layers = [block(width + skips.pop(), out), *([attention(out)] if size in attended else [])]
                width = out
                if level and i == f("num_res_blocks"):
                    layers.append(block(width, width, "up") if f("resblock_updown") else Upsample(width))
                    size *= 2
                self.output_blocks.append(Layers(*layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, 6 if f("learn_sigma") else 3, 3, padding=1))

    def forward(self, x, time, labels=None):
        embedding = self.time_embed(embed(time, self.channels))
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        skips, h = [], x
        for layers in self.input_blocks:
            h = layers(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for layers in self.output_blocks:
            h = layers(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)
