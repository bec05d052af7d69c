"""A plan from a budget: what it costs and changes, that it is the best of those tried, and how a search goes on."""

import json
from functools import cache

import pytest
import torch
from torch import nn

import idlefx
from idlefx.capture.export import capture
from idlefx.errors import InputError, PlanError
from idlefx.options import PlanOptions
from idlefx.search import search
from idlefx.search.candidates import Candidates
from idlefx.search.journal import Journal
from idlefx.search.search import Search
from idlefx.search.work import Work
from tests.models.small import build, build_mixing, images

PICTURES = 16
ASKED = {"gmacs": None, "by": "gmacs", "trials": 3, "batch_size": 8, "progress": False}


@cache
def pictures() -> torch.Tensor:
    return images(build("vit"), PICTURES)


def planned(model: nn.Module, **options):
    return idlefx.plan(model, pictures(), **{**ASKED, **options})


@cache
def dense() -> nn.Module:
    return build("vit", depth=2)


@cache
def found():
    """A search at a third fewer multiply-adds, which several tests look at."""
    return planned(dense(), speedup=1.5, trials=1)


@cache
def converted():
    return idlefx.convert(dense(), plan=found())


def test_plan_keeps_the_budget_and_makes_use_of_it():
    report = idlefx.report(converted())
    assert 1.5 <= report.ratio <= 1.6
    assert found().findings.chosen.gmacs == pytest.approx(report.idle_gmacs, rel=1e-3)
    assert found().findings.dense_gmacs == pytest.approx(report.dense_gmacs)


def test_plan_is_options_that_convert_takes_in_every_way():
    whole, parts = converted(), idlefx.convert(dense(), **found())
    assert isinstance(found(), PlanOptions) and whole.conversion.options == parts.conversion.options
    assert type(whole.conversion.options) is PlanOptions
    assert whole.plan == parts.plan and whole.plan.idle == "follow"


def test_reported_change_is_that_on_every_fourth_picture_which_had_no_part_in_the_choice():
    change = idlefx.compare(dense(), converted(), pictures()[3::4]).changes["idle"]["output"]
    findings = found().findings
    assert findings.change == pytest.approx(1 - change.cosine, abs=1e-6)
    assert findings.pictures == (12, 12, 4) and findings.worst == pytest.approx(change.worst, abs=1e-6)
    assert findings.worst_image == (3 + 4 * change.worst_image, "output")


@pytest.mark.slow
def test_plan_changes_no_more_than_any_even_taper_of_the_same_cost():
    model, chosen_on = build("vit"), pictures()[[place for place in range(PICTURES) if place % 4 != 3]]
    plans = {"chosen": planned(model, speedup=1.5)}
    for layers, keep in (([1, 2, 3], 0.67), ([1, 3], 0.57), ([2], 0.2), ([0, 2], 0.7)):
        plans[f"{layers}"] = PlanOptions(layers, keep, idle="follow")
    idle = {name: idlefx.convert(model, plan=plan) for name, plan in plans.items()}
    costs = {name: idlefx.report(each).idle_gmacs for name, each in idle.items()}
    changes = idlefx.compare(model, idle, chosen_on).changes
    fair = [name for name in plans if costs[name] <= costs["chosen"]]
    assert len(fair) == len(plans) and min(costs.values()) > 0.9 * costs["chosen"], costs
    assert min(fair, key=lambda name: -changes[name]["output"].cosine) == "chosen"


def test_findings_print_the_frontier_with_the_chosen_plan_marked():
    text, points = str(found()), found().findings.frontier
    assert text.count("→") == 2 and "speed-up of 1.5 by multiply-adds" in text and "had no part in it" in text
    costs = [point.gmacs for point in points]
    assert costs == sorted(costs) and len(points) > 3 and found().findings.chosen in points
    assert points[0].change > points[-1].change > 0
    assert json.loads(found().to_json())["findings"]["chosen"]["plan"] == found().to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "registers", "qk_norm", "gap"])
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_multiply_adds_by_formula_are_those_of_the_report(name, idle):
    model = build(name)
    base = PlanOptions([0], 1.0, idle=idle)
    work = Work(Candidates(capture(model, images(model, 2)), base))
    for layers, keep, reselect in (([1, 3], [0.8, 0.31], True), ([0, 1, 2], [0.9, 0.7, 0.11], idle == "rest")):
        idling = idlefx.convert(model, layers, keep, idle=idle, reselect=reselect, example_inputs=images(model, 2))
        assert work.gmacs(idling.plan) == pytest.approx(idlefx.report(idling).idle_gmacs, rel=2e-3)


@pytest.mark.slow
def test_cheapest_plan_within_a_change_keeps_it_and_a_looser_bound_gives_a_cheaper_one():
    model = build("vit", depth=2)
    tight, loose = (planned(model, max_change=bound, trials=2).findings for bound in (0.004, 0.03))
    assert tight.calibration_change <= 0.004 and loose.calibration_change <= 0.03
    assert loose.chosen.gmacs < tight.chosen.gmacs < tight.dense_gmacs
    with pytest.raises(PlanError, match=r"nothing stays within max_change=1e-09.*leave the model as it is"):
        planned(model, max_change=1e-9)


