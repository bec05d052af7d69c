"""An `einsum` that is a matrix product becomes one; every other stays."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import idlefx
from idlefx.passes import lower_spellings
from idlefx.records import BlockTable, Plan
from idlefx.rewriting.einsum import parse_equation
from tests.models.small import build, images

aten = torch.ops.aten
SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "e": 7}
PRODUCTS = [
    "bhid,bhjd->bhij", "bihd,bjhd->bhij", "bhij,bjhd->bihd", "bhij, bhjd -> bhid", "bid,bjd", "bid,de->bie",
    "bid,hde->bhie", "bide,hde->bhi", "de,bid->bie", "...id,...jd->...ij", "...d,ed->...e", "bi...,j...->bij",
]  # fmt: skip
OTHERS = [
    "bid->bdi", "bid,bid->bid", "bid,hje->bidhje", "bid,bjd->bi", "bii,bid->bd", "bid,d->bi", "bhid,bjed->bhije",
    "bid,de,bie->bi", "...id,...jd", "...id,j...->ij...",
]  # fmt: skip


class WeightsFirst(nn.Module):
    """A linear layer as an `einsum` that names the weights in front of the tokens."""

    def __init__(self, linear: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.unflatten(0, (heads, -1))), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("hdc,bnc->bnhd", self.weight, x).flatten(2) + self.bias


def lowered(equation: str, *shapes: list[int]) -> fx.GraphModule:
    """One `einsum` of inputs of those shapes, after the pass."""
    graph, fake = fx.Graph(), FakeTensorMode()
    operands = [graph.placeholder(f"operand_{at}") for at in range(len(shapes))]
    for node, shape in zip(operands, shapes, strict=True):
        node.meta["val"] = fake.from_tensor(torch.empty(shape))
    node = graph.call_function(aten.einsum.default, (equation, operands))
    node.meta["val"] = torch.einsum(equation, *(operand.meta["val"] for operand in operands))
    graph.output(node)
    return lower_spellings(fx.GraphModule({}, graph), Plan((), BlockTable(())))


def shapes_of(equation: str) -> list[list[int]]:
    """Shapes for the operands, dots standing for two dimensions."""
    inputs = equation.replace(" ", "").partition("->")[0].split(",")
    return [[SIZES[letter] for letter in operand.replace("...", "bh")] for operand in inputs]


@pytest.mark.parametrize("equation", PRODUCTS)
def test_matrix_products_become_matmul(equation):
    module = lowered(equation, *shapes_of(equation))
    targets = {node.target for node in module.graph.nodes}
    assert aten.einsum.default not in targets and not targets.isdisjoint({aten.matmul.default, aten.linear.default})
    operands = [torch.randn(shape) for shape in shapes_of(equation)]
    torch.testing.assert_close(module(*operands), torch.einsum(equation, *operands))


@pytest.mark.parametrize("equation", OTHERS)
def test_whatever_is_no_matrix_product_stays(equation):
    assert aten.einsum.default in {node.target for node in lowered(equation, *shapes_of(equation)).graph.nodes}


def test_dots_of_two_lengths_stay():
    module = lowered("...d,...ed->...e", [6], [3, 7, 6])
    assert aten.einsum.default in {node.target for node in module.graph.nodes}


def test_letters_are_told_apart_by_where_they_stand():
    queries_by_keys = parse_equation("b i h d, b j h d -> b h i j", [4, 4])
    assert queries_by_keys is not None and queries_by_keys.is_matrix_product
    kinds = (queries_by_keys.stacked, queries_by_keys.summed, queries_by_keys.rows, queries_by_keys.columns)
    assert kinds == ("bh", "d", "i", "j")


@pytest.mark.parametrize("heads", [1, 3])
def test_weights_may_stand_in_front_of_the_tokens(heads):
    plain, model = build("vit"), build("vit")
    for block in model.blocks:
        block.attn.proj = WeightsFirst(block.attn.proj, heads)
    x = images(model, 3)
    wanted, idle = (idlefx.convert(each, [1], 0.5, example_inputs=x) for each in (plain, model))
    torch.testing.assert_close(idle(x), wanted(x))
