"""Gradients of a model's own, which a trace loses: used for inference with a warning, refused for training."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import idlefx
from idlefx.capture.custom_gradients import custom_gradient
from idlefx.deploy import torch_compile
from tests.models.small import build, images
from tests.support.messages import refusal, says


class Reverse(torch.autograd.Function):
    """The gradient with its sign changed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Round(torch.autograd.Function):
    """Rounding whose gradient goes straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def halved(x):
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 0.5)
    return x


class Changed(nn.Module):
    """A ViT with something between features and head."""

    def __init__(self, change):
        super().__init__()
        self.vit, self.change = build("vit"), change

    def forward(self, x):
        return self.vit.head(self.change(self.vit.forward_features(x)[:, 0]))


class InTraining(nn.Module):
    """Reverses the gradient in train mode only."""

    def forward(self, x):
        return Reverse.apply(x) if self.training else x


def hooked():
    model = Changed(nn.Identity())
    model.vit.norm.register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
    return model


OWN = {
    "reversal": (lambda: Changed(Reverse.apply), "autograd function Reverse"),
    "straight through": (lambda: Changed(Round.apply), "autograd function Round"),
    "tensor hook": (lambda: Changed(halved), "hook on a tensor"),
    "checkpoint": (lambda: Changed(lambda x: checkpoint(torch.tanh, x, use_reentrant=True)), "use_reentrant=True"),
    "module hook": (hooked, "backward hook on a module"),
}
PLAIN = {
    "straight through": lambda x: x + (x.round() - x).detach(),
    "reversal": lambda x: 2 * x.detach() - x,
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
}


def gradients(module, output):
    module.zero_grad()
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def converted(model, keep):
    return idlefx.convert(model, [1], keep, example_inputs=images(model.vit, 2))


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch_compile, "compile_graph", lambda module, _: module)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("keep", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OWN)
def test_own_gradients_are_for_inference_only(name, keep):
    make, what = OWN[name]
    model = make().eval()
    x = images(model.vit, 2)
    with pytest.warns(UserWarning, match=f"{what}.*test_custom_gradients.*for inference only"):
        idle = converted(model, keep)
    with torch.no_grad():
        assert keep < 1 or torch.equal(idle(x), model(x))
    words = (what, r"test_custom_gradients\.py:\d+", "inference only", "detach", "convert the part")
    for twin in (idle, copy.deepcopy(idle)):
        assert says(refusal(twin.train), *words)
        assert says(refusal(idlefx.with_cut_loss, twin), *words)
        if name != "checkpoint":  # what runs it again lets no gradients through at all
            assert says(refusal(twin(x).sum().backward), *words), "eval mode can be trained in too"
    assert says(refusal(converted, model.train(), keep), *words)


def test_backward_hooks_do_not_fix_the_batch():
    """`len` leaves the batch free in a strict trace only, which torch refuses to make of a module with such hooks."""
    model = Changed(lambda x: x.expand(len(x), -1)).eval()
    hook = model.vit.norm.register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
    with pytest.warns(UserWarning, match="backward hook on a module"):
        idle = idlefx.convert(model, [1], 0.5, example_inputs=images(model.vit, 2), copy=False)
    assert idle.conversion.batch_free and idle(images(model.vit, 3)).shape[0] == 3
    assert hook.id in model.vit.norm._backward_hooks, "the model keeps its hooks"


def test_frozen_parameters_may_be_thawed():
    model = Changed(Reverse.apply).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="autograd function Reverse"):
        converted(model, 0.5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_own_gradients_in_train_mode_only_are_seen():
    model = Changed(InTraining()).eval()
    with pytest.warns(UserWarning, match="autograd function Reverse"):
        idle = converted(model, 0.5)
    assert says(refusal(idle.train), "Reverse")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operations_keep_their_gradients(name):
    model = Changed(PLAIN[name]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the model checkpoints activations")  # which is another matter
        idle = converted(model, 1.0).train()
    x = images(model.vit, 2)
    wanted, found = gradients(model, model(x)), gradients(idle, idle(x))
    assert all(torch.allclose(wanted[key], found[key], atol=1e-6) for key in wanted if wanted[key] is not None)


@pytest.mark.parametrize("name", ["reversal", "straight through", "tensor hook"])
def test_backend_keeps_own_gradients_or_refuses(name, eager):
    model = OWN[name][0]().eval()
    x = images(model.vit, 2)
    wanted = copy.deepcopy(gradients(model, model(x)))
    dense = torch.compile(model, backend="idlefx", options={"layers": [1], "keep": 1.0})
    found = gradients(model, dense(x))
    assert all(torch.allclose(wanted[key], found[key], atol=1e-6) for key in wanted)
    idling = torch.compile(copy.deepcopy(model), backend="idlefx", options={"layers": [1], "keep": 0.5})
    with pytest.raises(BackendCompilerFailed, match=r"gradients of the model's own would be lost \(at .*detach"):
        idling(x)
    with torch.no_grad():
        assert idling(x).isfinite().all(), "without gradients there is nothing to lose"


@pytest.mark.slow
def test_compiled_converted_model_refuses_too():
    model = Changed(Reverse.apply).eval()
    with pytest.warns(UserWarning):
        idle = converted(model, 0.5)
    x = images(model.vit, 2)
    fast = torch.compile(idle, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(fast(x), idle(x), atol=1e-5)
    assert says(refusal(lambda: fast(x).sum().backward()), "Reverse", "inference only")


def test_what_a_backward_would_need_is_not_kept_while_looking():
    x, results = torch.ones(3, requires_grad=True), list[torch.Tensor]()
    assert custom_gradient(lambda: results.append(x.exp().exp()) or results[0]) == ""
    with pytest.raises(RuntimeError, match="not kept"):
        results[0].sum().backward()
