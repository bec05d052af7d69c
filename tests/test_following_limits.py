"""Following at its limits: one worker, two image tokens or one, and a stage with a block that cannot follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import idlefx
from idlefx.zoo.reference import Tokens
from idlefx.zoo.reference.groups import Stage
from tests.oracles import following_zoo
from tests.support.following_check import agrees


class Block(nn.Module):
    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """Three blocks, of which some may be causal, on the patches of an image and no prefix."""

    def __init__(self, causal: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(Block(causal=index in causal) for index in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_one_worker_is_followed_by_all():
    model, x = Vit(), torch.randn(3, 3, 16, 16)
    idle = idlefx.convert(model, [0, 2], [0.01, 0.1], idle="follow", example_inputs=x)
    assert [step.kept for step in idle.plan] == [1, 1, 1]
    paths = [f"blocks.{index}" for index in range(3)]
    plan, tokens = [Stage(0, 2, 1), Stage(2, 3, 1)], dict.fromkeys(paths, Tokens((), None))
    assert agrees(idle, (x,), following_zoo.run(model, paths, plan, tokens, lambda: model(x)))


def test_a_single_token_is_refused():
    with pytest.raises(idlefx.PlanError, match=r"block 0 .* cannot idle: it has no image tokens to choose from"):
        idlefx.convert(Vit(), [0], 0.1, idle="follow", example_inputs=torch.randn(3, 3, 4, 4))


def test_two_image_tokens_are_enough():
    model, x = Vit(), torch.randn(3, 3, 4, 8)
    idle = idlefx.convert(model, [1], 0.5, idle="follow", example_inputs=x)
    paths = [f"blocks.{index}" for index in range(3)]
    tokens = dict.fromkeys(paths, Tokens((), None))
    assert agrees(idle, (x,), following_zoo.run(model, paths, [Stage(1, 3, 1)], tokens, lambda: model(x)))


def test_a_stage_that_runs_into_a_block_that_cannot_follow_is_refused():
    model, x = Vit(causal=(2,)), torch.randn(2, 3, 16, 16)
    words = r"block 2 \(blocks.2\) can rest but not follow: .*; leave it out with schedule='blocks'"
    with pytest.raises(idlefx.PlanError, match=words):
        idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=x)
    idle = idlefx.convert(model, [0, 1], 0.5, schedule="blocks", idle="follow", example_inputs=x)
    assert [len(stage) for stage in idle.plan.stages] == [1, 1]
