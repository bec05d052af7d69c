"""What a converted model shares with the one it came from: parameters, checkpoints, copies, number type."""

import copy
import warnings

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import DROPOUTS, MODELS, build, fingerprint, image_tokens, images
from tests.support.cases import (
    Case,
    convert,
    converted,
    random_case,
    relative_error,
    same_selections,
    wanted,
)
from tests.support.gradients import of_squares

HALF = Case((1, 3), 0.5)


def test_conversion_without_gradients_still_trains():
    model = build("vit")
    with torch.no_grad():
        idle = idlefx.convert(model, layers=[1, 3], keep=0.5)
    missing = [key for key, gradient in of_squares(idle, idle(images(model, 2))).items() if gradient is None]
    assert not missing


@torch.no_grad()
def test_checkpoints_load_both_ways(name, model):
    case = random_case(name, "stages")
    idle, other = copy.deepcopy(converted(name, case)), build(name, seed=1)
    assert idle.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in idle.named_buffers()] == [n for n, _ in model.named_buffers()]
    idle.load_state_dict(other.state_dict(), strict=True)
    model.load_state_dict(idle.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    x = images(model, 2, seed=3)
    expected = wanted(other, name, case, x)
    assert same_selections(selections(idle, x), expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_copy_leaves_the_model_untouched(training):
    model = build("vit", **DROPOUTS).train(training)
    model.blocks[2].eval()
    model.pos_embed.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    idle = convert(model, HALF)
    assert fingerprint(model) == before
    assert not idle.get_parameter("pos_embed").requires_grad

    x = images(model, 2)
    idle(x).square().mean().backward()
    torch.optim.SGD(idle.parameters(), lr=0.1).step()
    assert fingerprint(model) == before
    assert not torch.equal(idle.get_parameter("head.weight"), model.head.weight)


@torch.no_grad()
def test_parameters_stand_in_the_order_of_the_model():
    model = build("vit", depth=2)
    model.norm = nn.ModuleDict({"unread": nn.Linear(2, 2), "read": model.norm})
    model.norm.forward = model.norm["read"].forward
    idle = idlefx.convert(model, layers=[1], keep=0.5)
    assert [name for name, _ in idle.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(copy.deepcopy(idle).state_dict()) == list(idle.state_dict()) == list(model.state_dict())


def test_hooks_on_parameters_are_announced_where_they_get_lost():
    model, seen = build("vit", depth=2), []
    model.norm.weight.register_hook(lambda _: seen.append("gradient"))
    model.head.weight.register_post_accumulate_grad_hook(lambda _: seen.append("stored"))
    words = "^`norm.weight`, `head.weight`: hooks on gradients of parameters are not taken over.*copy=False"
    with pytest.warns(UserWarning, match=words):
        idle = idlefx.convert(model, layers=[1], keep=0.5)
    idle(images(model, 2)).sum().backward()
    assert not seen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = idlefx.convert(model, layers=[1], keep=0.5, copy=False)
    shared(images(model, 2)).sum().backward()
    assert set(seen) == {"gradient", "stored"}


def test_without_copy_the_parameters_are_shared():
    model = build("registers")
    idle = convert(model, HALF, copy=False)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[key] for key, parameter in idle.named_parameters())
    model.load_state_dict(build("registers", seed=1).state_dict())
    x = images(model, 2)
    assert relative_error(idle(x), wanted(model, "registers", HALF, x).output) <= 1e-5


@torch.no_grad()
def test_deepcopy_is_whole_and_independent():
    model = build("vit", **DROPOUTS)
    idle = convert(model, HALF)
    x = images(model, 3)
    before = idle(x)
    twin = copy.deepcopy(idle)
    assert list(twin.plan) == list(idle.plan) and str(twin.plan.blocks) == str(idle.plan.blocks)
    assert same_selections(selections(twin, x), selections(idle, x))
    assert torch.equal(twin(x), before)
    assert not torch.equal(twin.train()(x), before)
    twin.eval().load_state_dict(build("vit", seed=1).state_dict())
    assert not torch.allclose(twin(x), before, atol=1e-3)
    assert torch.equal(idle(x), before)


class ShorterInTraining(nn.Module):
    """Has a block less in train mode, and a constant of another value."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, depth = (torch.tensor([2.0]), 3) if self.training else (torch.tensor([1.0]), 4)
        tokens = self.vit._pos_embed(self.vit.patch_embed(x)) * scale
        for block in self.vit.blocks[:depth]:
            tokens = block(tokens)
        return self.vit.head(tokens[:, 0])


@torch.no_grad()
def test_where_train_mode_cannot_idle_the_constants_are_those_of_eval_mode():
    model = ShorterInTraining().eval()
    x = images(model.vit, 2)
    with pytest.warns(UserWarning, match="in train mode the model has other blocks"):
        idle = idlefx.convert(model, layers=[1], keep=1.0, example_inputs=x)
    assert torch.equal(idle(x), model(x))
    assert torch.equal(copy.deepcopy(idle)(x), model(x))  # a copy makes its code of the graph anew


@torch.no_grad()
def test_moving_average_of_weights_works():
    model, other = build("vit"), build("vit", seed=1)
    idle = convert(model, HALF)
    average = ModelEmaV3(idle, decay=0.5)
    idle.load_state_dict(other.state_dict())
    average.update(idle)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.lerp_(new, 0.5)
    x = images(model, 2)
    assert relative_error(average(x), wanted(model, "vit", HALF, x).output) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "qk_norm", "siglip", "hand_written"])
def test_bfloat16_stays_bfloat16(family):
    model = build(family).to(torch.bfloat16)
    x = images(model, 3).to(torch.bfloat16)
    idle = idlefx.convert(model, layers=[1, 3], keep=0.5)
    assert {parameter.dtype for parameter in idle.parameters()} == {torch.bfloat16}
    out = idle(x)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    prefix, tokens = MODELS[family].prefix, image_tokens(model)
    assert {b: s.shape[1] for b, s in selections(idle, x).items()} == {
        1: prefix + tokens // 2,
        2: prefix + tokens // 2,
        3: prefix + tokens // 4,
    }
    assert torch.equal(idlefx.convert(model, layers=[0], keep=1.0)(x), model(x))
