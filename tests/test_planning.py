"""How layers, keep and schedule are read, and what is said when they cannot be."""

import math
import re
from fractions import Fraction

import pytest

import idlefx
from tests.models.small import build, build_mixing, fingerprint, images
from tests.support.cases import Case, convert

TRAPS = ("0.29", "0.57", "0.58", "0.07", "0.14", "0.55", "0.999", "0.005", "0.0001", "0.01", "0.1", "0.35")
RANGE = r"\(0, 1\]|(above|greater than|between) 0"
MISTAKES = {
    "layer named twice": ({"layers": [2, 2]}, [r"\b2\b", r"twice|once|duplicate|repeat"]),
    "negative layer": ({"layers": [1, -1]}, [r"-1", r"\b0\b"]),
    "truth for a layer": ({"layers": [True, 2]}, [r"True", r"integer|index|number"]),
    "fraction for a layer": ({"layers": [1.5]}, [r"1\.5", r"integer|index|number"]),
    "keep nothing": ({"keep": 0}, [r"keep", RANGE]),
    "keep too much": ({"keep": 1.5}, [r"keep", r"1\.5", RANGE]),
    "keep less than nothing": ({"keep": -0.5}, [r"keep", r"-0\.5", RANGE]),
    "keep no number": ({"keep": math.nan}, [r"keep", r"nan", RANGE]),
    "keep infinity": ({"keep": math.inf}, [r"keep", r"inf", RANGE]),
    "keep nothing in a list": ({"keep": [0.5, 0.0]}, [r"keep", r"\b0\.0\b", RANGE]),
    "too many ratios": ({"keep": [0.5, 0.5, 0.5]}, [r"keep", r"\b3\b", r"\b2\b"]),
    "too few ratios": ({"keep": [0.5]}, [r"keep", r"\b1\b", r"\b2\b"]),
    "unknown schedule": ({"schedule": "stage"}, [r"stage\b", r"stages", r"blocks"]),
    "unknown selector": ({"selector": "attentive"}, [r"attentive", r"\bauto\b", r"\bnorm\b", r"\brandom\b"]),
}


def kept(idle: object) -> dict[int, int]:
    return {step.block: step.kept for step in idle.plan if step.kept < step.tokens}


def refusal(model: object, **arguments: object) -> str:
    arguments = {"layers": [1, 2], "keep": 0.5, "example_inputs": images(model, 2)} | arguments
    before = fingerprint(model)
    with pytest.raises(idlefx.IdleFxError) as caught:
        idlefx.convert(model, **arguments)
    assert fingerprint(model) == before
    return str(caught.value)


def test_stages_run_to_the_next_layer_and_the_last_to_the_end():
    idle = convert(build("vit", depth=6), Case((1, 4), 0.5))
    assert kept(idle) == {1: 18, 2: 18, 3: 18, 4: 9, 5: 9}
    assert [step.keep for step in idle.plan] == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.25])
    assert [step.path for step in idle.plan] == [f"blocks.{i}" for i in range(1, 6)]
    assert {step.tokens for step in idle.plan} == {36}


def test_blocks_schedule_idles_exactly_the_listed_blocks():
    idle = convert(build("vit", depth=6), Case((1, 4), 0.5, "blocks"))
    assert kept(idle) == {1: 18, 4: 18}


def test_list_of_keeps_gives_each_stage_its_own_ratio():
    assert kept(convert(build("vit"), Case((0, 2), (0.25, 0.75)))) == {0: 9, 1: 9, 2: 27, 3: 27}


def test_list_of_keeps_gives_each_block_its_own_ratio():
    assert kept(convert(build("vit"), Case((0, 2), (0.25, 0.75), "blocks"))) == {0: 9, 2: 27}


def test_stage_that_keeps_all_is_left_dense():
    idle = convert(build("vit"), Case((0, 2), (1.0, 0.5)))
    assert kept(idle) == {2: 18, 3: 18}
    names = {node.name for node in idle.graph.nodes}
    assert "idle_2_gather" in names and "idle_0_gather" not in names


def test_number_kept_is_the_exact_floor_and_at_least_one():
    model = build("vit", depth=len(TRAPS), img_size=80)
    ratios = tuple(float(text) for text in TRAPS)
    idle = convert(model, Case(tuple(range(len(TRAPS))), ratios, "blocks"))
    exact = [max(1, math.floor(Fraction(text) * 100)) for text in TRAPS]
    naive = [max(1, math.floor(ratio * 100)) for ratio in ratios]
    assert [step.kept for step in idle.plan] == exact
    assert exact != naive, "these ratios are traps"


def test_powers_of_keep_are_floored_exactly():
    model = build("vit", img_size=80)
    # In floating point 0.7**2 * 100 is a little less than 49.
    assert kept(convert(model, Case((1, 3), 0.7))) == {1: 70, 2: 70, 3: 49}


def test_prefix_tokens_do_not_count_as_kept():
    assert kept(convert(build("registers"), Case((3,), 0.5))) == {3: 18}
    assert kept(convert(build("gap"), Case((3,), 0.5))) == {3: 18}


def test_layer_out_of_range_prints_the_table():
    model = build("vit")
    message = refusal(model, layers=[1, 7])
    assert re.search(r"\b7\b", message)
    for line in str(idlefx.inspect(model, images(model, 2))).splitlines():
        assert line.strip() in message


def test_layer_that_cannot_idle_names_block_and_operation_and_prints_the_table():
    model = build_mixing()
    message = refusal(model, layers=[1], schedule="blocks")
    assert "blocks.1" in message
    assert "conv1d" in message
    assert "small.py" in message
    for line in str(idlefx.inspect(model, images(model, 2))).splitlines():
        assert line.strip() in message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_with_its_remedy(mistake):
    arguments, words = MISTAKES[mistake]
    message = refusal(build("vit"), **arguments)
    for word in words:
        assert re.search(word, message), (word, message)
