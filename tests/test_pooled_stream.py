"""A residual stream that is projected or pooled where a stage begins: blocks are found, and refused by what is true."""

import torch
import torch.nn.functional as F
from torch import nn

import idlefx
from tests.support.messages import says


class Pooled(nn.Module):
    """A block whose queries are pooled from patches on a grid, and added to their own attention, as in MViT."""

    def __init__(self, side, into, stride):
        super().__init__()
        self.side, self.stride = side, stride
        self.norm, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(into)
        self.qkv, self.out = nn.Linear(24, 3 * into), nn.Linear(into, into)
        self.shortcut = nn.Linear(24, into) if stride > 1 else None
        self.mlp = nn.Sequential(nn.Linear(into, 2 * into), nn.GELU(), nn.Linear(2 * into, into))
        self.bias = nn.Linear(into // 2, 1)

    def pooled(self, x):  # (B, N, C)
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.avg_pool2d(grid, self.stride).flatten(2).transpose(1, 2)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (self.pooled(z).unflatten(2, (2, -1)).transpose(1, 2) for z in self.qkv(y).chunk(3, -1))
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits[:, :, 0:, 0:] = logits[:, :, 0:, 0:] + self.bias(q)
        attended = self.out((logits.softmax(-1) @ v + q).transpose(1, 2).flatten(2))
        x = (x if self.shortcut is None else self.pooled(self.shortcut(y))) + attended
        return x + self.mlp(self.norm2(x))


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.blocks = nn.Sequential(Pooled(8, 24, 1), Pooled(8, 24, 2), Pooled(4, 24, 1), Pooled(4, 24, 2))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_every_block_is_found_with_its_mlp_and_its_own_reason():
    blocks = idlefx.inspect(Pyramid().eval(), torch.randn(2, 3, 32, 32))
    assert [block.path for block in blocks] == [f"blocks.{place}" for place in range(4)]
    for block, part in zip(blocks, Pyramid().blocks, strict=True):
        before = [part.bias] if part.shortcut is None else [part.bias, part.norm]  # written in, or in front of the fork
        of = {m: sum(p.numel() for p in m.parameters()) for m in (part, *before)}
        assert block.parameters == of.pop(part) - sum(of.values())
        assert says(block.refusal, "breaks up the token axis", r"test_pooled_stream\.py:\d+: grid"), block.refusal
