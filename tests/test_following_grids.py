"""Tokens on a grid follow as those of a sequence do: grouped in row-major order, and handed back onto the grid."""

import pytest
import torch
from torch import nn

import idlefx
from idlefx.capture.export import capture
from idlefx.options import PlanOptions
from idlefx.records import Step
from idlefx.runtime.selections import groups
from idlefx.search.candidates import Candidates
from idlefx.search.work import Work
from idlefx.zoo.comparisons import compare_following
from tests.models.grids import COLUMNS, KINDS, ROWS, Causal, ChannelsLast, Pyramid, build, pictures
from tests.support.gradients import check_slopes
from tests.support.messages import says

pytestmark = pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")

BASIC, CONVOLVING = ("relative", "first"), ("first", "norm_written")
PLAN = {"layers": [0, 1], "keep": 0.6, "idle": "follow", "example_inputs": pictures(2)}


def agrees(model: nn.Module, idle: idlefx.IdleModule) -> bool:
    """Whether a model whose tokens follow groups and computes as the reference does."""
    table = idlefx.inspect(model, pictures(2))
    found = compare_following(model, idle, table, [pictures(3, seed=seed) for seed in range(1, 9)])
    assert not found.reason and found.error is not None, found
    return found.grouped and found.error <= 1e-5


@pytest.mark.parametrize("kind", [k if k in BASIC else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_follows_as_the_reference_does(kind):
    model, x = build(kind, 3), pictures(2)
    idle = idlefx.convert(model, **PLAN)
    assert [len(stage) for stage in idle.plan.stages] == [1, 2]
    assert not torch.allclose(idle(x), model(x), rtol=1e-2)
    assert agrees(model, idle)


@pytest.mark.parametrize("kind", [k if k in BASIC else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(kind, monkeypatch):
    model, x = build(kind, 3), pictures(3, seed=1)
    model.neck = nn.Identity()
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, **PLAN | {"keep": 1.0})
    assert [len(stage) for stage in idle.plan.stages] == [1, 2]
    if kind in CONVOLVING:  # which adds up in another order where memory is laid out in another
        torch.testing.assert_close(idle(x), model(x), atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(idle(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first", "relative"])
def test_groups_join(kind):
    model = build(kind, 3)
    idle = idlefx.convert(model, **PLAN, reselect=False)
    assert [stage[0].joins for stage in idle.plan.stages] == [False, True]
    assert agrees(model, idle)


@pytest.mark.slow
@pytest.mark.parametrize("reselect", [True, False])
def test_who_reads_between_two_blocks_reads_all_tokens(reselect):
    model = build("relative", 3, tells=True)
    idle = idlefx.convert(model, **PLAN, reselect=reselect)
    assert [len(stage) for stage in idle.plan.stages] == [1, 2]
    assert agrees(model, idle)


@torch.no_grad()
def test_a_group_moves_as_its_worker_does():
    model, x = build("last", tells=True), pictures(3, seed=1)
    idle = idlefx.convert(model, [0], 0.4, idle="follow", example_inputs=pictures(2))
    before = model.patches(x) + model.positions
    gain = (idle(x)[1].permute(0, 3, 1, 2) - before).flatten(2)
    leaders = groups(idle, x)[0]
    assert leaders.shape == (3, ROWS * COLUMNS) and [len(each.unique()) for each in leaders] == [9, 9, 9]
    torch.testing.assert_close(gain, gain.gather(2, leaders.unsqueeze(1).expand_as(gain)))


def test_keeping_all_is_the_model():
    model, x = build("relative", 2), pictures(2)
    assert torch.equal(idlefx.convert(model, **PLAN | {"keep": 1.0})(x), model(x))


@pytest.mark.slow
def test_a_stage_ends_where_the_grid_changes():
    model = build("last", 4, whole=Pyramid)
    idle = idlefx.convert(model, **PLAN | {"layers": [0], "keep": 0.5})
    assert [(step.block, step.opens, step.kept) for step in idle.plan] == [
        (0, True, 12),
        (1, False, 12),
        (2, True, 3),
        (3, False, 3),
    ]
    assert agrees(model, idle)


@pytest.mark.slow
def test_gradients_are_slopes():
    model, x = build("relative", 2).double(), pictures(2, seed=3).double()
    check_slopes(idlefx.convert(model, **PLAN | {"example_inputs": x}), x)


def test_attention_that_takes_no_term_is_refused():
    (block,) = idlefx.inspect(build(Causal), pictures(2))
    assert block.can_idle
    assert says(block.rest_only, "is causal, and takes no other mask", r"grids\.py:\d+: return F\.scaled"), block
    with pytest.raises(idlefx.PlanError, match=r"can rest but not follow: .* is causal"):
        idlefx.convert(build(Causal), [0], 0.5, idle="follow", example_inputs=pictures(2))


def test_groups_are_drawn_on_their_grid(tmp_path):
    idle = idlefx.convert(build(ChannelsLast), **PLAN | {"layers": [0]})
    assert idlefx.draw(idle, pictures(2), tmp_path / "tokens.png").stat().st_size > 0


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches():
    idle = idlefx.convert(build("relative", 2), **PLAN, reselect=False)
    fast = idlefx.compile(idle)
    for batch in (2, 3, 5):
        torch.testing.assert_close(fast(pictures(batch)), idle(pictures(batch)), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_multiply_adds_by_formula_count_what_runs_on_the_whole_grid(idle):
    model, x = build("relative", 3), pictures(2)
    work = Work(Candidates(capture(model, x), PlanOptions([0], 1.0, idle=idle)))
    idling = idlefx.convert(model, [0, 2], [0.8, 0.4], idle=idle, example_inputs=x)
    assert work.gmacs(idling.plan) == pytest.approx(idlefx.report(idling).idle_gmacs, rel=2e-3)


@pytest.mark.slow
def test_a_plan_is_found():
    model, x = build("relative", 3), pictures(12)
    found = idlefx.plan(model, x, speedup=1.2, by="gmacs", trials=3, example_inputs=x, progress=False)
    idle = idlefx.convert(model, plan=found, example_inputs=x)
    assert idle.plan.idle == "follow" and idlefx.report(idle).ratio >= 1.2
    assert idlefx.compare(model, idle, x, progress=False).images == 12
