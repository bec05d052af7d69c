"""Windows that are stacked in the batch: where attention joins them, the tokens of an image follow as one sequence."""

import pytest
import torch

import idlefx
from idlefx.capture.export import capture
from idlefx.options import PlanOptions
from idlefx.runtime.selections import groups
from idlefx.search.candidates import Candidates
from idlefx.search.work import Work
from idlefx.zoo.comparisons import compare_following
from tests.models.stacked import SLOTS, TOKENS, WIDTH, build, pictures
from tests.support.gradients import check_slopes

PLAN = {"layers": [0], "keep": 0.6, "idle": "follow", "example_inputs": pictures(2)}


def agrees(model, idle):
    """Whether a model whose tokens follow groups and computes as the reference does."""
    table = idlefx.inspect(model, pictures(2))
    found = compare_following(model, idle, table, [pictures(3, seed=seed) for seed in range(1, 9)])
    assert not found.reason and found.error is not None, found
    return found.grouped and found.error <= 1e-5


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("how", ["behind", "front", "dims", "sized"])
def test_follows_as_the_reference_does(how, prefix):
    model, x = build("inside", how, how, prefix=prefix), pictures(2)
    idle = idlefx.convert(model, **PLAN)
    told = [(step.opens, step.kept, step.tokens) for step in idle.plan]
    assert told == [(True, 3, SLOTS), (True, 14, TOKENS), (False, 14, TOKENS)]
    assert not torch.allclose(idle(x), model(x), rtol=1e-2)
    assert agrees(model, idle)


def test_groups_join():
    model = build("behind", "front", "inside")
    with pytest.raises(idlefx.PlanError, match="cannot work on 6 image tokens where block 0 works on 4"):
        idlefx.convert(model, **PLAN | {"layers": [0, 1], "keep": [0.2, 0.25]}, reselect=False)
    idle = idlefx.convert(model, **PLAN | {"layers": [0, 1], "keep": [0.7, 0.4]}, reselect=False)
    assert [(stage[0].block, stage[0].joins) for stage in idle.plan.stages] == [(0, False), (1, True), (2, False)]
    assert agrees(model, idle)


@torch.no_grad()
def test_a_group_moves_as_its_worker_does():
    model, x = build("behind", tells=True), pictures(3, seed=1)
    idle = idlefx.convert(model, **PLAN | {"keep": 0.4})
    gain = (idle(x) - model.windows(x)).view(3, TOKENS, WIDTH)
    leaders = groups(idle, x)[0]
    assert [len(each.unique()) for each in leaders] == [9, 9, 9]
    assert any((each // SLOTS != torch.arange(TOKENS) // SLOTS).any() for each in leaders)  # across windows
    torch.testing.assert_close(gain, gain.gather(1, leaders.unsqueeze(2).expand_as(gain)))


def test_keeping_all_is_the_model():
    model, x = build("inside", "front"), pictures(3)
    assert torch.equal(idlefx.convert(model, **PLAN | {"keep": 1.0})(x), model(x))


def test_gradients_are_slopes():
    model, x = build("behind", "front").double(), pictures(2, seed=3).double()
    check_slopes(idlefx.convert(model, **PLAN | {"example_inputs": x}), x)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches():
    idle = idlefx.convert(build("inside", "behind", "dims"), **PLAN)
    fast = idlefx.compile(idle)
    for batch in (2, 3, 5):
        torch.testing.assert_close(fast(pictures(batch)), idle(pictures(batch)), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_multiply_adds_by_formula_are_those_of_the_report(idle):
    model, x = build("inside", "behind", "front"), pictures(2)
    work = Work(Candidates(capture(model, x), PlanOptions([0], 1.0, idle=idle)))
    idling = idlefx.convert(model, [0, 2], [0.8, 0.4], idle=idle, example_inputs=x)
    assert work.gmacs(idling.plan) == pytest.approx(idlefx.report(idling).idle_gmacs, rel=1e-4)


@pytest.mark.slow
def test_a_plan_is_found():
    model, x = build("inside", "behind", "inside", "front"), pictures(12)
    found = idlefx.plan(model, x, speedup=1.2, by="gmacs", trials=3, example_inputs=x, progress=False)
    idle = idlefx.convert(model, plan=found, example_inputs=x)
    assert idle.plan.idle == "follow" and idlefx.report(idle).ratio >= 1.2
    assert TOKENS in {step.tokens for step in idle.plan if step.idles}
    assert idlefx.compare(model, idle, x, progress=False).images == 12
