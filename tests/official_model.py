"""The U-Net of DDPM in PyTorch, with the module names of the official DDIM checkpoints."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def embedding(time, features):
    half = features // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = time.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs, features, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(features, outputs)
        self.norm2, self.dropout = norm(outputs), nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        b, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (conv(h).reshape(b, c, height * width) for conv in (self.q, self.k, self.v))
        attention = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, dim=2)
        return x + self.proj_out(torch.einsum("bcj,bij->bci", v, attention).reshape(b, c, height, width))


class Resample(nn.Module):
    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, block, attn):
        super().__init__()
        self.block, self.attn = nn.ModuleList(block), nn.ModuleList(attn)

    def run(self, i, h, temb):
        h = self.block[i](h, temb)
        return self.attn[i](h) if len(self.attn) else h


class Model(nn.Module):
    def __init__(self, *, resolution, ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, out_ch, dropout):
        super().__init__()
        features, widths, last = 4 * ch, [ch * mult for mult in ch_mult], len(ch_mult) - 1
        self.ch, self.num_res_blocks = ch, num_res_blocks
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, features), nn.Linear(features, features)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        block = lambda inputs, outputs: ResnetBlock(inputs, outputs, features, dropout)
        attends = lambda level: resolution >> level in attn_resolutions

        skips, width, self.down = [ch], ch, nn.ModuleList()
        for level, out in enumerate(widths):
            inputs = [width] + [out] * (num_res_blocks - 1)
            attn = [AttnBlock(out) for _ in inputs] if attends(level) else []
            self.down.append(Level([block(i, out) for i in inputs], attn))
            skips += [out] * num_res_blocks
            width = out
            if level < last:
                self.down[-1].downsample = Resample(width, down=True)
                skips.append(width)

        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = block(width, width), AttnBlock(width), block(width, width)

        up = {}
        for level, out in reversed(list(enumerate(widths))):
            blocks, attn = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(width + skips.pop(), out))
                width = out
                if attends(level):
                    attn.append(AttnBlock(out))
            up[level] = Level(blocks, attn)
            if level > 0:
                up[level].upsample = Resample(width, down=False)
        self.up = nn.ModuleList([up[level] for level in sorted(up)])
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x, time):
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](embedding(time, self.ch))))
        hs = [self.conv_in(x)]
        for level in self.down:
            for i in range(self.num_res_blocks):
                hs.append(level.run(i, hs[-1], temb))
            if hasattr(level, "downsample"):
                hs.append(level.downsample(hs[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = level.run(i, torch.cat([h, hs.pop()], dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
