"""What a compiled idling model does on a CPU, by profile: library calls see tokens that work, and no others."""

import math
from itertools import chain

import pytest
import timm
import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent

import idlefx

BATCH, TOKENS, WIDTH, KEPT = 4, 197, 192, 137
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def library_calls(function, *inputs: Tensor) -> list[FunctionEvent]:
    """Calls of operators that compiled code makes, in order, without what those call in turn."""
    compiled = torch.compile(function, fullgraph=True)
    with torch.no_grad():
        compiled(*inputs)
        with torch.profiler.profile(record_shapes=True) as seen:
            compiled(*inputs)
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    outer = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return sorted(outer, key=lambda event: event.time_range.start)


def on_everyone(calls: list[FunctionEvent]) -> list[str]:
    """Calls that see the features of all tokens."""
    found = []
    for call in calls:
        features = [shape for shape in call.input_shapes if math.prod(shape) >= BATCH * TOKENS * WIDTH]
        if any(shape[0] == BATCH * TOKENS or list(shape[:2]) == [BATCH, TOKENS] for shape in features):
            found.append(call.name)
    return found


def careless(x: Tensor, weight: Tensor) -> Tensor:
    """Scores as one would write them first, from the keys of all tokens."""
    keys = x @ weight
    return (keys[:, :1] * keys).sum(2).topk(KEPT, dim=1).indices


def segments(keep: float) -> list[list[FunctionEvent]]:
    """The calls from one attention to the next."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    calls = library_calls(idlefx.convert(model, [1], keep), torch.randn(BATCH, 3, 224, 224))
    found: list[list[FunctionEvent]] = [[]]
    for call in calls:
        if call.name == ATTENTION:
            found.append([])
        found[-1].append(call)
    return found


@pytest.mark.slow
def test_idling_block_calls_libraries_for_working_tokens_only():
    _, dense, *idle = segments(0.7)
    between = list(chain.from_iterable(idle))
    assert on_everyone(dense) and not on_everyone(between)
    names = [call.name for call in idle[0]]
    choosing = ["aten::addmm", "aten::mm", "aten::sort", "aten::cumsum", "aten::sort", "aten::sort"]
    layers = ["aten::addmm"] * 3
    assert [n for n in names if n in {ATTENTION, *layers, *choosing}] == [ATTENTION, *layers, *choosing, "aten::addmm"]


def test_careless_spelling_is_noticed():
    calls = library_calls(careless, torch.randn(BATCH, TOKENS, WIDTH), torch.randn(WIDTH, WIDTH))
    assert on_everyone(calls) == ["aten::mm"]
