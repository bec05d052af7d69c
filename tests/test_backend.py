"""Compiled equals eager; one graph serves every batch size; a compiled model that is off is refused."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import idlefx
from idlefx.deploy.parity import TOLERANCE, check_parity, example_of
from tests.models.small import SMALL, build, images


@pytest.fixture
def idle():
    return idlefx.convert(build("vit"), [1, 3], 0.5, schedule="blocks")


@torch.no_grad()
def test_compiled_equals_eager_in_one_graph_for_all_batches():
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 2}).eval()
    idle = idlefx.convert(model, [0, 1], 0.5)
    counter = CompileCounterWithBackend("inductor")
    fast = idlefx.compile(idle, backend=counter)  # refuses more than one graph
    for batch in (3, 5):
        x = images(model, batch)
        assert torch.allclose(fast(x), idle(x), atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_batch_that_is_not_free_is_compiled_anew(idle):
    counter = CompileCounterWithBackend("eager")
    fast = idlefx.compile(idle, backend=counter, dynamic=False, verify=False)
    for batch in (3, 5):
        fast(torch.randn(batch, 3, 48, 48))
    assert counter.frame_count == 2


def test_each_model_is_compiled_by_itself(idle):
    """Dynamo compiles one code eight times at most, so each has its own."""
    models = idle, copy.copy(idle), copy.deepcopy(idle)
    assert len({id(model.forward.__code__) for model in models}) == 3


@pytest.mark.slow
def test_going_from_mode_to_mode_compiles_nothing_anew():
    counter = CompileCounterWithBackend("eager")
    fast = idlefx.compile(idlefx.convert(build("vit", depth=2, drop_rate=0.5), [1], 0.5), backend=counter)
    for _ in range(3):
        fast.train()(torch.randn(2, 3, 48, 48))
        fast.eval()(torch.randn(2, 3, 48, 48))
    assert counter.frame_count == 3  # eval without gradients, train, eval with gradients


def test_an_edited_graph_runs_as_edited(idle):
    edited = copy.deepcopy(idle)
    x, forward = torch.randn(2, 3, 48, 48), type(edited).forward
    edited.recompile()
    assert type(edited).forward is forward
    (norm,) = (node for node in edited.graph.nodes if node.target == "norm")
    norm.replace_all_uses_with(norm.args[0])
    edited.recompile()
    assert not torch.equal(edited(x), idle(x))


def faulty(gm, _):
    return lambda *inputs: [0.99 * out for out in gm(*inputs)]


def test_compiled_model_that_is_off_is_refused(idle):
    with pytest.raises(idlefx.ParityError, match=r"compiled model differs from the eager one by 0\.01 .* verify=False"):
        idlefx.compile(idle, backend=faulty)
    x = torch.randn(2, 3, 48, 48)
    assert torch.allclose(idlefx.compile(idle, backend=faulty, verify=False)(x), 0.99 * idle(x))


def test_parity_notices_what_is_no_number(idle):
    with pytest.raises(idlefx.ParityError, match="differs from the eager one by nan"):
        check_parity(idle, lambda x: idle(x) * float("nan"), "other")


class Swaying(nn.Module):
    """A head that makes much of a rounding, as quantised activations do."""

    def forward(self, x):
        return torch.sin(3e4 * x)


@torch.no_grad()
def test_what_a_rounding_does_to_the_eager_model_too_is_no_fault(idle):
    swaying = copy.deepcopy(idle)
    swaying.head = nn.Sequential(swaying.head, Swaying())
    error = check_parity(swaying, lambda x: swaying(x * (1 - 1e-7)), "other")
    assert TOLERANCE[torch.float32] < error < 0.1
    with pytest.raises(idlefx.ParityError, match=r"other model differs from the eager one by 0\.5"):
        check_parity(swaying, lambda x: 0.5 * swaying(x), "other")


def test_model_in_train_mode_is_not_run(idle):
    def never(gm, _):
        raise AssertionError("it was compiled")

    assert idlefx.compile(idle.train(), backend=never).training


def test_example_has_the_structure_of_the_inputs():
    model = build("vit")
    (x,), keywords = example_of(idlefx.convert(model, [1], 0.5))
    assert (x.shape, x.dtype, keywords) == ((2, 3, 48, 48), torch.float32, {})
    named = idlefx.convert(model, [1], 0.5, example_inputs={"x": images(model, 2)})
    args, keywords = example_of(named)
    assert args == () and list(keywords) == ["x"]
    half = idlefx.convert(build("vit").bfloat16(), [1], 0.5)
    assert example_of(half)[0][0].dtype == torch.bfloat16
    assert check_parity(half, half, "same") == 0.0 < TOLERANCE[torch.bfloat16]
