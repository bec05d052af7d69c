"""Tokens follow inside windows: each is grouped as if it were an image, and a stage lasts as long as windows do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import idlefx
from idlefx.capture.export import capture
from idlefx.errors import InputError
from idlefx.options import PlanOptions
from idlefx.records import Step
from idlefx.runtime.selections import groups, selections
from idlefx.search.candidates import Candidates
from idlefx.search.work import Work
from idlefx.zoo.comparisons import compare_following
from idlefx.zoo.entry import Inputs
from idlefx.zoo.survey import find, inputs_of
from tests.models.small import randomise
from tests.models.windows import (
    SIDE,
    ApartHeads,
    Block,
    ChannelsFirst,
    MergedHeads,
    Windowed,
    WindowedChannelsFirst,
    pictures,
)
from tests.support.gradients import check_slopes
from tests.support.messages import refusal, says

pytestmark = pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")

SIDES, COUNT = (6, 9), 6  # rows and columns, and how many windows
X = pictures(2, *SIDES)
PLAN = {"layers": [0], "keep": 0.5, "idle": "follow", "example_inputs": X}

KINDS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {  # with the lengths of the stages
    "shifted": (lambda: Windowed(Block(*SIDES), Block(*SIDES, 1), Block(*SIDES, 1, fused=False)), [1, 2]),
    "plain": (lambda: Windowed(Block(*SIDES), Block(*SIDES, fused=False)), [2]),
    "sequence": (lambda: Windowed(Block(*SIDES, 1, sequence=True), Block(*SIDES, 1, sequence=True)), [2]),
    "pads first": (lambda: Windowed(Block(*SIDES, 1, pads_first=True, fused=False)), [1]),
    "apart heads": (lambda: Windowed(ApartHeads(*SIDES, 1), ApartHeads(*SIDES)), [1, 1]),
    "merged heads": (lambda: Windowed(MergedHeads(*SIDES), MergedHeads(*SIDES)), [2]),
    "channels first": (lambda: WindowedChannelsFirst(ChannelsFirst(*SIDES, 1), ChannelsFirst(*SIDES, 1)), [2]),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():
        randomise(model)
        for block in model.blocks:
            block.bias.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def shifted() -> tuple[nn.Module, idlefx.IdleModule]:
    model = build("shifted")
    return model, idlefx.convert(model, **PLAN)


def agrees(model: nn.Module, idle: idlefx.IdleModule, example: Inputs, batches: list[Inputs]) -> bool:
    """Whether a model whose tokens follow groups and computes as the reference does."""
    found = compare_following(model, idle, idlefx.inspect(model, example), batches)
    assert not found.reason and found.error is not None, found
    return found.grouped and found.error <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS][1:])
def test_follows_as_the_reference_does(kind):
    model = build(kind)
    idle = idlefx.convert(model, **PLAN)
    assert [len(stage) for stage in idle.plan.stages] == KINDS[kind][1]
    assert agrees(model, idle, X, [pictures(3, *SIDES, seed=seed) for seed in range(1, 6)])


def test_shifted_and_masked_windows_follow_as_the_reference_does(shifted):
    model, idle = shifted
    assert [[step.block for step in stage] for stage in idle.plan.stages] == [[0], [1, 2]]
    assert "24 of 54: 4 of 9 in each window" in str(idle.plan)
    assert not torch.allclose(idle(X), model(X), rtol=1e-2)
    assert agrees(model, idle, X, [pictures(3, *SIDES, seed=seed) for seed in range(1, 6)])


@torch.no_grad()
def test_who_follows_whom_stays_in_a_window(shifted):
    _, idle = shifted
    told = groups(idle, X)
    rows, columns = torch.arange(54) // SIDES[1], torch.arange(54) % SIDES[1]
    for block, shift in enumerate((0, 1, 1)):
        window = (rows - shift) % SIDES[0] // SIDE * COUNT + (columns - shift) % SIDES[1] // SIDE
        assert torch.equal(window[told[block]], window.expand(2, -1))
        assert [len(leaders.unique()) for leaders in told[block]] == [4 * COUNT] * 2
        assert torch.equal(selections(idle, X)[block].sort().values[0], told[block][0].unique())


@pytest.mark.slow
@torch.no_grad()
def test_a_group_moves_as_its_worker_does(shifted):
    model, _ = shifted
    alone = Windowed(model.blocks[1])
    alone.patches, alone.neck = model.patches, nn.Identity()
    idle = idlefx.convert(alone, **PLAN)
    gain = (idle(X) - model.patches(X)).flatten(2)
    leaders = groups(idle, X)[0]
    torch.testing.assert_close(gain, gain.gather(2, leaders.unsqueeze(1).expand_as(gain)))


def test_keeping_all_is_the_model(shifted):
    model, _ = shifted
    assert torch.equal(idlefx.convert(model, **PLAN | {"keep": 1.0})(X), model(X))


@pytest.mark.parametrize("kind", [k if k == "shifted" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(kind, monkeypatch):
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    model = build(kind)
    idle = idlefx.convert(model, **PLAN | {"keep": 1.0})
    assert [len(stage) for stage in idle.plan.stages] == KINDS[kind][1]
    if kind == "merged heads":  # torch computes attention in three dimensions in another way where there is a mask
        torch.testing.assert_close(idle(X), model(X), atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(idle(X), model(X))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(shifted):
    _, idle = shifted
    x = pictures(3, *SIDES, seed=4)
    assert torch.equal(idle(x)[1:2], idle(x[1:2]))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["tokens", "windows"])
def test_the_token_cut_loss_of_windows_is_refused(shifted, unit):
    resting = idlefx.convert(shifted[0], **PLAN | {"idle": "rest", "unit": unit})
    assert says(refusal(idlefx.with_cut_loss, resting), "token cut loss", "is over windows", "train without it")
    with pytest.raises(InputError, match=r"those of this model follow; train without it, or convert with idle='rest'"):
        idlefx.with_cut_loss(shifted[1])


@pytest.mark.slow
def test_work_is_counted_as_reported(shifted):
    model, idle = shifted
    work = Work(candidates := Candidates(capture(model, X), PlanOptions([0], 1.0, idle="follow")))
    assert work.gmacs(idle.plan) == pytest.approx(idlefx.report(idle).idle_gmacs, rel=1e-3)
    assert not candidates.may_join


@pytest.mark.slow
def test_gradients_are_slopes():
    model = build("shifted").double()
    idle = idlefx.convert(model, **PLAN | {"example_inputs": X.double()})
    check_slopes(idle, pictures(2, *SIDES, seed=3).double())


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches(shifted):
    _, idle = shifted
    fast = idlefx.compile(idle)
    for batch in (2, 3, 5):
        x = pictures(batch, *SIDES)
        torch.testing.assert_close(fast(x), idle(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_plan_is_found_and_packaged_and_drawn(shifted, tmp_path):
    model, x = shifted[0], pictures(12, *SIDES)
    found = idlefx.plan(model, x, speedup=1.2, by="gmacs", trials=3, example_inputs=X, progress=False)
    idle = idlefx.convert(model, plan=found, example_inputs=X)
    assert idle.plan.idle == "follow" and idlefx.report(idle).ratio >= 1.2
    assert idlefx.draw(idle, X, tmp_path / "tokens.png").stat().st_size > 0
    for name in ("model.pt2", "model.onnx"):  # which hold what they package against the module
        idlefx.package(idle, tmp_path / name)
    torch.testing.assert_close(idlefx.load(tmp_path / "model.pt2")(X), idle(X), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["swin_tiny", "swinv2_tiny", "torchvision Swin torchvision", "^Swin, eager"])
def test_models_of_libraries_follow_as_the_reference_does(label):
    entry = find(label)[0]
    model = entry.make()
    example = inputs_of(entry, model, 2)
    table = idlefx.inspect(model, example)
    assert any(block.windows and not block.rest_only for block in table)
    idle = idlefx.convert(model, [0], 0.6, idle="follow", unit="tokens", example_inputs=example)
    assert len(idle.plan) == len(table)
    assert agrees(model, idle, example, [inputs_of(entry, model, 3, seed=seed) for seed in range(1, 9)])
