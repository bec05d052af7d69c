"""The forms that go into ONNX files: the same choices and results as the operations that they stand for."""

import pytest
import torch

import idlefx
from idlefx.deploy import onnx_forms, onnx_order
from idlefx.deploy.onnx_forms import FORMS, in_onnx_forms
from idlefx.deploy.program import make_program
from idlefx.runtime import following, gather_scatter, nearest, ops
from tests.models.small import build, images

aten = torch.ops.aten


def nodes(module, target):
    return module.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("prefix", [(), (0,), (0, 1), (3, 7)])
def test_forms_choose_take_and_put_the_same(prefix):
    torch.manual_seed(0)
    scores, x = torch.randn(3, 20), torch.randn(3, 20, 6)
    index, place = ops.choose_tokens(scores, prefix, 8)
    found, found_place = FORMS[ops.choose_tokens](scores, prefix, 8)
    assert torch.equal(found, index) and torch.equal(found_place, place)
    taken = gather_scatter.take_tokens(x, index)
    assert torch.equal(FORMS[gather_scatter.take_tokens](x, index), taken)
    assert torch.equal(FORMS[gather_scatter.take_tokens](x[:1], index), gather_scatter.take_tokens(x[:1], index))
    put = FORMS[gather_scatter.put_tokens](x, index, taken.sin(), 1, 0, place)
    assert torch.equal(put, gather_scatter.put_tokens(x, index, taken.sin(), 1, 0, place))


@pytest.mark.parametrize("prefix", [(), (0,), (2, 5)])
def test_forms_group_average_and_restore_the_same(prefix):
    torch.manual_seed(0)
    x, logits = torch.randn(3, 30, 6), torch.randn(3, 30)
    told = (prefix, 11, nearest.anchors(30 - len(prefix), 11))
    for evidence in (logits, None):
        groups = following.group_tokens(x, evidence, *told)
        found = FORMS[following.group_tokens](x, evidence, *told)
        assert all(torch.equal(a, b) for a, b in zip(found, groups, strict=True))
    workers, place, order, leaders = groups
    means, sizes = following.average_groups(x, workers, order, leaders)
    found_means, found_sizes = FORMS[following.average_groups](x, workers, order, leaders)
    assert torch.allclose(found_means, means, atol=1e-6) and torch.equal(found_sizes, sizes)
    given = (x, means, means.sin(), workers, place, order, leaders)
    assert torch.allclose(FORMS[following.restore_tokens](*given), following.restore_tokens(*given), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"idle": "follow"},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({"reselect": False}, {"selector": "mean"})),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit", pytest.param("registers_map", marks=pytest.mark.slow)])
def test_program_in_these_forms_computes_the_same(name, options):
    program = make_program(idlefx.convert(build(name), [1, 2], 0.5, **options))
    for batch in (1, 4):
        x = images(build(name), batch)
        assert torch.allclose(in_onnx_forms(program.module)(x)[0], program.module(x)[0], atol=1e-5)


def test_resting_tokens_go_back_to_their_places_once():
    module = in_onnx_forms(make_program(idlefx.convert(build("vit"), [1, 2], 0.5)).module)
    assert len(nodes(module, onnx_order._put_in_front)) == 3
    assert len(nodes(module, onnx_order._in_place)) == 1
    assert not nodes(module, FORMS[gather_scatter.put_tokens])


class Features(torch.nn.Module):
    """Returns the stream behind every block, and where it goes in."""

    def __init__(self):
        super().__init__()
        self.net = build("vit")

    def forward(self, x):
        return tuple(self.net.forward_intermediates(x, norm=False, intermediates_only=True, output_fmt="NLC"))


@torch.no_grad()
def test_whoever_reads_the_stream_between_finds_tokens_in_their_places():
    model, x = Features().eval(), images(build("vit"), 3)
    program = make_program(idlefx.convert(model, [1, 2], 0.5, example_inputs=x))
    module = in_onnx_forms(program.module)
    assert len(nodes(module, onnx_order._in_place)) == 3
    for found, wanted in zip(module(x), program.module(x), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_weights_of_query_and_key_are_multiplied_with_each_other():
    program = make_program(idlefx.convert(build("vit"), [1], 0.5)).module
    module = in_onnx_forms(program)
    assert not nodes(module, ops.norm_linear)
    products = nodes(module, onnx_forms._direction)
    assert len(products) == 3 and not any(product.args[-1] for product in products), "in the file, not at each call"
    width = program.get_parameter("blocks.1.attn.qkv.weight").shape[1]
    made = [getattr(module, product.args[-3].target) for product in products]
    assert {tuple(weight.shape) for weight in made} == {(width, width)}
    assert not any(hasattr(program, product.args[-3].target) for product in products), "what was given stays as it is"
