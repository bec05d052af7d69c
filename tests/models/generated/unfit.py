"""Attention that cannot idle: over a grid of patches, or inside windows.

Shapes: B images, N tokens, C width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.config import Config

WINDOW = 2


class ReducedKeys(nn.Module):
    """Attention over keys and values of patches of the token grid."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.query, self.key_value = nn.Linear(config.width, config.width), nn.Linear(config.width, 2 * config.width)
        self.reduce = nn.Conv2d(config.width, config.width, WINDOW, WINDOW)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c = self.config
        batch, count, width = x.shape
        grid = x.transpose(1, 2).reshape(batch, width, *c.grid)
        fewer = self.reduce(grid).flatten(2).transpose(1, 2)
        k, v = self.key_value(fewer).view(batch, -1, 2, c.heads, c.head_width).permute(2, 0, 3, 1, 4)
        q = self.query(x).view(batch, count, c.heads, c.head_width).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width))


class Overlapping(nn.Module):
    """Attention inside windows of two rows that overlap, so that most tokens stand in two of them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c, (rows, columns) = self.config, self.config.grid
        batch, count, width = x.shape
        windows = x.view(batch, rows, columns, width).unfold(1, 2, 1).movedim(-1, 2)
        windows = windows.reshape(-1, 2 * columns, width)
        q, k, v = self.qkv(windows).view(-1, 2 * columns, 3, c.heads, c.head_width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows - 1, 2, columns, width)
        upper, lower = (
            F.pad(part, (0, 0, 0, 0, *ends)) for part, ends in zip(out.unbind(2), ((0, 1), (1, 0)), strict=True)
        )
        return self.out((upper + lower).reshape(batch, count, width))
