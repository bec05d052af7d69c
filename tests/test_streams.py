"""The stream after the last block as one more output that is drawn to the dense model's, token by token."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import idlefx
from idlefx.finetune import Taught
from idlefx.options import PlanOptions
from idlefx.training.config import Settings
from idlefx.training.loop import finetune
from idlefx.variants import with_keep, with_stream
from tests.models import grids, small
from tests.models.colours import vit
from tests.models.encoder import IMAGES, TRAIN, VAL, pair
from tests.support.messages import refusal, says

STREAMED = Settings(steps=20, lr=3e-4, looks=4, stream=True)


def streams_of(model, images):
    """What a hook sees leave the last block of a model that is no converted one."""
    seen = []
    handle = model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_what_leaves_the_last_block_is_returned_too(idle):
    dense = vit(num_classes=0).eval()
    student = idlefx.convert(dense, [1], 0.4, idle=idle)
    traced = with_stream(idlefx.convert(dense, plan=PlanOptions([1], 1.0), copy=False))
    output, stream = traced(IMAGES[:4])
    assert output.equal(dense(IMAGES[:4])) and stream.equal(streams_of(dense, IMAGES[:4]))
    output, ours = with_stream(student)(IMAGES[:4])
    assert output.equal(student(IMAGES[:4])) and ours.shape == stream.shape and not ours.equal(stream)
    assert [*map(id, with_stream(student).parameters())] == [*map(id, student.parameters())]


@pytest.mark.parametrize("kind", ["last", pytest.param("first", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")
def test_on_a_grid_features_come_last(kind):
    model, images = grids.build(kind, 2), grids.pictures(2)
    traced = with_stream(idlefx.convert(model, [1], 1.0, example_inputs=images))
    stream = streams_of(model, images)
    assert traced(images)[1].equal(stream if kind == "last" else stream.permute(0, 2, 3, 1))


@pytest.mark.slow
def test_it_goes_together_with_a_cut_loss_and_other_keep_ratios():
    _, student = pair()
    _, stream = with_stream(student)(IMAGES[:4])
    (output, same), cut = idlefx.with_cut_loss(with_stream(student))(IMAGES[:4])
    assert same.equal(stream) and cut.equal(idlefx.with_cut_loss(student)(IMAGES[:4])[1])
    other, _ = with_keep(with_stream(student), 0.7)(IMAGES[:4])
    assert other["map"].equal(pair(keep=0.7)[1](IMAGES[:4])["map"]) and not other["map"].equal(output["map"])


@pytest.mark.parametrize("idle", ["rest", pytest.param("follow", marks=pytest.mark.slow)])
def test_it_is_balanced_and_told_like_any_output(idle, capsys):
    dense, student = pair(idle)
    gain = finetune(dense, student, TRAIN, VAL, STREAMED)
    told = capsys.readouterr().out
    assert "`map` by squared, `stream` (after the last block, token by token) by cosine" in told
    assert gain.gained and set(gain.tuned) - set(pair(idle)[1](IMAGES[:2])) == {"stream"}
    row = gain.rows[0]
    balanced = sum(row[name] / gain.distances[name] for name in ("feature", "tokens", "map", "stream")) / 4
    assert row["loss"] == pytest.approx(balanced, rel=1e-4)
    assert {"stream", "held-out stream"} <= gain.rows[-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "w_cut": 1.0}], ids=["plain", "averaged, cut loss"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(changes, tmp_path):
    settings = replace(STREAMED, **changes)
    unbroken = finetune(*pair(), TRAIN, VAL, settings)
    made = iter(range(1, 100))
    first = finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, stop=lambda: next(made) == 7)
    second = finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, resume=True)
    assert [row["loss"] for row in first.rows + second.rows] == [row["loss"] for row in unbroken.rows]
    assert str(second) == str(unbroken) and second.looks == unbroken.looks


@pytest.mark.slow
def test_in_a_loop_of_ones_own():
    dense, student = pair()
    taught = Taught(dense, student, IMAGES[:32], stream=True).train()
    found = taught(IMAGES[:32])
    assert found["loss"].item() == pytest.approx(1.0, rel=1e-2) and found["output"].keys() == dense(IMAGES[:2]).keys()
    assert [*taught.state_dict()] == [f"idle.{name}" for name in student.state_dict()]
    gain = finetune(*pair(), [IMAGES[:32]], [IMAGES[:32]], replace(STREAMED, steps=1))
    assert gain.rows[0]["loss"] == pytest.approx(found["loss"].item(), rel=1e-3)
    found["loss"].backward()
    assert student.get_parameter("vit.blocks.1.mlp.fc1.weight").grad.abs().sum() > 0


@pytest.mark.slow
def test_where_it_cannot_be_had_is_said():
    model = small.build("vit")
    model.blocks[-1] = small.Mixing(small.SMALL["embed_dim"])
    student, images = idlefx.convert(model.eval(), [0], 0.5, schedule="blocks"), small.images(model, 4)
    message = refusal(finetune, model, student, [images], [images], STREAMED)
    assert says(message, "train: the stream after the last block", "it is not known where its tokens stand"), message


@pytest.mark.slow
def test_an_output_of_that_name_is_said():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit(num_classes=0)

        def forward(self, x):
            return {"stream": self.vit.forward_features(x)}

    dense = Named().eval()
    student = idlefx.convert(deepcopy(dense), [1], 0.5, example_inputs=IMAGES[:2])
    message = refusal(finetune, dense, student, TRAIN, VAL, STREAMED)
    assert says(message, "settings: stream", "the model returns a `stream` of its own"), message
