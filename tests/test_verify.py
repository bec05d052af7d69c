"""The checker of passes, shown to fail on every kind of fault, and the runner that names the culprit."""

import pytest
import torch
from torch import fx

import idlefx
from idlefx import pipeline
from idlefx.capture.export import capture
from idlefx.graph import inference
from idlefx.graph.build import add_call
from idlefx.graph.queries import output_of
from idlefx.options import PlanOptions
from idlefx.planning.schedule import make_plan
from idlefx.records import Plan
from idlefx.rewriting.verify import promise_of, verify
from tests.models.small import build, images

aten = torch.ops.aten


def captured() -> fx.GraphModule:
    model = build("vit")
    return capture(model, images(model, 2)).eval_graph


def first(module: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target is target)


def test_a_captured_graph_passes():
    module = captured()
    verify(module, promise_of(module), "nothing")


def stale_value(module: fx.GraphModule) -> None:
    node = first(module, aten.gelu.default)
    node.meta["val"] = node.meta["val"].sum(-1)


def missing_value(module: fx.GraphModule) -> None:
    del first(module, aten.gelu.default).meta["val"]


def operation_that_does_not_fit(module: fx.GraphModule) -> None:
    node = first(module, aten.reshape.default)
    node.args = (node.args[0], [7, 7])


def another_type(module: fx.GraphModule) -> None:
    output = next(iter(reversed(module.graph.nodes)))
    last = output.all_input_nodes[0]
    with module.graph.inserting_before(output):
        half = module.graph.call_function(aten.to.dtype, (last, torch.float64))
    half.meta["val"] = last.meta["val"].double()
    last.replace_all_uses_with(half, lambda user: user is output)


def lost_parameter(module: fx.GraphModule) -> None:
    del module.head.weight


def lost_buffer(module: fx.GraphModule) -> None:
    module.register_buffer("surplus", torch.zeros(1))


def wrong_order(module: fx.GraphModule) -> None:
    node = first(module, aten.gelu.default)
    node.all_input_nodes[0].prepend(node)


FAULTS = [
    stale_value, missing_value, operation_that_does_not_fit, another_type, lost_parameter, lost_buffer, wrong_order
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_every_fault_is_found_and_the_pass_is_named(fault):
    module = captured()
    promise = promise_of(module)
    fault(module)
    with pytest.raises(idlefx.PassError, match="in pass culprit"):
        verify(module, promise, "culprit")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_runner_stops_at_the_pass_that_broke_the_graph(fault, monkeypatch):
    def clumsy(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
        fault(module)
        return module

    monkeypatch.setattr(pipeline, "SPELL", (*pipeline.SPELL, clumsy))
    with pytest.raises(idlefx.PassError, match="in pass clumsy"):
        idlefx.inspect(build("vit"), torch.randn(2, 3, 48, 48))


def test_an_equal_number_of_another_type_is_inferred_again():
    graph = captured().graph
    with graph.inserting_before(output_of(graph)):
        ones = add_call(graph, aten.full.default, [2], 1, name="ones", like=output_of(graph))
    assert inference.is_trusted(ones) and ones.meta["val"].dtype == torch.int64
    ones.args = ([2], 1.0)  # equal, but gives floating-point numbers
    assert not inference.is_trusted(ones)
    inference.forget(graph)


def test_a_pass_that_raises_is_named_too(monkeypatch):
    def broken(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(pipeline, "REST", (broken,))
    with pytest.raises(idlefx.PassError, match="in pass broken: ZeroDivisionError: oh"):
        idlefx.convert(build("vit"), [1], 0.5, example_inputs=torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("step", [*pipeline.SPELL, *pipeline.REST, *pipeline.FOLLOW], ids=lambda f: f.__name__)
def test_a_pass_with_nothing_to_do_returns_the_same_graph(step):
    module = captured()
    before = str(module.graph)
    blocks = pipeline.find_blocks(module)
    assert step(module, make_plan(blocks, PlanOptions([0], 1.0))) is module
    assert str(module.graph) == before
