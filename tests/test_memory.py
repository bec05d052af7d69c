"""Which nodes share memory: what may be computed anew stays private, what is looked at later is written."""

import operator

import torch
from torch import fx, nn

from idlefx.graph.memory import Memory, has_effect
from idlefx.graph.queries import remove_dead
from idlefx.passes import lower_spellings
from idlefx.records import BlockTable, Plan

aten = torch.ops.aten


def graph_of(function, *inputs):
    program = torch.export.export(_Module(function), inputs)
    return program.module(check_guards=False)


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def lowered(function, *inputs):
    """What is left that writes, after lowering; which computes what it did."""
    module = lower_spellings(graph_of(function, *inputs), Plan((), BlockTable(())))
    module.recompile()
    torch.testing.assert_close(module(*(i.clone() for i in inputs)), function(*(i.clone() for i in inputs)))
    return [str(node.target) for node in module.graph.nodes if has_effect(node)]


def test_private_memory_is_not_written():
    def parts(x):
        q, k, v = (x * 2).unbind(0)
        q *= 3
        return q + k + v

    def selected(x):
        y = x * 2
        q, k = y[0], y[1]
        q *= 3
        return q + k

    def again(x):
        y = x * 2
        y += 1
        return y.mul_(3).view(-1)

    for function in (parts, selected, again):
        assert lowered(function, torch.randn(3, 4)) == []


def test_memory_that_is_looked_at_later_is_written():
    def base(x):
        y = x * 2
        y[0].mul_(3).add_(1)
        return y

    def view(x):
        y = x * 2
        z = y.view(-1)
        y.mul_(3).add_(1)
        return z

    def overlapping(x):
        y = x * 2
        a, b = y[0], y.t()[:, 0]
        a += 1
        return b

    def reshaped(x):
        y = x * 2
        z = y.reshape(-1)
        z += 1
        return y

    for function in (base, view, overlapping, reshaped):
        assert lowered(function, torch.randn(4, 4)), function


def test_parts_share_no_memory():
    graph = fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(aten.unbind.int, (x,))
    one, two = (graph.call_function(operator.getitem, (parts, place)) for place in (0, 1))
    graph.output((one, two))
    memory = Memory(graph)
    assert not memory.share(one, two) and memory.share(one, x) and memory.share(two, parts)
    assert memory.is_seen_outside(one)


def test_an_operator_that_returns_nothing_is_run():
    seen = []

    @torch.library.custom_op("writes::look", mutates_args=())
    def look(x: torch.Tensor) -> None:
        seen.append(float(x.sum()))

    look.register_fake(lambda x: None)
    module = graph_of(lambda x: (torch.ops.writes.look(x), x + 1)[1], torch.ones(3))
    remove_dead(module.graph)
    module.recompile()
    seen.clear()
    module(torch.ones(3))
    assert seen == [3.0]
