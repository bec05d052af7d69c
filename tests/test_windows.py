"""Blocks whose attention is over windows: whole windows idle, or tokens in each."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import idlefx
from idlefx.records import Step
from idlefx.runtime.selections import groups, selections
from idlefx.zoo.comparisons import compare
from tests.models.small import randomise
from tests.models.windows import SIDE, Block, Windowed, pictures

pytestmark = pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")

KINDS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "plain": lambda h, w: [Block(h, w), Block(h, w)],
    "shifted": lambda h, w: [Block(h, w, 1), Block(h, w, 1, fused=False)],
    "sequence": lambda h, w: [Block(h, w, sequence=True), Block(h, w, 1, sequence=True)],
    "pads first": lambda h, w: [Block(h, w, 1, pads_first=True, fused=False), Block(h, w, pads_first=True)],
}
WHOLE, PADDED = (6, 9), (5, 8)


def model_of(kind, sides=WHOLE):
    torch.manual_seed(0)
    model = Windowed(*KINDS[kind](*sides)).eval()
    with torch.no_grad():
        randomise(model)
        for block in model.blocks:
            block.bias.normal_(std=0.5)
    return model


CASES = [
    pytest.param("shifted", WHOLE, "windows", marks=pytest.mark.slow),
    pytest.param("shifted", WHOLE, "tokens"),
    pytest.param("shifted", PADDED, "windows"),
    pytest.param("sequence", WHOLE, "tokens", marks=pytest.mark.slow),
    pytest.param("plain", WHOLE, "windows", marks=pytest.mark.slow),
    pytest.param("plain", WHOLE, "tokens", marks=pytest.mark.slow),
    pytest.param("plain", PADDED, "windows", marks=pytest.mark.slow),
    pytest.param("sequence", WHOLE, "windows", marks=pytest.mark.slow),
    pytest.param("sequence", PADDED, "windows", marks=pytest.mark.slow),
    pytest.param("pads first", WHOLE, "tokens", marks=pytest.mark.slow),
    pytest.param("pads first", PADDED, "windows", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "sides", "unit"), CASES)
def test_idles_as_the_reference_does_with_masks(kind, sides, unit):
    model = model_of(kind, sides)
    table = idlefx.inspect(model, pictures(2, *sides))
    for block in table:
        assert block.windows == (6, SIDE**2), block
        assert block.can_idle and block.tokens == sides[0] * sides[1], block
        assert bool(block.whole_only) == bool(block.rest_only) == (sides == PADDED)
    idle = idlefx.convert(model, layers=[0, 1], keep=[0.7, 0.4], unit=unit, example_inputs=pictures(2, *sides))
    found = compare(model, idle, table, pictures(3, *sides, seed=1))
    assert found.error < 1e-6 and found.excess < 1e-5, found


@pytest.mark.parametrize(("kind", "sides", "unit"), CASES)
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(kind, sides, unit, monkeypatch):
    model, x = model_of(kind, sides), pictures(3, *sides, seed=1)
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, layers=[0], keep=1.0, unit=unit, example_inputs=x[:2])
    assert len(selections(idle, x)) == 2
    assert torch.equal(idle(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize(("sides", "unit"), [(WHOLE, "tokens"), (PADDED, "windows")])
def test_idle_tokens_leave_a_block_bit_identical(sides, unit):
    model, x = model_of("shifted", sides), pictures(3, *sides, seed=2)
    model.blocks, model.neck = model.blocks[:1], nn.Identity()
    idle = idlefx.convert(model, layers=[0], keep=0.4, unit=unit, example_inputs=x[:2])
    moved = (idle(x) != model.patches(x)).any(1)
    (told,) = groups(idle, x).values()
    assert torch.equal(moved.flatten(1), told != -1)
    if unit == "tokens":
        assert moved.sum((1, 2)).tolist() == [6 * 3] * 3
