"""Any combination of spellings converts to what its eager reference computes, or is refused for a true reason.

100 examples, always the same; 1,000 new ones with `--hypothesis-profile=thorough`.
"""

import re
from typing import Any
from unittest.mock import patch

import generated_reference
import pytest
import torch
from cases import CLEAR_MARGIN, relative_error
from generated import build, inputs
from generated_config import CHOICES, Config
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten

import idlefx
from idlefx import pipeline
from idlefx.capture.export import capture
from idlefx.runtime.module import selections

PARTS = 4  # of the examples, so that they can run side by side
REASONS = {
    "depthwise": r"(reshape|view|split|conv2d).*token",
    "token_mean": r"mean.*token axis",
    "token_norm": r"norm.*token axis",
    "token_mlp": r"linear.*token axis",
    "token_shift": r"roll.*(token|no rule)",
    "token_sum": r"cumsum.*(token|no rule)",
    "squeeze": r"amax.*token axis",
    "reduced_keys": r"(reshape|view|conv2d).*token",
    "windows": r"(reshape|view).*token",
}


def configs() -> st.SearchStrategy[Config]:
    """Configs whose parts fit together; most of them have no block that mixes tokens outside attention."""
    options = {name: st.sampled_from(values) for name, values in CHOICES.items()}
    options["unfit"] = st.sampled_from(("none",) * 12 + CHOICES["unfit"])
    options["collision"] = st.sampled_from(("none",) * 4 + CHOICES["collision"])
    return st.builds(Config, **options).map(Config.normalised)


@st.composite
def plans(draw: Any, config: Config) -> dict[int, float]:
    """Keep ratios of some blocks that leave at least two image tokens working."""
    fit = [block for block in range(config.depth) if config.can_idle(block)]
    chosen = draw(st.lists(st.sampled_from(fit), min_size=1, unique=True))
    return {block: draw(st.integers(17, 95)) / 100 for block in sorted(chosen)}


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
            assert re.search(r"generated\w*\.py:\d+: ", block.refusal), block.refusal


def check(config: Config, keep: dict[int, float]) -> bool:
    """Convert one model by one plan; False where rounding decides what is kept, and nothing can be said."""
    model = build(config)
    kept = {block: max(1, int(ratio * config.image_tokens + 1e-9)) for block, ratio in keep.items()}
    x = inputs(config, 3, seed=1)
    expected = generated_reference.run(model, kept, x)
    if expected.margin <= CLEAR_MARGIN:
        return False
    traced = capture(model, inputs(config, 2, seed=9))  # once for all conversions: it is what takes long
    with patch.object(pipeline, "capture", return_value=traced):
        idle, same = convert(model, config, keep), convert(model, config, dict.fromkeys(keep, 1.0))
        if config.unfit != "none":
            with pytest.raises(idlefx.IdleFxError, match=REASONS[config.unfit]):
                convert(model, config, {1: 0.5})
    check_table(idle.plan.blocks, config)
    with torch.no_grad():
        chosen, actual = selections(idle, *x), idle(*x)
    assert chosen.keys() == expected.selected.keys()
    assert all(torch.equal(positions, expected.selected[block]) for block, positions in chosen.items())
    assert error_of(actual, expected.output) <= 1e-5
    assert equal(same(*x), model(*x))  # with gradients, where nn.MultiheadAttention takes no fast path
    return True


HARD = [  # combinations in which it is hard to see where a block begins and ends, or who reads what
    (Config(around="neck", head="dense"), {2: 0.3}),
    (Config(around="neck", block="mlp_first"), {1: 0.4}),
    (Config(block="mlp_first", outputs="features"), {1: 0.5}),
    (Config(block="post", norm="affine"), {0: 0.5, 1: 0.4}),
    (Config(block="attention_only", positions="inside", outputs="skips"), {0: 0.5, 1: 0.5}),
    (Config(block="parallel", positions="inside"), {0: 0.5, 1: 0.5}),
    (Config(block="nested", projection="raw", grid=(2, 6)), {0: 0.48, 1: 0.8}),
    (Config(core="multihead", positions="queries"), {2: 0.23}),
    (Config(groups="native", projection="separate"), {0: 0.5, 2: 0.5}),
]


@pytest.mark.parametrize(("config", "keep"), HARD, ids=lambda value: None)
def test_hard_combination(config: Config, keep: dict[int, float]) -> None:
    assert config.normalised() == config
    assert check(config, keep)


@pytest.mark.parametrize("part", range(PARTS))
def test_converted_equals_reference_or_is_refused_truly(part: int) -> None:
    @given(st.data())
    def converts(data: st.DataObject) -> None:
        config = data.draw(configs(), label="config")
        keep = data.draw(plans(config), label="keep")
        assume(check(config, keep))

    deterministic = settings().derandomize
    (seed(part)(converts) if deterministic else converts)()


@torch.no_grad()
@given(configs())
@settings(max_examples=25)
def test_reference_that_keeps_all_is_the_model(config: Config) -> None:
    model, x = build(config), inputs(config, 3)
    plan = {block: config.image_tokens for block in range(config.depth) if config.can_idle(block)}
    output = generated_reference.run(model, plan, x).output
    assert error_of(output, model(*x)) <= 1e-5
    assert config.normalised() == config


def test_reference_hides_idle_tokens_and_leaves_them_as_they_are() -> None:
    config = Config(head="dense", positions="none", prefix=0)
    model, (image,) = build(config), inputs(config, 2)
    result = generated_reference.run(model, {0: 5, 1: 5, 2: 5}, (image,))
    works = torch.stack([torch.zeros(2, config.tokens).scatter(1, s, 1) for s in result.selected.values()]).amax(0)
    tokens, _ = model.embed(image, None)
    untouched = model.head(model.norm(tokens))
    assert works.sum() < works.numel()
    assert torch.equal(result.output[works == 0], untouched[works == 0])
    assert not torch.isclose(result.output[works == 1], untouched[works == 1]).all(-1).any()


@pytest.mark.parametrize("part", ["attention_scores", "attend"])
def test_check_notices_a_difference(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(generated_reference, part)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return -result if part == "attention_scores" else (1.01 * result[0], *result[1:])

    monkeypatch.setattr(generated_reference, part, wrong)
    with pytest.raises(AssertionError):
        check(Config(head="dense"), {1: 0.5})
