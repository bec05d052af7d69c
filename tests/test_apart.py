"""Streams that stand in windows, have three sides, or are flattened inside a block idle as those of a grid do."""

import pytest
import torch
from torch import nn

import idlefx
from idlefx.records import Step
from idlefx.reporting import token_map
from idlefx.runtime.selections import selections
from idlefx.zoo.comparisons import compare, compare_following
from tests.models.apart import COLUMNS, ROWS, SLOTS, WINDOWS, build, films
from tests.models.windows import Block, Windowed, pictures
from tests.support.messages import says

NESTED, WHOLE = ((WINDOWS, SLOTS), (WINDOWS, SLOTS)), (ROWS, COLUMNS)
KINDS = {  # the grid and the windows of a block
    "fused": NESTED,
    "biased": NESTED,
    "einsum": NESTED,
    "merged": NESTED,
    "across": ((SLOTS, WINDOWS), (SLOTS, WINDOWS)),
    "film": ((2, *WHOLE), (WINDOWS, 2 * SLOTS)),
    "flattened": (WHOLE, (WINDOWS, SLOTS)),
    "closed": (WHOLE, (WINDOWS, SLOTS)),
}
CASES = [
    pytest.param(kind, unit, marks=() if (kind, unit) in BASIC else pytest.mark.slow)
    for BASIC in ([("biased", "tokens"), ("film", "windows"), ("closed", "windows")],)
    for kind in KINDS
    for unit in ("windows", "tokens")
]


@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_idles_as_the_reference_does_with_masks(kind, unit):
    model = build(kind)
    table = idlefx.inspect(model, films(2))
    assert [(block.grid, block.windows, block.refusal, block.whole_only) for block in table] == [
        (*KINDS[kind], "", "")
    ] * 2
    idle = idlefx.convert(model, layers=[0, 1], keep=[0.7, 0.4], unit=unit, example_inputs=films(2))
    found = compare(model, idle, table, films(3, seed=1))
    assert found.error < 1e-6 and found.excess < 1e-5, found


@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(kind, unit, monkeypatch):
    model, x = build(kind), films(3, seed=1)
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, layers=[0], keep=1.0, unit=unit, example_inputs=x[:2])
    assert len(selections(idle, x)) == 2
    assert torch.equal(idle(x), model(x))


@pytest.mark.parametrize(
    "kind", [kind if kind == "across" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_tokens_follow_in_their_window_as_in_the_reference(kind):
    model = build(kind)
    idle = idlefx.convert(model, layers=[0], keep=0.5, idle="follow", example_inputs=films(2))
    assert [len(stage) for stage in idle.plan.stages] == [2]
    batches = [films(3, seed=seed) for seed in range(1, 5)]
    found = compare_following(model, idle, idle.plan.blocks, batches)
    assert found.error is not None and found.error < 1e-6 and found.grouped, found


@torch.no_grad()
@pytest.mark.parametrize("unit", ["windows", "tokens"])
def test_idle_tokens_of_a_stream_in_windows_leave_it_bit_identical(unit):
    model, x = build("biased", 1), films(3, seed=2)
    model.neck = nn.Identity()
    idle = idlefx.convert(model, layers=[0], keep=0.5, unit=unit, example_inputs=x[:2])
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(x)
    worked = (idle(x) != entered[0]).any(-1)  # (B, windows, slots)
    of_each = worked.all(2).sum(1) if unit == "windows" else worked.sum(2)
    assert of_each.unique().tolist() == [WINDOWS // 2 if unit == "windows" else SLOTS // 2]
    assert worked.sum((1, 2)).tolist() == [WINDOWS * SLOTS // 2] * 3


@pytest.mark.parametrize("kind", ["fused", "film"])
def test_no_picture_is_drawn_of_tokens_that_form_no_grid_over_the_image(kind, tmp_path):
    idle = idlefx.convert(build(kind, 1), layers=[0], keep=0.5, example_inputs=films(2))
    assert idle.plan.blocks[0].grid == KINDS[kind][0]
    with pytest.raises(idlefx.InputError, match=r"draw: the tokens of block 0 \(blocks.0\) form no grid"):
        token_map._workers(idle, films(1))


class Neighbours(Block):
    """A convolution over all neighbours stands behind the attention over windows."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.near = nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, x):
        x = x + self.local(x)
        return x + self.near(self.norm2(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_a_refusal_says_what_stands_behind_the_windows():
    (block,) = idlefx.inspect(Windowed(Neighbours(6, 9)).eval(), pictures(2, 6, 9))
    assert says(block.refusal, "breaks up the token axis", "behind which", "convolves over", r"windows\.py:\d+: ")


class Asked(nn.Module):
    """Every second block asks with queries that are made of what enters the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.neck = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(4))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(4))

    def forward(self, x):
        x = entered = self.patches(x).flatten(2).transpose(1, 2)
        for place, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            y = norm(x)
            x = x + attention(entered.flip(2) if place % 2 else y, y, y, need_weights=False)[0]
        return self.neck(x)


def test_queries_from_elsewhere_are_refused_and_leave_the_other_blocks_alone():
    table = idlefx.inspect(Asked().eval(), pictures(2, 4, 6))
    assert [block.can_idle for block in table] == [True, False, True, False]
    assert says(table[1].refusal, "takes queries, keys or values from outside the block", r"test_apart\.py:\d+: ")
