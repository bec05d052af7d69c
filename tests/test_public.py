"""What is public: the names, what importing them costs, and what a converted model answers to."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import idlefx
import idlefx.finetune
from tests.models.small import DEPTH, build, images

LOADED = """
import sys, idlefx
idlefx.convert, idlefx.report
print([module for module in ("matplotlib", "torch._inductor", "torch._dynamo") if module in sys.modules])
"""


@pytest.mark.parametrize("module", [idlefx, idlefx.finetune])
def test_public_names_are_there(module):
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Walk'"):
        _ = idlefx.Walk


def test_import_loads_neither_matplotlib_nor_inductor():
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_types_that_users_name_are_those_of_the_results():
    idle = idlefx.convert(build("vit"), [1], 0.5)
    assert isinstance(idle, idlefx.IdleModule) and isinstance(idle.conversion, idlefx.Conversion)
    assert isinstance(idle.plan, idlefx.Plan) and isinstance(idle.plan.blocks, idlefx.BlockTable)
    assert isinstance(idle.plan[0], idlefx.Step) and isinstance(idle.plan.blocks[0], idlefx.Block)


def test_blocks_of_the_model_keep_their_name_and_their_ways():
    model = build("vit")
    idle = idlefx.convert(model, [1], 0.5, copy=False)
    for twin in (idle, copy.deepcopy(idle)):
        assert len(twin.blocks) == DEPTH and [*twin.blocks.parameters()]
        own, original = twin.blocks[2].state_dict(), model.blocks[2].state_dict()
        assert own.keys() == original.keys()
        assert all(torch.equal(own[name], original[name]) for name in own)
    assert idle.blocks[2].attn.qkv.weight is model.blocks[2].attn.qkv.weight


def test_lists_of_lists_are_lists_again():
    vit = build("vit")

    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.stages = vit, nn.ModuleList(map(nn.ModuleList, ([*vit.blocks[:2]], [*vit.blocks[2:]])))
            del vit.blocks

        def forward(self, x):
            tokens = self.vit._pos_embed(self.vit.patch_embed(x))
            for stage in self.stages:
                for block in stage:
                    tokens = block(tokens)
            return self.vit.head(tokens[:, 0])

    model = Staged().eval()
    idle = idlefx.convert(model, [1], 0.5, example_inputs=images(build("vit"), 2), copy=False)
    assert [len(stage) for stage in idle.stages] == [2, DEPTH - 2]
    assert idle.stages[1][0].attn.qkv.weight is model.stages[1][0].attn.qkv.weight


@pytest.mark.parametrize("name", ["data", "finetune", "models", "passes"])
def test_submodule_is_there_without_an_import_of_its_own(name):
    looks = f"import idlefx; print(idlefx.{name}.__name__)"
    ran = subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"idlefx.{name}"


class Planned(nn.Module):
    """A model with parts of its own that are called as the attributes of a converted model are."""

    def __init__(self):
        super().__init__()
        vit = build("vit")
        self.conversion, self.blocks, self.plan = vit.patch_embed, vit.blocks, vit.head
        self.embed = nn.Parameter(vit.pos_embed.detach()[:, 1:])

    def forward(self, x):
        return self.plan(self.blocks(self.conversion(x) + self.embed).mean(1))


def test_model_whose_parts_are_called_plan_and_conversion_converts():
    model = Planned().eval()
    x = images(build("vit"), 3)
    idle = idlefx.convert(model, [1], 0.5, example_inputs=x)
    assert isinstance(idle.plan, nn.Module) and isinstance(idle.conversion, nn.Module)
    assert "image tokens kept" in str(idle.meta["idlefx"].plan)
    assert str(idlefx.report(idle)) and idle(x).shape == model(x).shape
    everything = idlefx.convert(model, [1], 1.0, example_inputs=x)
    assert torch.equal(everything(x), model(x))


def test_table_is_what_a_model_without_blocks_of_its_own_calls_so():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = build("vit")

        def forward(self, x):
            return self.vit(x)

    idle = idlefx.convert(Renamed().eval(), [1], 0.5, example_inputs=images(build("vit"), 2))
    assert idle.blocks is idle.plan.blocks
