"""Keep ratios that fall to those of the plan over the first part of a run."""

from dataclasses import replace

import pytest

import idlefx
from idlefx.training.config import Settings
from idlefx.training.loop import finetune
from idlefx.training.lowering import LEVELS, Lowering
from idlefx.variants import with_keep
from tests.models.colours import vit
from tests.models.encoder import IMAGES, TRAIN, VAL, pair
from tests.support.messages import refusal, says

SHORT = Settings(steps=20, lr=3e-4, looks=4)
LOWERED = replace(SHORT, keep_from=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_a_model_with_another_keep_is_what_convert_makes_and_shares_the_parameters(idle):
    dense, student = pair(idle)
    other = with_keep(student, 0.8)
    assert other(IMAGES[:4])["feature"].equal(pair(idle, keep=0.8)[1](IMAGES[:4])["feature"])
    assert with_keep(other, 1.0)(IMAGES[:4])["feature"].equal(dense(IMAGES[:4])["feature"])
    assert [*map(id, other.parameters())] == [*map(id, student.parameters())]
    assert other.conversion.options.keep == 0.8 and student.conversion.options.keep == 0.4


@pytest.mark.slow
def test_a_mode_has_its_own_graph():
    idle = idlefx.convert(vit(drop_path_rate=0.5), [1], 0.4)
    other = with_keep(idle, 0.8)
    assert {form.plan[0].kept for form in (other.conversion.evaluation, other.conversion.training)} == {12}
    assert other.conversion.training is not other.conversion.evaluation and idle.plan[0].kept == 6


@pytest.mark.slow
def test_ratios_fall_in_equal_steps():
    lowering = Lowering(pair()[1], 0.9, lambda model: model)
    assert lowering.ratios == pytest.approx((0.8, 0.7, 0.6, 0.5))
    kept = [student and student.plan[0].kept for student in (lowering.student(step, 24) for step in range(10))]
    assert kept == [12, 12, 11, 11, 9, 9, 8, 8, None, None]
    idle = idlefx.convert(vit(), [0, 1], [0.8, 0.4])
    assert Lowering(idle, 0.7, lambda model: model).ratios[-1] == pytest.approx((0.8, 0.46))


@pytest.mark.slow
def test_it_is_told_and_what_is_returned_is_the_model_of_the_plan(capsys):
    dense, student = pair()
    gain = finetune(dense, student, TRAIN, VAL, LOWERED)
    assert says(capsys.readouterr().out, r"first 33% of the run keep ratios fall .*: 0\.88; 0\.76; 0\.64; 0\.52")
    first = gain.rows[0]["loss"]
    assert 0 < first < 0.5 * finetune(*pair(), TRAIN, VAL, SHORT).rows[0]["loss"], "few tokens idle in the first step"
    assert gain.gained and len({row["loss"] for row in gain.rows}) == 20 and student.plan[0].kept == 6
    found = idlefx.compare(dense, student, VAL, progress=False).changes["idle"]["map"]
    assert found.relative_difference == pytest.approx(gain.tuned["map"].relative_difference, rel=1e-4)


def test_a_plan_that_keeps_as_many_is_refused():
    message = refusal(finetune, *pair(), TRAIN, VAL, replace(SHORT, keep_from=0.4))
    assert says(message, "settings: keep_from is 0.4, but the plan keeps 0.4", "a higher ratio"), message


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [3, 7, 12])
@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "w_cut": 1.0, "stream": True}], ids=["plain", "averaged, cut loss, stream"]
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(changes, stopped_at, tmp_path):
    settings = replace(LOWERED, **changes)
    _, whole = untuned = pair()
    unbroken = finetune(*untuned, TRAIN, VAL, settings)
    made = iter(range(1, 100))
    first = finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, stop=lambda: next(made) == stopped_at)
    dense, student = pair()
    second = finetune(dense, student, TRAIN, VAL, settings, directory=tmp_path, resume=True)
    assert len(first.rows) == stopped_at > LEVELS - 2
    assert [row["loss"] for row in first.rows + second.rows] == [row["loss"] for row in unbroken.rows]
    assert str(second) == str(unbroken) and second.looks == unbroken.looks
    assert all(value.equal(student.state_dict()[name]) for name, value in whole.state_dict().items())
