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


@pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")
def test_refusal_is_that_of_the_axis_that_went_furthest():
    table = idlefx.inspect(Fixed().eval(), torch.randn(2, 9, 12))
    assert len(table) == 2
    for block in table:
        assert says(block.refusal, r"cumsum.*has no rule", r"test_refused_axis\.py:\d+: return x \+ self\.mix"), table
