"""Attention over segments of a sequence, as of packed images: of each its share of the tokens works."""

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.capture.export import capture
from idlefx.pipeline import spell
from idlefx.records import Step
from idlefx.runtime.selections import groups, selections
from tests.models.packed import PATCH, Block, Tower, by_chunks, by_narrow, by_slices, tower
from tests.oracles import segments as oracle
from tests.support.cases import CLEAR_MARGIN, relative_error
from tests.support.gradients import check_slopes, of_squares
from tests.support.messages import refusal, says

pytestmark = pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")

LENGTHS, COUNT = (6, 1, 9, 2), 18
KEEPS = {0: 0.6, 1: 0.6, 2: 0.36}
PLAN = {"layers": [0, 2], "keep": 0.6}
KINDS = {
    "split": {},
    "by hand": {"fused": False},
    "biased": {"biased": True},
    "turned": {"turns": True, "fused": False},
    "slices": {"cut": by_slices, "biased": True, "fused": False},
    "narrow": {"cut": by_narrow},
    "shared keys": {"shares_keys": True, "turns": True},
    "post norm": {"post_norm": True},
}
FEW = [pytest.param(kind, marks=() if kind in ("split", "slices") else pytest.mark.slow) for kind in KINDS]


def patches(count: int = COUNT, seed: int = 1) -> Tensor:
    return torch.randn(count, PATCH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain() -> tuple[Tower, idlefx.IdleModule]:
    model = tower(LENGTHS)
    return model, idlefx.convert(model, **PLAN, example_inputs=patches())


@pytest.mark.parametrize("kind", FEW)
def test_tokens_of_each_segment_rest_as_the_definition_says(kind):
    model, x = tower(LENGTHS, **KINDS[kind]), patches(seed=2)
    idle = idlefx.convert(model, **PLAN, example_inputs=patches())
    wanted = oracle.rest(model, KEEPS, x)
    assert wanted.margin > CLEAR_MARGIN
    assert [step.kept_by_segment for step in idle.plan] == [(3, 1, 5, 1), (3, 1, 5, 1), (2, 1, 3, 1)]
    assert all(torch.equal(index[0], wanted.working[block]) for block, index in selections(idle, x).items())
    assert relative_error(idle(x), wanted.output) < 1e-6


def test_equal_pieces_are_segments_too():
    model, x = tower((8, 8), cut=by_chunks), patches(16, seed=2)
    idle = idlefx.convert(model, **PLAN, example_inputs=patches(16))
    assert relative_error(idle(x), oracle.rest(model, KEEPS, x).output) < 1e-6


def test_each_sequence_of_a_batch_is_by_itself(plain):
    x = torch.stack([patches(seed=seed) for seed in (1, 2, 3)])
    idle = idlefx.convert(plain[0], **PLAN, example_inputs=x[:2])
    assert idle.conversion.batch_free
    assert relative_error(idle(x), torch.stack([plain[1](one) for one in x])) < 1e-6


@pytest.mark.parametrize("kind", FEW)
def test_tokens_of_each_segment_follow_as_the_definition_says(kind):
    model, x = tower(LENGTHS, **KINDS[kind]), patches(seed=2)
    idle = idlefx.convert(model, **PLAN, idle="follow", example_inputs=patches())
    wanted = oracle.follow(model, [(range(2), 0.6), (range(2, 3), 0.36)], x)
    assert wanted.margin > CLEAR_MARGIN
    assert all(torch.equal(led[0].unique(), wanted.working[block]) for block, led in groups(idle, x).items())
    assert relative_error(idle(x), wanted.output) < 1e-6


def test_a_later_stage_joins_groups_of_the_same_segment(plain):
    model, x = plain[0], patches(seed=2)
    idle = idlefx.convert(model, **PLAN, idle="follow", reselect=False, example_inputs=patches())
    assert [step.joins for step in idle.plan] == [False, False, True]
    wanted = oracle.follow(model, [(range(2), 0.6), (range(2, 3), 0.36)], x, joins=True)
    assert wanted.margin > CLEAR_MARGIN
    told = groups(idle, x)
    assert all(torch.equal(led[0].unique(), wanted.working[block]) for block, led in told.items())
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    assert all(torch.equal(segment[led[0]], segment) for led in told.values())
    assert relative_error(idle(x), wanted.output) < 1e-6


def test_where_no_token_returns_later_blocks_choose_among_those_of_each_segment(plain):
    x = patches(seed=2)
    chosen = selections(idlefx.convert(plain[0], **PLAN, reselect=False, example_inputs=x), x)
    for before, after in ((0, 1), (1, 2)):
        assert set(chosen[after][0].tolist()) <= set(chosen[before][0].tolist())
    assert [len(index[0]) for index in chosen.values()] == [10, 10, 7]


def test_tokens_that_rest_come_out_as_they_went_in():
    model, x = tower(LENGTHS, depth=1), patches()
    model.norm, model.head = nn.Identity(), nn.Identity()
    idle = idlefx.convert(model, [0], 0.5, example_inputs=x)
    rests = torch.ones(COUNT, dtype=torch.bool).index_fill(0, selections(idle, x)[0][0], False)
    before = model.patches(x) + model.positions
    assert torch.equal(idle(x)[rests], before[rests]) and rests.sum() == 9


@pytest.mark.parametrize("kind", FEW)
def test_keeping_all_through_the_passes_is_the_original(kind, monkeypatch):
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    model, x = tower(LENGTHS, **KINDS[kind]), patches()
    idle = idlefx.convert(model, [0], 1.0, example_inputs=x)
    assert [step.kept_by_segment for step in idle.plan] == [LENGTHS] * 3
    assert all(index[0].tolist() == list(range(COUNT)) for index in selections(idle, x).values())
    # Attention written by hand is spelled as the fused kernel before anything else, and that rounds on its own.
    wanted = model if KINDS[kind].get("fused", True) else spell(capture(model, x).eval_graph)
    assert torch.equal(idle(x), wanted(x))


def test_multiples_are_of_each_segment(plain):
    idle = idlefx.convert(plain[0], [0], 0.5, multiple_of=4, example_inputs=patches())
    assert idle.plan[0].kept_by_segment == (4, 1, 4, 2)


def test_a_score_of_ones_own_sees_one_segment_after_the_other(plain):
    @idlefx.selector
    def last_of_segment(x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], dtype=x.dtype).expand(x.shape[:2])

    x = patches()
    idle = idlefx.convert(plain[0], [0], 0.34, selector="last_of_segment", schedule="blocks", example_inputs=x)
    assert selections(idle, x)[0].tolist() == [[4, 5, 6, 13, 14, 15, 17]]


