"""Private models that keep windows of an image in the batch, (4 * B, n, C), and join them for some attention alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import randomise

WIDTH, HEADS, WINDOWS, SLOTS = 24, 3, 4, 6  # 2 x 2 windows of 2 x 3 patches
TOKENS = WINDOWS * SLOTS


class Block(nn.Module):
    """A block over (4 * B, n, C) that attends inside each window, or joins the four for its attention.

    Args:
        how: "inside" each window; "behind" the norm, as one reshape; "front", before the norm, with logits spelled out
            and a bias for each pair of tokens; "dims", behind the projections, one dimension after the other, with
            normalised queries and keys; "sized", with keys that all heads share and something added, where the number
            of images is taken of the windows; "pairs" of windows, which makes no sequence of an image.
        prefix: How many prefix tokens each window has.
    """

    def __init__(self, how: str, prefix: int = 0) -> None:
        super().__init__()
        self.how, self.count = how, WINDOWS * (SLOTS + prefix)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.unit = nn.LayerNorm(WIDTH // HEADS) if how == "dims" else nn.Identity()
        self.bias = nn.Parameter(torch.randn(HEADS, self.count, self.count)) if how == "front" else None

    def attend(self, qkv: Tensor) -> Tensor:  # (B, N, 3 * C)
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.unit(q), self.unit(k)
        if self.bias is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def branch(self, x: Tensor) -> Tensor:
        entries, n, _ = x.shape
        if self.how == "inside":
            return self.out(self.attend(self.qkv(self.norm(x))))
        if self.how == "front":
            x = x.view(entries // WINDOWS, WINDOWS * n, WIDTH)
            return self.out(self.attend(self.qkv(self.norm(x)))).view(entries, -1, WIDTH)
        if self.how == "dims":
            qkv = self.qkv(self.norm(x)).unflatten(0, (-1, WINDOWS)).flatten(1, 2)
            return self.out(self.attend(qkv).unflatten(1, (WINDOWS, n)).flatten(0, 1))
        joined = WINDOWS // 2 if self.how == "pairs" else WINDOWS
        y = self.norm(x).reshape(entries // joined, joined * n, WIDTH)
        if self.how == "sized":
            q, k, v = self.qkv(y).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            k = k[:, :1].expand(entries // WINDOWS, HEADS, -1, -1)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(y + x.new_ones(entries // WINDOWS, 1, 1)).reshape(x.shape)
        return self.out(self.attend(self.qkv(y))).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        return x + self.mlp(self.norm2(x))

    def alone(self, x: Tensor) -> Tensor:
        """The block on any tokens of one sequence, with what has no bias for pairs of them."""
        x = x + self.out(self.attend(self.qkv(self.norm(x))))
        return x + self.mlp(self.norm2(x))


class Stacked(nn.Module):
    """Patches of 4 pixels in windows, blocks, and numbers for each patch.

    Args:
        *blocks: The blocks.
        prefix: How many prefix tokens stand in front of each window.
        tells: Return the stream of windows behind the last block.
    """

    def __init__(self, *blocks: nn.Module, prefix: int = 0, tells: bool = False) -> None:
        super().__init__()
        self.tells = tells
        self.patches, self.neck = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.prefix = nn.Parameter(torch.randn(1, prefix, WIDTH)) if prefix else None
        self.places = nn.Parameter(torch.randn(1, SLOTS, WIDTH))
        self.blocks = nn.ModuleList(blocks)

    def windows(self, images: Tensor) -> Tensor:
        x = self.patches(images).unflatten(2, (2, 2)).unflatten(4, (2, 3)).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(-1, SLOTS, WIDTH) + self.places
        return x if self.prefix is None else torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.windows(images)
        for block in self.blocks:
            x = block(x)
        return x if self.tells else self.neck(x[:, -SLOTS:]).view(images.shape[0], TOKENS, 5)


def build(*hows: str, prefix: int = 0, **options: Any) -> Stacked:
    """A model of blocks of these kinds, with random parameters."""
    torch.manual_seed(0)
    model = Stacked(*(Block(how, prefix) for how in hows), prefix=prefix, **options).eval()
    with torch.no_grad():
        randomise(model)
    return model


def pictures(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 16, 24, generator=generator)
