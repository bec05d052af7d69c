"""Where several dimensions may hold the tokens, the refusal is that of the one which does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import idlefx
from tests.support.messages import says

WIDTH = 24


class Block(nn.Module):
    """Attention over tokens (N, B, C), with an MLP that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 1, 3, 0, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2))
        return x + self.mix(x).cumsum(0)


class Fixed(nn.Module):
    """Its own code fixes the batch, so that any dimension may hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Linear(12, WIDTH), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.reshape(2, 9, 12)).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


class Convolving(nn.Module):
    """Attention over (B, N, C), then a depth-wise convolution over (B, C, H, W), then an MLP."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.positions = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = grid + self.positions(grid)
        x = grid.flatten(2).transpose(1, 2)
        return x + self.mlp(x)


class Pyramid(nn.Module):
    """A block with as many rows as features, and two with half the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.halves = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(map(Convolving, (WIDTH, WIDTH // 2, WIDTH // 2)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](self.patches(images).flatten(2).transpose(1, 2))
        x = self.halves(x.transpose(1, 2).unflatten(2, (WIDTH, WIDTH))).flatten(2).transpose(1, 2)
        return self.blocks[2](self.blocks[1](x))


def test_refusal_names_a_convolution_where_there_are_as_many_rows_as_features():
    table = idlefx.inspect(Pyramid().eval(), torch.randn(2, 3, 2 * WIDTH, 2 * WIDTH))
    assert len(table) == 3
    for block in table:
        assert says(
            block.refusal, r"conv2d.*convolves over neighbouring tokens", r"test_refused_axis\.py:\d+: grid = grid"
        ), table


class Turning(nn.Module):
    """Attention over a square grid (B, H, W, C), whose rows and columns are swapped behind each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, WIDTH)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, 12)
        x = self.patches(x)
        for attention in self.attentions:
            y = x.flatten(1, 2)
            x = x + attention(y, y, y, need_weights=False)[0].view_as(x)
            x = x.transpose(1, 2)
        return x


def test_block_that_turns_the_grid_is_refused():
    table = idlefx.inspect(Turning().eval(), torch.randn(2, 4, 4, 12))
    said = r"the tokens leave the block in another order \(at .*test_refused_axis\.py:\d+: x = x\.transpose\(1, 2\)\)"
    assert len(table) == 2 and all(says(block.refusal, said) for block in table), table


@pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")
def test_refusal_is_that_of_the_axis_that_went_furthest():
    table = idlefx.inspect(Fixed().eval(), torch.randn(2, 9, 12))
    assert len(table) == 2
    for block in table:
        assert says(block.refusal, r"cumsum.*has no rule", r"test_refused_axis\.py:\d+: return x \+ self\.mix"), table
