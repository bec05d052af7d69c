"""A converted model goes through files and into other processes, and comes out as it was."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch.fx.graph import CodeGen

import idlefx
from idlefx.graph.storage import Operator, StoredGraph, StoredNode, restore
from idlefx.runtime.module import IdleModule
from idlefx.runtime.selections import selections
from tests.models.small import DROPOUTS, Wrapper, build, images


def through_pickle(idle):
    return pickle.loads(pickle.dumps(idle))


def through_torch(idle):
    file = io.BytesIO()
    torch.save(idle, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [through_pickle, through_torch, copy.copy, copy.deepcopy, IdleModule._replicate_for_data_parallel]


@pytest.fixture(scope="module")
def model():
    return build("registers", **DROPOUTS)


@pytest.fixture(scope="module")
def idle(model):
    idle = idlefx.convert(model, layers=[1, 3], keep=0.5)
    idle.get_parameter("pos_embed").requires_grad_(False)
    idle.note = {"of": "its owner"}
    return idle


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def other(request, idle):
    return request.param(idle)


def same_graph(graph, other):
    """Whether two graphs call the same operations on values of the same shapes, and tell the same of them."""

    def line(node):
        values = [
            (str(tuple(v.shape)).count("s"), [s for s in v.shape if isinstance(s, int)], v.dtype)
            for v in torch.utils._pytree.tree_leaves(node.meta.get("val"))
            if isinstance(v, torch.Tensor)
        ]
        return (
            node.name,
            node.op,
            node.target,
            node.args,
            node.kwargs,
            values,
            node.meta.get("idlefx"),
            node.stack_trace,
        )

    return list(map(str, map(line, graph.nodes))) == list(map(str, map(line, other.nodes)))


def test_all_of_it_comes_out(model, idle, other):
    assert type(other).__mro__[1] is IdleModule and other.training == idle.training
    assert other.conversion.options == idle.conversion.options and other.plan == idle.plan
    for mode in (True, False):
        form, there = idle.conversion.form(mode), other.conversion.form(mode)
        assert same_graph(form.source, there.source) and same_graph(form.graph, there.graph)
    for tensors in ("named_parameters", "named_buffers"):
        before, after = list(getattr(idle, tensors)()), list(getattr(other, tensors)())
        assert [name for name, _ in before] == [name for name, _ in after]
        assert all(
            a.equal(b) and a.requires_grad == b.requires_grad for (_, a), (_, b) in zip(before, after, strict=True)
        )
    assert list(other.state_dict()) == list(idle.state_dict())
    assert other.note == {"of": "its owner"} and other.no_weight_decay() == model.no_weight_decay()


def test_it_does_the_same(model, idle, other):
    for batch in (1, 2, 5):
        x = images(model, batch)
        for mode in (True, False):
            results = []
            for each in (idle, other):
                torch.manual_seed(0)
                results.append(each.train(mode)(x))
            assert results[0].equal(results[1])
    chosen = selections(idle, x)
    assert all(where.equal(chosen[block]) for block, where in selections(other, x).items())
    with pytest.raises(idlefx.InputError, match="has shape"):
        other(x[:, :, :40])


@pytest.mark.slow
def test_it_goes_on_from_there(model, idle):
    other = through_pickle(idle)
    x = images(model, 3)
    output, loss = idlefx.with_cut_loss(other)(x)
    wanted, wanted_loss = idlefx.with_cut_loss(idle)(x)
    assert output.equal(wanted) and loss.equal(wanted_loss)
    loss.backward()
    assert other.get_parameter("blocks.1.attn.qkv.weight").grad is not None
    assert idle.get_parameter("blocks.1.attn.qkv.weight").grad is None
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    assert torch.export.export(other, (x,), dynamic_shapes=free).module()(x[:2]).equal(idle(x[:2]))
    assert str(idlefx.report(other)) == str(idlefx.report(idle))


def test_a_copy_shares_its_parameters(idle):
    shared = dict(copy.copy(idle).named_parameters())
    assert all(parameter is shared[name] for name, parameter in idle.named_parameters())


@torch.no_grad()
def test_nested_inputs_and_outputs_survive():
    model = Wrapper(build("vit")).eval()
    inputs = {"picture": images(model.net, 2), "gain": torch.ones(2, 1, 1, 1)}
    idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=inputs)
    for each in (through_pickle(idle), through_pickle(through_pickle(idle))):
        out, wanted = each(**inputs), idle(**inputs)
        assert list(out) == list(wanted) and out["logits"].equal(wanted["logits"])


def put(place, idle, x, results):
    """Run in another process."""
    results[place] = idle(x).detach()


def test_another_process_takes_it(idle):
    idle, x = copy.deepcopy(idle).eval(), torch.randn(2, *idle.conversion.facts.image_size)
    results = torch.zeros(1, 2, 10).share_memory_()
    mp.spawn(put, args=(idle, x, results), nprocs=1)
    assert results[0].equal(idle(x))


def test_what_has_no_name_is_refused(idle):
    odd = copy.deepcopy(idle)
    graph = odd.conversion.evaluation.graph
    placeholder = next(iter(graph.nodes))
    with graph.inserting_after(placeholder):
        node = graph.call_function(lambda x: x, (placeholder,))
    node.meta.update(placeholder.meta)
    with pytest.raises(idlefx.InputError, match=r"^pickle: `.*` calls <function .*>, which has no name .* save"):
        pickle.dumps(odd)
    with pytest.raises(idlefx.InputError, match=r"^pickle: there is no operator aten\.nothing\.default; import what"):
        restore(
            StoredGraph((StoredNode("call_function", Operator("aten.nothing.default"), (), {}, "n", {}),), CodeGen())
        )
