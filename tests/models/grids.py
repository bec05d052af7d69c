"""Private models whose residual stream is a grid of tokens, rows and columns last or in the middle of the shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q))
        x = x + self.out(attended.transpose(1, 2).reshape(batch, height, width, WIDTH))
        return x + self.mlp(self.norm2(x))


class ChannelsFirst(nn.Module):
    """A block over (B, C, H, W), whose linear layers are convolutions of one patch."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.BatchNorm2d(WIDTH)
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        hidden = nn.Conv2d(WIDTH, 2 * WIDTH, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Conv2d(2 * WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        q, k, v = self.qkv(y).reshape(batch, 3, HEADS, -1, height * width).transpose(-2, -1).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)
        x = x + self.out(attended.reshape(batch, WIDTH, height, width))
        return x + self.mlp(self.norm2(x))


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


class Grid(nn.Module):
    """Patches of 4 pixels on a grid that is not square, blocks, and a map (B, 5, H, W)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.ModuleList(blocks)
        self.positions = nn.Parameter(torch.randn(1, WIDTH, ROWS, COLUMNS))
        self.neck = nn.Conv2d(WIDTH, 5, 3, padding=1)
        self.last = isinstance(blocks[0], ChannelsLast)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images) + self.positions
        x = x.permute(0, 2, 3, 1) if self.last else x
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2) if self.last else x)


def pictures(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4 * ROWS, 4 * COLUMNS, generator=generator)