def test_gradients_are_those_of_the_definition(plain):
    model, idle = plain
    x = patches(seed=2)
    wanted = of_squares(model, oracle.rest(model, KEEPS, x).output)
    found = of_squares(idle, idle(x))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in wanted.items())
    check_slopes(idlefx.convert(tower(LENGTHS).double(), **PLAN, idle="follow", example_inputs=x.double()), x.double())


def test_dropout_acts_in_train_mode_alone():
    x = patches()
    idle = idlefx.convert(tower(LENGTHS, dropout=0.5).train(), **PLAN, example_inputs=x)
    assert not torch.equal(idle(x), idle(x))
    assert torch.equal(idle.eval()(x), idle(x))


class Varies(Block):
    """Attends over other segments in train mode."""

    def attention(self, x: Tensor) -> Tensor:
        self.lengths = (4, 12) if self.training else (8, 8)
        return super().attention(x)


def test_other_segments_in_train_mode_are_other_blocks():
    with pytest.warns(UserWarning, match="in train mode the model has other blocks than in eval mode"):
        idle = idlefx.convert(tower((8, 8), kind=Varies), [0], 0.5, example_inputs=patches(16))
    assert torch.equal(idle.train()(patches(16)), idle.eval()(patches(16)))


class Reversed(Block):
    """Joins what it attended to in another order."""

    def attention(self, x: Tensor) -> Tensor:
        return torch.cat(super().attention(x).split(list(self.lengths))[::-1])


class Across(Block):
    """Each segment attends to another one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        self.held = [*getattr(self, "held", []), (k, v)]
        if len(self.held) % 2:
            return q
        (k1, v1), (k2, v2) = self.held
        self.held = []
        return super().attend(q, k1, v1, bias) + super().attend(q, k2, v2, bias)


class Partly(Block):
    """The last segment has no attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return v if q.shape[-2] == self.lengths[-1] else super().attend(q, k, v, bias)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Reversed, "combines tokens with something that is not laid out like them"),
        (Across, "cuts the image tokens apart at a place that moves"),
        (Partly, "cuts the image tokens apart at a place that moves"),
    ],
)
def test_what_divides_the_sequence_otherwise_is_refused(kind, words):
    lengths = (8, 8) if kind is Across else (4, 4, 8)
    said = refusal(idlefx.convert, tower(lengths, kind=kind), [0], 0.5, example_inputs=patches(16))
    assert says(said, words, r"(packed|test_segments)\.py:\d+")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": 1}, "segments of the sequence, which keep no prefix tokens; prefix=0 lets all idle"),
        ({"unit": "windows"}, "is for attention over windows, which no block has"),
        ({"selector": "class"}, "needs a class token"),
    ],
)
def test_options_that_segments_do_not_take_are_refused(plain, options, words):
    assert words in refusal(idlefx.convert, plain[0], **PLAN, **options, example_inputs=patches())


def test_other_segments_end_a_stage_and_let_no_choice_go_on():
    torch.manual_seed(0)
    model = Tower([Block((8, 8)), Block((4, 12)), Block((4, 12))], 16).eval()
    idle = idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=patches(16))
    assert [len(stage) for stage in idle.plan.stages] == [1, 2]
    said = refusal(idlefx.convert, model, [0], 0.5, reselect=False, example_inputs=patches(16))
    assert says(said, "must attend over the segments of block 0", r"has .* tokens where that has", "let tokens return")


def test_the_token_cut_loss_is_not_of_segments(plain):
    assert "over windows or segments; train without it" in refusal(idlefx.with_cut_loss, plain[1])
