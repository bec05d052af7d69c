"""Private models whose stream itself stands in windows, has three sides, or is flattened inside a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import randomise

WIDTH, HEADS, SIDE = 24, 3, 2  # windows are SIDE x SIDE
ROWS, COLUMNS = 4, 6
WINDOWS, SLOTS = ROWS // SIDE * (COLUMNS // SIDE), SIDE**2


class Part(nn.Module):
    """Norms, projections and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Nested(Part):
    """A block over (B, windows, slots, C), which attends over the slots.

    Args:
        how: "fused", in one call; "biased", spelled out with a bias for each pair of slots; "einsum", so; "merged",
            with windows and images in one dimension; or "across", with slots in front of the windows in the stream.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.bias = how, nn.Parameter(torch.randn(HEADS, 1, SLOTS, SLOTS))

    def attend(self, x: Tensor) -> Tensor:
        batch, windows, slots, _ = x.shape
        qkv = self.qkv(x).reshape(batch, windows, slots, 3, HEADS, -1)
        if self.how == "merged":
            q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.how == "einsum":
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
            weights = (torch.einsum("bghid,bghjd->bghij", q * 8**-0.5, k) + self.bias.squeeze(1)).softmax(-1)
            return torch.einsum("bghij,bghjd->bghid", weights, v).permute(0, 1, 3, 2, 4).reshape(x.shape)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)  # (B, H, windows, slots, D)
        if self.how == "biased":
            out = (q * 8**-0.5 @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.permute(0, 2, 3, 1, 4).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm(x)))
        return x + self.mlp(self.norm2(x))


class Film(Part):
    """A block over (B, frames, H, W, C), which attends over windows of all frames, SIDE x SIDE patches large."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, _ = x.shape
        y = self.norm(x).view(b, t, h // SIDE, SIDE, w // SIDE, SIDE, WIDTH)
        y = y.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, t * SLOTS, WIDTH)
        q, k, v = self.qkv(y).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(b, h // SIDE, w // SIDE, t, SIDE, SIDE, WIDTH).permute(0, 3, 1, 4, 2, 5, 6)
        x = x + y.reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class Flattened(Part):
    """A block over (B, H, W, C) whose MLP is over a sequence, and may have a norm of all behind it."""

    def __init__(self, closes: bool) -> None:
        super().__init__()
        self.last = nn.LayerNorm(WIDTH) if closes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        y = self.norm(x).view(b, h // SIDE, SIDE, w // SIDE, SIDE, WIDTH).transpose(2, 3).reshape(-1, SLOTS, WIDTH)
        q, k, v = self.qkv(y).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + y.view(b, h // SIDE, w // SIDE, SIDE, SIDE, WIDTH).transpose(2, 3).reshape(x.shape)
        x = x.flatten(1, 2)
        return self.last(x + self.mlp(self.norm2(x))).unflatten(1, (h, w))


class Apart(nn.Module):
    """Patches of 4 pixels, blocks, and numbers for each patch in the order of the stream.

    Args:
        *blocks: The blocks, all of one class.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.neck = nn.Conv3d(3, WIDTH, (1, 4, 4), (1, 4, 4)), nn.Linear(WIDTH, 5)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, film: Tensor) -> Tensor:  # (B, 3, frames, height, width)
        x = self.patches(film).permute(0, 2, 3, 4, 1)
        if not isinstance(self.blocks[0], Film):
            x = x.mean(1)
        if isinstance(self.blocks[0], Nested):
            x = x.reshape(-1, ROWS // SIDE, SIDE, COLUMNS // SIDE, SIDE, WIDTH).transpose(2, 3)
            x = x.reshape(-1, WINDOWS, SLOTS, WIDTH)
            x = x.transpose(1, 2) if self.blocks[0].how == "across" else x
        return self.neck(self.blocks(x))


def build(kind: str, count: int = 2) -> Apart:
    """A model of so many blocks of a kind, with random parameters."""
    torch.manual_seed(0)
    made = {"film": Film, "flattened": lambda: Flattened(False), "closed": lambda: Flattened(True)}
    model = Apart(*(made[kind]() if kind in made else Nested(kind) for _ in range(count))).eval()
    with torch.no_grad():
        randomise(model)
    return model


def films(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 2, 4 * ROWS, 4 * COLUMNS, generator=generator)
