"""Blocks that read more than the stream, or whose attention takes no term for each key, where tokens follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import idlefx
from idlefx.zoo.reference import Tokens
from idlefx.zoo.reference.groups import Stage
from tests.oracles import following_zoo
from tests.support.following_check import agrees


class Reading(nn.Module):
    """A block whose attention branch reads what an earlier block returned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + (out if earlier is None else out + self.read(earlier))


class ReadingVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(Reading() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        first = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](first), first)
        return self.head(self.blocks[3](x, first).mean(1))


def test_a_block_may_read_what_an_earlier_one_of_its_stage_returned():
    torch.manual_seed(0)
    model, x = ReadingVit(), torch.randn(3, 3, 24, 24)
    idle = idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=x)
    assert [len(stage) for stage in idle.plan.stages] == [4]
    paths = [f"blocks.{index}" for index in range(4)]
    tokens = dict.fromkeys(paths, Tokens((), None))
    assert agrees(idle, (x,), following_zoo.run(model, paths, [Stage(0, 4, 18)], tokens, lambda: model(x)))


class Causal(nn.Module):
    """A block whose attention takes no mask besides its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CausalVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = Causal()
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_attention_that_takes_no_term_is_refused_for_following_alone():
    model, x = CausalVit(), torch.randn(2, 3, 16, 16)
    words = r"block 0 \(block\) can rest but not follow: .*is causal, and takes no other mask.*blocks.py:\d+: "
    with pytest.raises(idlefx.PlanError, match=words):
        idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=x)
    assert idlefx.convert(model, [0], 0.5, example_inputs=x)(x).shape == (2, 10)
    assert "rest only: " in str(idlefx.inspect(model, x))
