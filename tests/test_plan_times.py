"""Plans by time: what is predicted from a table of block times, and which tables are refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import idlefx
from idlefx.analysis.macs import count_macs
from idlefx.errors import InputError, PlanError
from idlefx.records import Block, BlockTable, Plan, Step
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.latency import BlockTimes, size_of, times_of, times_to_json
from idlefx.search import timing
from idlefx.search.candidates import Candidate
from idlefx.search.timing import Timing, _fitted, choices, timing_of
from idlefx.utils.devices import machine_in_words
from tests.models.small import build, images

ASKED = {"trials": 0, "batch_size": 2, "progress": False}


def table(block: Block, machine: str) -> BlockTimes:
    """Times of a block that takes 1 ms and a tenth for each token."""
    counts = {tokens: 1 + tokens / 10 for tokens in range(1, block.tokens + 1)}
    return BlockTimes(machine, "eager", 2, *size_of(block), counts)


@cache
def model_blocks() -> BlockTable:
    return idlefx.inspect(build("vit"))


def here() -> str:
    return machine_in_words(torch.zeros(1))


def measured(monkeypatch, dense_ms: float, other_ms: float) -> None:
    """Let the dense model and every other one take so long."""
    monkeypatch.setattr(timing, "_in_turn", lambda *_: (dense_ms, other_ms))


def takes_its_work(monkeypatch, dense_ms: float) -> None:
    """Let a model take time as it takes multiply-adds."""

    def in_turn(dense, inputs, weight, mode, other):
        return dense_ms, dense_ms * count_macs(other.graph.nodes) / count_macs(dense.graph.nodes)

    monkeypatch.setattr(timing, "_in_turn", in_turn)


def planned(**options):
    model = build("vit", depth=2)
    return idlefx.plan(model, images(model, 12), **{**ASKED, **options})


def test_time_is_that_of_the_dense_model_less_what_blocks_save_and_more_for_each_choice():
    blocks = model_blocks()
    steps = tuple(Step(i, "", 0.5, kept, 36, "", opens=i != 2) for i, kept in ((1, 18), (2, 18), (3, 8)))
    tells = Timing([table(blocks[0], "a machine")], 30.0, 0.5, 0.7, lambda _: (60.0, 20.0))
    saved = 0.5 * (18 + 18 + 28) / 10
    assert tells.ms(Plan(steps, blocks)) == pytest.approx(30 - saved + 2 * 0.7)
    assert tells.ms(Plan((replace(steps[0], kept=36),), blocks)) == 30.0, "what keeps all tokens is the dense model"
    assert tells.measured_ms(build("vit")) == 10.0, "at the pace of its own dense model"


def test_two_plans_say_how_much_of_the_table_arrives_and_what_choosing_costs():
    tells = Timing([], 30.0, 1.0, 0.0, lambda _: (0.0, 0.0))
    gains = [0.9 * 10 - 6 * 0.5, 0.9 * 8 - 1 * 0.5]
    fitted = _fitted(tells, (10.0, 8.0), (6.0, 1.0), gains)
    assert (fitted.scale, fitted.choosing_ms) == (pytest.approx(0.9), pytest.approx(0.5))
    free = _fitted(tells, (10.0, 8.0), (6.0, 1.0), [10.0, 7.0])  # many choices gained more than blocks can
    assert free.choosing_ms == 0.0 and free.scale == pytest.approx(17 / 18)
    assert _fitted(tells, (0.0, 0.0), (6.0, 1.0), [-1.0, -1.0]).scale == 1.0


def test_prediction_learns_from_a_plan_that_was_measured():
    blocks = model_blocks()
    steps = tuple(Step(i, "", 0.5, 18, 36, "", opens=i == 1) for i in (1, 2))
    tells, plan = Timing([table(blocks[0], "a machine")], 30.0, 1.0, 0.5, lambda _: (0.0, 0.0)), Plan(steps, blocks)
    assert tells.learn(plan, 29.0) == pytest.approx(1 - (30 - 3.6 + 0.5) / 29) and tells.ms(plan) == pytest.approx(29)
    assert tells.learn(plan, 29.0) == pytest.approx(0)


def test_choice_among_groups_that_join_counts_as_the_tokens_that_are_left():
    steps = (Step(1, "", 0.5, 18, 36, ""), Step(2, "", 0.5, 18, 36, "", opens=False), Step(3, "", 0.2, 8, 36, ""))
    assert choices(Plan(steps, model_blocks())) == 2
    assert choices(Plan((*steps[:2], replace(steps[2], joins=True)), model_blocks())) == 1.5


def test_table_survives_json():
    tables = (table(model_blocks()[0], "a machine"),)
    assert times_of(times_to_json(tables)) == tables


@pytest.mark.slow
def test_plan_for_a_time_keeps_it_and_tells_both_figures(monkeypatch):
    takes_its_work(monkeypatch, 40.0)
    times = [table(model_blocks()[0], here())]
    findings = planned(ms=35.0, times=times).findings
    assert findings.chosen.ms <= 35.0 and findings.dense_ms == 40.0
    assert findings.measured_ms == pytest.approx(findings.chosen.ms, rel=0.05), "though the table is of no device"
    text = str(findings)
    assert "35 ms at most" in text and "measured 3" in text and here() in text and "speed-up" in text
    by_speed = planned(speedup=40 / 35, times=times).findings
    assert by_speed.chosen == findings.chosen


@pytest.mark.slow
def test_multiply_adds_need_no_times(monkeypatch):
    monkeypatch.setattr(timing, "_in_turn", None)
    monkeypatch.setattr(timing, "measure_times", None)
    findings = planned(speedup=1.2, by="gmacs").findings
    assert findings.dense_ms is None and "ms:" not in str(findings)


@pytest.mark.slow
def test_table_is_measured_on_the_spot_if_there_is_none(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_S", 0.0)
    monkeypatch.setattr(timing, "MODEL_S", 0.0)
    monkeypatch.setattr(timing, "PARTS", 3)
    try:
        findings = planned(speedup=1.01).findings
    except PlanError as refusal:  # so small a model may well be the faster one
        assert "nothing is faster than the dense model" in str(refusal) and here() in str(refusal)
    else:
        assert findings.dense_ms > 0 and here() in findings.conditions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": "another device"}, "times: the table was measured on another device, but the model is on"),
        ({"width": 1}, "times: block 0 has width 48"),
        ({"ms": {20: 1.0, 30: 2.0}}, "times: the table covers"),
        (None, "times: the table is empty"),
    ],
)
def test_table_that_does_not_serve_is_refused(changes, message, monkeypatch):
    measured(monkeypatch, 40.0, 45.0)
    blocks, model = model_blocks(), build("vit")
    half = Candidate(Plan(tuple(Step(b.index, "", 0.5, 18, 36, "") for b in blocks), blocks), model)
    tables = [] if changes is None else [replace(table(blocks[0], here()), **changes)]
    with pytest.raises(InputError, match=message):
        timing_of(model, (half, half), ImageBatch([0], images(model, 1)), 2, tables)


@pytest.mark.slow
def test_model_that_nothing_makes_faster_is_left_as_it_is(monkeypatch):
    measured(monkeypatch, 40.0, 45.0)
    flat = replace(table(model_blocks()[0], here()), ms=dict.fromkeys(range(1, 38), 1.0))
    with pytest.raises(PlanError, match=r"nothing is faster than the dense model, which takes 40 ms.*leave the model"):
        planned(speedup=1.2, times=[flat])
