"""Every `einsum` becomes matrix products, or products of numbers where nothing is summed."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import idlefx
from idlefx.analysis.macs import count_macs
from idlefx.graph.equations import Equation, read_equation
from idlefx.passes import lower_spellings
from idlefx.records import BlockTable, Plan
from idlefx.rewriting.einsum import Pair
from tests.models.small import build, images

aten = torch.ops.aten
SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "e": 7}
PRODUCTS = [
    "bhid,bhjd->bhij", "bihd,bjhd->bhij", "bhij,bjhd->bihd", "bhij, bhjd -> bhid", "bid,bjd", "bid,de->bie",
    "bid,hde->bhie", "bide,hde->bhi", "de,bid->bie", "...id,...jd->...ij", "...d,ed->...e", "bi...,j...->bij",
]  # fmt: skip
OTHERS = [
    "bid->bdi", "bid,bid->bid", "bid,hje->bidhje", "bid,bjd->bi", "bii,bid->bd", "bid,d->bi", "bhid,bjed->bhije",
    "bid,de,bie->bi", "...id,...jd", "...id,j...->ij...", "bid,bid->", "bid,bid", "ii", "bii->bi", "iii->i", "bid->",
    "bhid,bhjd,bjhe->bihe", "bid,d,d->bid", "b,i,d->dib", "...", "...i->...", "bhi,bhj,hij->bhij", "bid,hde,ej->bhij",
]  # fmt: skip


class WeightsFirst(nn.Module):
    """A linear layer as an `einsum` that names the weights in front of the tokens."""

    def __init__(self, linear: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.unflatten(0, (heads, -1))), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("hdc,bnc->bnhd", self.weight, x).flatten(2) + self.bias


def made(equation: str, *shapes: list[int]) -> fx.Graph:
    """One `einsum` of inputs of those shapes."""
    graph, fake = fx.Graph(), FakeTensorMode()
    operands = [graph.placeholder(f"operand_{at}") for at in range(len(shapes))]
    for node, shape in zip(operands, shapes, strict=True):
        node.meta["val"] = fake.from_tensor(torch.empty(shape))
    node = graph.call_function(aten.einsum.default, (equation, operands))
    node.meta["val"] = torch.einsum(equation, *(operand.meta["val"] for operand in operands))
    graph.output(node)
    return graph


def lowered(equation: str, *shapes: list[int]) -> fx.GraphModule:
    """The same after the pass."""
    return lower_spellings(fx.GraphModule({}, made(equation, *shapes)), Plan((), BlockTable(())))


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


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        *((equation, shapes_of(equation)) for equation in OTHERS),
        ("...d,...ed->...e", [[6], [3, 7, 6]]),
        ("...d,e...d->...e", [[2, 4, 6], [7, 1, 6]]),
        ("bid,bjd->bij", [[2, 4, 6], [1, 5, 6]]),
        ("bid,bjd->bij", [[2, 4, 1], [2, 5, 6]]),
        ("bid,bd->bid", [[2, 1, 6], [2, 6]]),
    ],
    ids=str,
)
def test_every_other_becomes_products_and_sums(equation, shapes):
    module = lowered(equation, *shapes)
    assert aten.einsum.default not in {node.target for node in module.graph.nodes}
    operands = [torch.randn(shape) for shape in shapes]
    torch.testing.assert_close(module(*operands), torch.einsum(equation, *operands))


def test_letters_are_told_apart_by_where_they_stand():
    pair = Pair("bihd", "bjhd", "bhij")
    assert (pair.stacked, pair.summed, pair.rows, pair.columns) == ("bh", "d", "i", "j")


def test_what_is_left_out_of_an_equation_is_written_down():
    assert read_equation("b i d, b j d", [3, 3]) == Equation(("bid", "bjd"), "ij")
    assert read_equation("...d,...ed->...e", [1, 3]) == Equation(("d", "Aed"), "Ae")
    assert read_equation("A...,...b", [2, 3]) == Equation(("AC", "BCb"), "BCAb")


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bid,bjd->bij", [[1, 4, 6], [1, 5, 6]], 4 * 5 * 6),
        ("bid,de,ej->bij", [[1, 4, 6], [6, 7], [7, 5]], 4 * 6 * 7 + 4 * 7 * 5),
        ("...d,ed->...e", [[1, 4, 6], [7, 6]], 4 * 6 * 7),
    ],
)
def test_einsum_that_is_left_is_counted(equation, shapes, macs):
    graph = made(equation, *shapes)
    assert count_macs(graph.nodes) == macs
    assert count_macs(lowered(equation, *shapes).graph.nodes) == macs


@pytest.mark.parametrize("heads", [1, 3])
def test_weights_may_stand_in_front_of_the_tokens(heads):
    plain, model = build("vit"), build("vit")
    for block in model.blocks:
        block.attn.proj = WeightsFirst(block.attn.proj, heads)
    x = images(model, 3)
    wanted, idle = (idlefx.convert(each, [1], 0.5, example_inputs=x) for each in (plain, model))
    torch.testing.assert_close(idle(x), wanted(x))