@pytest.mark.slow
def test_tokens_may_rest_and_outputs_may_be_many():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("vit", depth=2)

        def forward(self, x):
            tokens = self.net.forward_features(x)
            return {"map": tokens[:, 1:], "class": tokens[:, 0], "best": tokens[:, 0].argmax(-1), "one": x.new_ones(3)}

    plan = planned(Features().eval(), speedup=1.3, idle="rest", example_inputs=pictures()[:2])
    assert plan.idle == "rest" and plan.findings.worst_image[1] in ("map", "class")


@pytest.mark.slow
def test_blocks_that_cannot_idle_are_planned_around():
    model = build_mixing()
    plan = planned(model, speedup=1.2)
    assert 1 not in plan.layers and idlefx.report(idlefx.convert(model, plan=plan)).ratio >= 1.2


def interrupt_after(monkeypatch, looks):
    look, seen = Search.look, []

    def stopped(self, shape, options):
        if len(seen) == looks:
            raise KeyboardInterrupt
        seen.append(options)
        return look(self, shape, options)

    monkeypatch.setattr(Search, "look", stopped)


@pytest.mark.slow
def test_interrupted_search_keeps_its_best_and_goes_on_where_it_was(tmp_path, monkeypatch):
    out, wanted = tmp_path / "plan.json", found()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        first = planned(dense(), speedup=1.5, trials=1, out=out)
    assert first.findings.interrupted and "interrupted" in str(first) and first.findings.tried == 3
    assert idlefx.report(idlefx.convert(dense(), plan=idlefx.read_plan(out))).ratio >= 1.5
    found_now, put = [], Journal.put
    monkeypatch.setattr(Journal, "put", lambda *given: found_now.append(given[1]) or put(*given))
    whole = planned(dense(), speedup=1.5, trials=1, out=out, resume=True)
    assert whole.to_dict() == wanted.to_dict() and whole.findings.tried == wanted.findings.tried
    assert found_now.count(search.FEW) == whole.findings.tried - first.findings.tried
    assert idlefx.read_plan(out).to_dict() == whole.to_dict()
    assert list(tmp_path.iterdir()) == [out], "what was kept to go on with is gone"


@pytest.mark.slow
def test_search_that_is_stopped_before_its_first_plan_is_stopped(monkeypatch):
    interrupt_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        planned(dense(), speedup=1.5)


class Constant(nn.Module):
    """A model whose output no picture changes."""

    def __init__(self):
        super().__init__()
        self.net = build("vit", depth=2)

    def forward(self, x):
        return self.net(x) * 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is none; give one, speedup=1.5"),
        ({"speedup": 1.5, "gmacs": 0.01}, "there are 2: speedup and gmacs; give one"),
        ({"speedup": 0.5}, "speedup=0.5 must be above 1"),
        ({"max_change": 2}, "max_change=2 must be above 0 and below 1"),
        ({"gmacs": "few"}, "gmacs='few' is no number"),
        ({"speedup": 50.0}, r"a speed-up of 50 by multiply-adds is out of reach: .*cost from .* GMACs, a speed-up of"),
        pytest.param(
            {"gmacs": 99.0}, r"99 GMACs at most is out of reach: plans of this model cost from", marks=pytest.mark.slow
        ),
        ({"speedup": 1.5, "by": "luck"}, "by='luck' is unknown"),
        ({"speedup": 1.5, "trials": -1}, "trials=-1 is no whole number"),
        ({"speedup": 1.5, "limit": 7}, "there are 7, but a plan is chosen on no fewer than 8"),
        ({"speedup": 1.5, "resume": True}, "the search kept no file"),
        ({"speedup": 1.5, "plot": "plan.txt"}, "let its name end in .png"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        planned(dense(), **options)
    assert not list(tmp_path.iterdir())


def test_outputs_that_no_picture_changes_are_refused():
    with pytest.raises(InputError, match=r"the dense model returns the same for all of them \(output\)"):
        planned(Constant().eval(), speedup=1.5, example_inputs=pictures()[:2])


def test_model_without_a_block_that_can_idle_is_refused():
    model = build("vit", depth=1)
    model.blocks[0] = build_mixing().blocks[1]
    with pytest.raises(PlanError, match="no block of the model can let idle tokens follow"):
        planned(model.eval(), speedup=1.1)


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["follow", "rest"])
def test_whether_groups_join_is_the_first_that_is_tried_where_tokens_follow(idle, monkeypatch):
    looked, put = [], Journal.put
    monkeypatch.setattr(Journal, "put", lambda *given: looked.append(given[2]) or put(*given))
    planned(dense(), speedup=1.5, trials=1, idle=idle)
    assert any(not options.reselect for options in looked) == (idle == "follow")
