"""A bias that is computed of the queries is no attention, and leads to none before it: each block keeps its own."""

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.zoo.survey import check, find

WIDTH, HEADS, SIDE = 24, 2, 4


class Block(nn.Module):
    """Attention over a grid of tokens (B, N, C) with decomposed relative position, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rows, self.columns = (nn.Parameter(torch.randn(SIDE, SIDE, WIDTH // HEADS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = q @ k.transpose(-2, -1)
        grid = q.reshape(batch * HEADS, SIDE, SIDE, -1)
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, self.rows)[..., :, None]
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, self.columns)[..., None, :]
        logits = logits + (by_row + by_column).reshape(batch, HEADS, count, count)
        return x + self.out(((logits / 2).softmax(-1) @ v).transpose(1, 2).reshape(batch, count, WIDTH))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Linear(12, WIDTH), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_every_block_holds_its_own_attention():
    table = idlefx.inspect(Model().eval(), torch.randn(2, SIDE**2, 12))
    assert [(block.path, len(block.cores)) for block in table] == [(f"blocks.{i}", 1) for i in range(3)]
    assert len({block.macs for block in table}) == 1


@pytest.mark.parametrize("label", [pytest.param("SAM vision, eager", marks=pytest.mark.slow), "ViTDet backbone, eager"])
def test_rows_of_the_compatibility_table_say_how_many_blocks_there_are(label):
    pytest.importorskip("transformers")
    (entry,) = find(f"^{label}")
    row = check(entry)
    assert entry.blocks == row.found == 3 and not row.failure, row
