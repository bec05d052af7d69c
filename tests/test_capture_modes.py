"""Capture sees the same model in whatever mode its caller is: under no_grad, in inference mode, with frozen weights."""

import contextlib
from functools import cache

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import idlefx
from idlefx.deploy import torch_compile
from tests.models.small import build, images
from tests.support.gradients import of_squares

MODES = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
PLAN = {"layers": [1], "keep": 0.5}


class Encoder(nn.Module):
    """A ViT of torch's own encoder layers, which have a fast path without gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 32, 16, 16)
        self.positions, self.token = nn.Parameter(torch.randn(1, 17, 32)), nn.Parameter(torch.randn(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch_compile, "compile_graph", lambda module, _: module)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.mha.set_fastpath_enabled(True)


@cache
def wanted() -> idlefx.IdleModule:
    """What the encoder becomes where nothing hides its attention."""
    return idlefx.convert(Encoder().eval(), **PLAN, example_inputs=torch.randn(2, 3, 64, 64))


BASIC = [("no_grad", True), ("inference_mode", False)]


@pytest.mark.parametrize(
    ("mode", "frozen"),
    [
        pytest.param(mode, frozen, marks=() if (mode, frozen) in BASIC else pytest.mark.slow)
        for mode in MODES
        for frozen in (False, True)
    ],
)
def test_fast_path_of_encoders_hides_nothing(mode, frozen):
    model, x = Encoder().eval().requires_grad_(not frozen), torch.randn(2, 3, 64, 64)
    with MODES[mode]():
        idle = idlefx.convert(model, **PLAN, example_inputs=x)
    assert len(idle.plan.blocks) == 3
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.allclose(idle(x), wanted()(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_the_fast_path_computes_is_what_keeping_all_does(frozen):
    model, x = Encoder().eval().requires_grad_(not frozen), torch.randn(2, 3, 64, 64)
    assert torch.allclose(idlefx.convert(model, [1], 1.0, example_inputs=x)(x), model(x), atol=1e-5)
    assert len(idlefx.inspect(model, x)) == 3


def test_fast_path_is_switched_on_again_after_a_refusal():
    with pytest.raises(idlefx.IdleFxError):
        idlefx.convert(Encoder(), **PLAN, example_inputs=torch.randn(2, 4, 64, 64))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("mode", ["no_grad", pytest.param("inference_mode", marks=pytest.mark.slow)])
def test_backend_refuses_the_fast_path(mode, eager):
    model, x = Encoder().eval(), torch.randn(2, 3, 64, 64)
    with MODES[mode]():
        with pytest.raises(BackendCompilerFailed, match=r"fast path hides .*\(at .*test_capture_modes.*set_fastpath"):
            torch.compile(model, backend="idlefx", options=PLAN)(x)
        torch.backends.mha.set_fastpath_enabled(False)
        torch._dynamo.reset()
        found = torch.compile(model, backend="idlefx", options=PLAN)(x)
    assert torch.allclose(found, idlefx.convert(model, **PLAN, example_inputs=x)(x), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_converted_in_inference_mode_trains(mode):
    with MODES[mode]():
        model = build("vit", drop_path_rate=0.1)
        x = images(model, 2)
        idle = idlefx.convert(model, **PLAN, example_inputs=x)
        guessed = idlefx.convert(model, **PLAN)
    for each in (idle, guessed):
        each.train()
        gradients = of_squares(each, each(images(model, 2).clone()))
        assert all(gradient is not None for gradient in gradients.values())
