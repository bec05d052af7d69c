"""Private models whose residual stream is a grid of tokens, rows and columns last or in the middle of the shape."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import randomise

WIDTH, HEADS, ROWS, COLUMNS = 24, 3, 4, 6


class ChannelsLast(nn.Module):
    """A block over (B, H, W, C), with a term for each row and one for each column of a query's key if asked for."""

    def __init__(self, *, relative: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        tables = [torch.randn(side, side, WIDTH // HEADS) for side in (ROWS, COLUMNS)]
        self.by_row, self.by_column = (nn.Parameter(table) if relative else None for table in tables)

    def bias(self, q: Tensor) -> Tensor | None:  # q (B, H, N, D)
        if self.by_row is None:
            return None
        q = q.unflatten(2, (ROWS, COLUMNS))
        rows = torch.einsum("nahwd,hkd->nahwk", q, self.by_row)
        columns = torch.einsum("nahwd,wkd->nahwk", q, self.by_column)
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, height, width, WIDTH))
        return x + self.mlp(self.norm2(x))


class ChannelsFirst(nn.Module):
    """A block over (B, C, H, W), whose linear layers are convolutions of one patch."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.BatchNorm2d(WIDTH)
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        hidden = nn.Conv2d(WIDTH, 2 * WIDTH, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Conv2d(2 * WIDTH, WIDTH, 1))

    def normalised(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = self.normalised(x)
        q, k, v = self.qkv(y).reshape(batch, 3, HEADS, -1, height * width).transpose(-2, -1).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)
        x = x + self.out(attended.reshape(batch, WIDTH, height, width))
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.Module):
    """A layer norm over the channels of (B, C, H, W), written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return unit * self.weight[:, None, None] + self.bias[:, None, None]


class NormWritten(ChannelsFirst):
    """The same with its first norm written out over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ChannelNorm()

    def normalised(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Bottleneck(nn.Module):
    """A block over (B, C, H, W) of a convolutional network, whose logits are of keys and of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.qkv, self.out = (
            nn.Conv2d(WIDTH, 12, 1),
            nn.Conv2d(12, 36, 1, bias=False),
            nn.Conv2d(12, WIDTH, 1),
        )
        self.norm, self.norm2 = nn.BatchNorm2d(12), nn.BatchNorm2d(WIDTH)
        self.rows = nn.Parameter(torch.randn(1, HEADS, 4, ROWS, 1))
        self.columns = nn.Parameter(torch.randn(1, HEADS, 4, 1, COLUMNS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.relu(self.norm(self.into(x)))).flatten(2).unflatten(1, (3, HEADS, 4)).unbind(1)
        positions = (self.rows + self.columns).flatten(3).transpose(-2, -1)
        logits = positions @ q + q.transpose(-2, -1) @ k
        attended = v @ logits.softmax(-1).transpose(-2, -1)
        return F.relu(x + self.norm2(self.out(attended.reshape(x.shape[0], 12, ROWS, COLUMNS))))


class Positions(ChannelsLast):
    """Its own position embedding is added in every block, one for each row and one for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(1, ROWS, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(ROWS, COLUMNS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mlp(x + self.rows + self.places)


class Causal(ChannelsLast):
    """Attention that takes no mask besides its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Grid(nn.Module):
    """Patches of 4 pixels on a grid that is not square, blocks, and a map (B, 5, H, W).

    Args:
        *blocks: The blocks.
        tells: Return what leaves each block too.
    """

    def __init__(self, *blocks: nn.Module, tells: bool = False) -> None:
        super().__init__()
        self.tells = tells
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.ModuleList(blocks)
        self.positions = nn.Parameter(torch.randn(1, WIDTH, ROWS, COLUMNS))
        self.neck = nn.Conv2d(WIDTH, 5, 3, padding=1)
        self.last = isinstance(blocks[0], ChannelsLast)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.patches(images) + self.positions
        x, features = x.permute(0, 2, 3, 1) if self.last else x, list[Tensor]()
        for block in self.blocks:
            x = block(x)
            features.append(x)
        result = self.neck(x.permute(0, 3, 1, 2) if self.last else x)
        return (result, *features) if self.tells else result


class Pyramid(Grid):
    """Half as many rows and columns after the second block."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.halves = nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = (self.patches(images) + self.positions).permute(0, 2, 3, 1)
        for place, block in enumerate(self.blocks):
            x = self.halves(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if place == 2 else x
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "last": ChannelsLast,
    "relative": lambda: ChannelsLast(relative=True),
    "positions": Positions,
    "first": ChannelsFirst,
    "norm_written": NormWritten,
    "bottleneck": Bottleneck,
}


def build(kind: str | Callable[[], nn.Module], count: int = 1, *, whole: type[Grid] = Grid, **options: Any) -> Grid:
    """A model of so many blocks of a kind, with random parameters."""
    torch.manual_seed(0)
    block = KINDS[kind] if isinstance(kind, str) else kind
    model = whole(*(block() for _ in range(count)), **options).eval()
    with torch.no_grad():
        randomise(model)
    return model


def pictures(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4 * ROWS, 4 * COLUMNS, generator=generator)
