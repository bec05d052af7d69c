"""What a plan says of windows, and what is refused of them in words."""

import pytest
import torch
from torch import nn

import idlefx
from idlefx.errors import InputError
from idlefx.runtime.selections import selections
from tests.models.small import build
from tests.models.windows import WIDTH, Block, Windowed, pictures
from tests.support.messages import says

X, PADDED = pictures(2, 6, 9), pictures(2, 5, 8)


class Moved(Block):
    """Windows of tokens that were moved in a way of their own first."""

    def __init__(self, move) -> None:
        super().__init__(6, 9)
        self.move = move

    def local(self, x):
        return super().local(self.move(x)).reshape(-1, 6, 9, WIDTH)


class Twice(Block):
    """Attention over windows, and beside it over shifted ones."""

    def __init__(self) -> None:
        super().__init__(6, 9)
        self.other = Block(6, 9, 1)

    def local(self, x):
        return super().local(x) + self.other.local(x)


def over_images(x):
    return x.flatten(0, 1).roll(1, 0).unflatten(0, (-1, 6))


@pytest.fixture(scope="module")
def idle():
    torch.manual_seed(0)
    return idlefx.convert(Windowed(Block(6, 9), Block(6, 9, 1)), [0, 1], [0.5, 0.4], example_inputs=X)


def test_fewer_than_sixteen_windows_let_tokens_idle(idle):
    assert [(step.unit, step.kept, step.tokens) for step in idle.plan] == [("tokens", 24, 54), ("tokens", 18, 54)]
    assert "24 of 54: 4 of 9 in each window" in str(idle.plan)
    assert "54 in 6 x 9" in str(idle.plan.blocks)
    report = str(idlefx.report(idle))
    assert "wants fine-tuning" in report and "idle='follow' needs none" in report


def test_more_windows_idle_as_a_whole():
    many = pictures(2, 12, 12)
    idle = idlefx.convert(Windowed(Block(12, 12)), [0], 0.6, example_inputs=many)
    assert "81 of 144: 9 of 16 windows" in str(idle.plan)
    assert selections(idle, many)[0].shape == (2, 81)
    rounded = idlefx.convert(Windowed(Block(12, 12)), [0], 0.6, multiple_of=4, example_inputs=many)
    assert rounded.plan[0].kept == 12 * 9


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(6, 9), (5, 8)])
def test_a_plan_is_found_by_multiply_adds_and_times_are_refused(sides):
    torch.manual_seed(0)
    model, images = Windowed(Block(*sides), Block(*sides, 1)), pictures(12, *sides)
    asked = {"trials": 1, "idle": "rest", "example_inputs": images[:2], "progress": False}
    plan = idlefx.plan(model, images, speedup=1.2, by="gmacs", **asked)
    report = idlefx.report(idlefx.convert(model, plan=plan, example_inputs=images[:2]))
    assert report.ratio >= 1.2 and plan.findings.chosen.gmacs == pytest.approx(report.idle_gmacs, rel=1e-3)
    with pytest.raises(InputError, match=r"block 0 \(.*\) is over windows, and tables of times .* with by='gmacs'"):
        idlefx.plan(model, images, speedup=1.2, **asked)


def test_padded_windows_idle_as_a_whole():
    idle = idlefx.convert(Windowed(Block(5, 8)), [0], 0.5, example_inputs=PADDED)
    assert (idle.plan[0].unit, idle.plan[0].kept) == ("windows", 27)


@pytest.mark.parametrize(
    ("block", "images", "options", "words"),
    [
        (Block(5, 8), PADDED, {"unit": "tokens"}, "its windows are padded, .*; take unit='windows'"),
        (Block(6, 9), X, {"reselect": False}, "chooses anew in windows of its own; let tokens return"),
        (Block(5, 8), PADDED, {"idle": "follow"}, "follow: only whole windows .* are padded, .* or take idle='rest'"),
        (Block(6, 9), X, {"idle": "follow", "unit": "windows"}, "block 0 .* only rest; take unit='tokens', or idle="),
        (Block(6, 9), X, {"idle": "follow", "reselect": False}, "anew in windows of its own; let groups part"),
        (Block(6, 9), X, {"prefix": 1, "sequence": True}, "prefix"),
        (Block(6, 9), X, {"unit": "panes"}, "unknown unit='panes'; known are auto, windows, tokens"),
    ],
)
def test_options_that_do_not_fit_windows_are_refused(block, images, options, words):
    if options.pop("sequence", False):
        block = Block(6, 9, sequence=True)
    with pytest.raises(idlefx.IdleFxError, match=f"(?s){words}"):
        idlefx.convert(Windowed(block), [0], 0.5, example_inputs=images, **options)


def test_a_unit_where_no_attention_is_over_windows_is_refused():
    with pytest.raises(idlefx.PlanError, match="unit='windows' is for attention over windows, which no block has"):
        idlefx.convert(build("vit"), [1], 0.5, unit="windows", example_inputs=torch.randn(2, 3, 48, 48))


def test_the_token_cut_loss_is_refused(idle):
    with pytest.raises(idlefx.InputError, match="that of this model is over windows"):
        idlefx.with_cut_loss(idle)


@pytest.mark.parametrize(
    ("block", "operation", "words"),
    [
        (lambda: Moved(lambda x: x[:, :, :-1]), r"slice\.Tensor", "loses tokens of the image"),
        (lambda: Moved(over_images), r"roll\.default", "makes a window without a token, or one that spans images"),
        (Twice, "scaled_dot_product", "attends over other windows than another attention of the block"),
    ],
)
def test_movement_that_gives_no_windows_is_refused_with_its_line(block, operation, words):
    (found,) = idlefx.inspect(Windowed(block()), X)
    assert says(found.refusal, operation, words, r"window\w*\.py:\d+: "), found.refusal


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches(idle):
    fast = idlefx.compile(idle, backend="eager")
    for batch in (2, 3, 5):
        images = pictures(batch, 6, 9)
        assert torch.equal(fast(images), idle(images))


@pytest.mark.slow
@pytest.mark.parametrize(("sides", "unit"), [((6, 9), "tokens"), ((5, 8), "windows")])
def test_gradients_are_those_of_finite_differences(sides, unit):
    torch.manual_seed(0)
    model, x = Windowed(Block(*sides, 1)).double(), pictures(1, *sides, seed=3).double()
    idle = idlefx.convert(model, [0], 0.5, unit=unit, example_inputs=torch.cat([x, x]))
    weight = idle.get_parameter("blocks.0.qkv.weight")
    idle(x).square().sum().backward()
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            weight += sign * step * direction
            sums.append(idle(x).square().sum())
            weight -= sign * step * direction
    torch.testing.assert_close((sums[0] - sums[1]) / (2 * step), (weight.grad * direction).sum(), rtol=1e-5, atol=1e-6)


def test_other_modules_are_untouched():
    model = Windowed(Block(6, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    idle = idlefx.convert(model, [0], 0.5, example_inputs=X)
    assert before.keys() == idle.state_dict().keys()
    assert isinstance(idle.get_submodule("neck"), nn.Linear)
