"""torchao and PEFT, where they are installed, on converted models."""

import copy

import pytest
import torch
from torch import nn

import idlefx
from tests.models.small import build, images
from tests.support.cases import relative_error

PLAN = {"layers": [1], "keep": 0.5}


@pytest.fixture(params=["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def quantised(request):
    """A function that quantises the linear layers of a model."""
    torchao = pytest.importorskip("torchao.quantization")

    def quantise(model):
        torchao.quantize_(model, getattr(torchao, request.param)())
        return model

    return quantise


@torch.no_grad()
def test_what_was_converted_can_be_quantised(quantised):
    model = build("vit")
    x = images(model, 3)
    same, idle = (quantised(idlefx.convert(model, layers=[1], keep=keep)) for keep in (1.0, 0.5))
    assert sum(type(parameter) is not nn.Parameter for parameter in idle.parameters()) == 17
    assert torch.equal(same(x), quantised(copy.deepcopy(model))(x))
    assert torch.equal(copy.deepcopy(idle)(x), idle(x))
    assert torch.equal(idlefx.with_cut_loss(idle)(x)[0], idle(x))
    compiled = torch.compile(idle, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), idle(x)) <= 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_what_was_quantised_is_compiled_and_packaged(quantised, idle, tmp_path):
    model = build("vit", depth=2)
    x = images(model, 3)
    plain = idlefx.convert(model, [1], 0.5, idle=idle)
    in_int8 = quantised(copy.deepcopy(plain))
    rounding = relative_error(in_int8(x), plain(x))
    assert 1e-3 < rounding < 5e-2
    path = idlefx.package(in_int8, tmp_path / "m.pt2", batch=(1, 4))
    for form in (idlefx.compile(in_int8), idlefx.load(path)):
        assert relative_error(form(x), in_int8(x)) <= 2 * rounding


@torch.no_grad()
def test_what_was_quantised_is_converted_or_refused_with_the_remedy(quantised, request):
    model = quantised(build("vit"))
    if "WeightOnly" in request.node.name:
        idle, other = idlefx.convert(model, **PLAN), quantised(idlefx.convert(build("vit"), **PLAN))
        x = images(model, 3)
        assert torch.equal(idle(x), other(x))
    else:
        with pytest.raises(idlefx.PlanError, match=r"Int8Tensor; convert it before it is quantised, and quantise the"):
            idlefx.convert(model, **PLAN)


def test_the_backend_refuses_quantised_weights(quantised):
    model = quantised(build("vit"))
    compiled = torch.compile(model, backend="idlefx", options=PLAN)
    torch._dynamo.reset()
    with (
        pytest.raises(Exception, match=r"Int8Tensor, which the backend cannot look into; use idlefx.convert"),
        torch.no_grad(),
    ):
        compiled(images(model, 2))


def test_adapters_train_after_the_conversion():
    peft = pytest.importorskip("peft")
    model = build("vit")
    config = peft.LoraConfig(target_modules=["proj", "fc1", "fc2"], r=4, init_lora_weights=False)
    x = images(model, 3)
    results = []
    for first in (True, False):
        torch.manual_seed(0)
        if first:
            idle = idlefx.convert(peft.get_peft_model(copy.deepcopy(model), config).base_model.model, **PLAN)
        else:
            idle = idlefx.convert(model, **PLAN)
            adapted = peft.get_peft_model(idle, config)
        results.append(idle(x))
    assert torch.equal(*results)
    output, loss = idlefx.with_cut_loss(idle)(x)
    (output.square().mean() + loss).backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 26 and all("lora_" in name for name in trained)
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    merged = adapted.merge_and_unload()
    assert merged is idle and relative_error(merged(x), results[1]) <= 1e-5


def test_adapters_where_tokens_are_scored_come_before_the_conversion():
    peft = pytest.importorskip("peft")
    model = build("vit")
    config = peft.LoraConfig(target_modules=["qkv"], r=4, init_lora_weights=False)
    idle = idlefx.convert(model, **PLAN)
    peft.get_peft_model(idle, config)
    with pytest.raises(idlefx.InputError, match=r"`blocks.1.attn.qkv` is a peft.*Linear now, .* change it before"):
        idle(images(model, 2))
    peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(idlefx.convert(model, layers=[1], keep=1.0)(images(model, 2)), model(images(model, 2)))
        assert idlefx.convert(model, **PLAN)(images(model, 2)).isfinite().all()
