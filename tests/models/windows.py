"""Private models whose attention is over windows of a grid of tokens: shifted, padded, of a grid or a sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIDE = 24, 3, 3  # windows are SIDE x SIDE


class Block(nn.Module):
    """A block over (B, H, W, C), or over (B, H * W, C) if its tokens stand in a sequence.

    Args:
        rows: H.
        columns: W.
        shift: By how many rows and columns the windows are shifted, with a mask for those that are torn.
        sequence: Whether the stream is a sequence.
        fused: Whether attention is one call, with the mask expanded over the batch; else it is spelled out.
        pads_first: Whether the stream is padded in front of the norm, and not behind it.
    """

    def __init__(
        self, rows: int, columns: int, shift: int = 0, *, sequence: bool = False, fused: bool = True,
        pads_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows, self.columns, self.shift = rows, columns, shift
        self.sequence, self.fused, self.pads_first = sequence, fused, pads_first
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, SIDE**2, SIDE**2))
        tall, wide = rows + -rows % SIDE, columns + -columns % SIDE
        self.padded = (tall, wide)
        regions = torch.zeros(1, tall, wide, 1)
        for number, part in enumerate((slice(-SIDE, -shift or None), slice(-shift, None)) if shift else ()):
            regions[:, part] += 3 * (number + 1)
            regions[:, :, part] += number + 1
        regions = self.windows(regions).squeeze(-1)
        torn = (regions.unsqueeze(1) != regions.unsqueeze(2)).float() * -100
        self.register_buffer("mask", torn if shift else None)  # (windows, slots, slots)

    def windows(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B * windows, slots, C)
        b, h, w, c = x.shape
        x = x.view(b, h // SIDE, SIDE, w // SIDE, SIDE, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, SIDE**2, c)

    def attend(self, x: Tensor, batch: int) -> Tensor:  # x (B * windows, slots, C)
        rows, slots, _ = x.shape
        q, k, v = self.qkv(x).view(rows, slots, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            bias = self.bias.unsqueeze(0)
            if self.mask is not None:
                torn = self.mask.unsqueeze(1).expand(batch, -1, -1, -1, -1)
                bias = bias + torn.reshape(-1, 1, slots, slots)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.bias
            if self.mask is not None:
                logits = logits.view(batch, -1, HEADS, slots, slots) + self.mask.unsqueeze(1).unsqueeze(0)
                logits = logits.view(-1, HEADS, slots, slots)
            out = logits.softmax(-1) @ v
        return self.out(out.transpose(1, 2).reshape(rows, slots, WIDTH))

    def pad(self, x: Tensor) -> Tensor:
        (tall, wide), (h, w) = self.padded, x.shape[1:3]
        return F.pad(x, (0, 0, 0, wide - w, 0, tall - h))

    def local(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        batch, (tall, wide) = x.shape[0], self.padded
        x = self.norm(self.pad(x)) if self.pads_first else self.pad(self.norm(x))
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.attend(self.windows(x), batch)
        x = x.view(batch, tall // SIDE, wide // SIDE, SIDE, SIDE, WIDTH).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, tall, wide, WIDTH)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, : self.rows, : self.columns]

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence:
            x = x + self.local(x.view(-1, self.rows, self.columns, WIDTH)).reshape(-1, self.rows * self.columns, WIDTH)
        else:
            x = x + self.local(x)
        return x + self.mlp(self.norm2(x))


class Windowed(nn.Module):
    """Patches of 4 pixels, blocks, and a map (B, 5, H, W)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.ModuleList(blocks)
        self.neck, self.sequence = nn.Linear(WIDTH, 5), blocks[0].sequence

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)
        shape = x.shape
        x = x.flatten(1, 2) if self.sequence else x
        for block in self.blocks:
            x = block(x)
        return self.neck(x.view(shape)).permute(0, 3, 1, 2)


def pictures(batch: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4 * rows, 4 * columns, generator=generator)


class ApartHeads(Block):
    """Attention in five dimensions: image, head, window, slot and feature."""

    def attend(self, x: Tensor, batch: int) -> Tensor:
        rows, slots, _ = x.shape
        q, k, v = self.qkv(x).view(batch, -1, slots, 3, HEADS, WIDTH // HEADS).permute(3, 0, 4, 1, 2, 5).unbind(0)
        bias = self.bias.unsqueeze(1) if self.mask is None else self.bias.unsqueeze(1) + self.mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(out.permute(0, 2, 3, 1, 4).reshape(rows, slots, WIDTH))


class MergedHeads(Block):
    """Attention in three dimensions: images, windows and heads are one; there is no bias."""

    def attend(self, x: Tensor, batch: int) -> Tensor:
        rows, slots, _ = x.shape
        q, k, v = self.qkv(x).view(rows, slots, 3, HEADS, -1).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        out = ((q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(out.view(rows, HEADS, slots, -1).transpose(1, 2).reshape(rows, slots, WIDTH))


class ChannelsFirst(Block):
    """A block over (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class WindowedChannelsFirst(Windowed):
    """The same with a stream (B, C, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
