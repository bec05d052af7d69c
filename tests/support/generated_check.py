"""Convert a generated model and compare it with its reference in all that can be seen from outside."""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import idlefx
from idlefx import pipeline
from idlefx.capture.export import capture
from idlefx.runtime.selections import selections
from tests.models.generated import Config, ViT, inputs
from tests.oracles import generated_reference
from tests.support import generated_habits as habits
from tests.support.cases import CLEAR_MARGIN, relative_error

REASONS = {
    "depthwise": r"(reshape|view|split|conv2d).*token",
    "token_mean": r"mean.*token axis",
    "token_norm": r"norm.*token axis",
    "token_mlp": r"linear.*token axis",
    "token_shift": r"roll.*(token|no rule)",
    "token_sum": r"cumsum.*(token|no rule)",
    "squeeze": r"amax.*token axis",
    "reduced_keys": r"(reshape|view|conv2d).*token",
    "overlapping": r"(reshape|view).*token",
    "written_buffer": r"mean.*over the batch",
    "autocast": r"switches autocast",
}


def error_of(actual: Any, expected: Any) -> float:
    """The largest relative error of any tensor in two outputs of one structure."""
    (ours, structure), (theirs, wanted) = tree_flatten(actual), tree_flatten(expected)
    assert structure == wanted
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor))


def equal(actual: Any, expected: Any) -> bool:
    (ours, structure), (theirs, wanted) = tree_flatten(actual), tree_flatten(expected)
    return structure == wanted and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def convert(model: torch.nn.Module, config: Config, keep: dict[int, float]) -> Any:
    return idlefx.convert(
        model, list(keep), list(keep.values()), schedule="blocks", example_inputs=inputs(config, 2, seed=9)
    )


@contextmanager
def analysed_once(config: Config) -> Iterator[None]:
    """Let conversions of one model share what takes longest, finding out about it; the last alone may rewrite."""
    with ExitStack() as stack:
        traced = capture(habits.given(config), inputs(config, 2, seed=9))
        stack.enter_context(patch.object(pipeline, "capture", return_value=traced))
        for name in ("spell", "find_blocks"):
            stack.enter_context(patch.object(pipeline, name, cache(getattr(pipeline, name))))
        yield


def check_table(blocks: idlefx.BlockTable, config: Config) -> None:
    """What `inspect` says about the blocks."""
    assert len(blocks) == config.depth, str(blocks)
    for block in blocks:
        if config.can_idle(block.index):
            assert block.can_idle, block.refusal
            found = (block.image_tokens, block.prefix, block.class_token)
            assert found == (config.image_tokens, config.prefix_at(block.index), config.class_at(block.index))
        else:
            assert re.search(REASONS[config.unfit], block.refusal), block.refusal
            assert re.search(r"(mlp|unfit)\.py:\d+: ", block.refusal), block.refusal


def check(config: Config, keep: dict[int, float]) -> bool:
    """Convert one model by one plan; False where rounding decides what is kept, and nothing can be said."""
    if words := habits.refusal_of(config):
        with pytest.raises(idlefx.IdleFxError, match=words):
            convert(habits.given(config), config, keep)
        return True
    kept = {block: max(1, int(ratio * config.image_tokens + 1e-9)) for block, ratio in keep.items()}
    model, x = habits.in_mode(config, False), inputs(config, 3, seed=1)

    def reference(model: ViT, gradients: bool) -> generated_reference.Result:
        return generated_reference.run(model, kept, x, gradients=gradients)

    expected = reference(model, False)
    if expected.margin <= CLEAR_MARGIN:
        return False
    with habits.announced(config), analysed_once(config):
        same = copy.deepcopy(convert(model, config, dict.fromkeys(keep, 1.0)))
        if config.unfit != "none":
            with pytest.raises(idlefx.IdleFxError, match=REASONS[config.unfit]):
                convert(model, config, {1: 0.5})
        idle = convert(model, config, keep)
    check_table(idle.plan.blocks, config)
    chosen = selections(idle.eval(), *x)
    assert chosen.keys() == expected.selected.keys()
    assert all(torch.equal(positions, expected.selected[block]) for block, positions in chosen.items())
    check_whole(same.eval(), config, x)
    habits.check_flags(idle, config, x)
    return habits.check_calls(idle, config, reference, x)


def check_whole(same: Any, config: Config, x: tuple[Any, ...]) -> None:
    """Where all tokens work, everything is the model's bit by bit, inside autocast too."""
    lower = config.region == "autocast" and config.mask == "none" and config.inputs != "valid"
    model = habits.in_mode(config, False)
    for switch in (nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=lower)):
        with switch:  # with gradients, where nn.MultiheadAttention takes no fast path
            assert equal(habits.seeded(same, x), habits.seeded(model, x))
