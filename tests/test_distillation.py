"""Fine-tuning without labels: what is compared how, what comes back, and what is refused."""

from dataclasses import replace

import pytest
import torch

import idlefx
from idlefx.training import checkpoints, run
from idlefx.training.config import Settings
from idlefx.training.distances import DISTANCES, distance_for
from idlefx.training.gain import Gain
from idlefx.training.loop import finetune
from tests.models.colours import CLASSES, vit
from tests.models.encoder import IMAGES, TRAIN, VAL, pair
from tests.models.small import fingerprint
from tests.support.messages import refusal, says

SHORT = Settings(steps=20, lr=3e-4, looks=4)


@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_outputs_come_nearer_to_the_dense_ones_and_the_teacher_stays(idle, capsys):
    dense, student = pair(idle)
    before = fingerprint(dense)
    gain = finetune(dense, student, TRAIN, VAL, SHORT)
    assert isinstance(gain, Gain) and gain.finished and gain.gained and 0 < gain.distance < 0.95
    assert fingerprint(dense) == before and not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    found = idlefx.compare(dense, student, VAL, progress=False).changes["idle"]
    for name in ("feature", "tokens", "map"):
        assert found[name].relative_difference == pytest.approx(gain.tuned[name].relative_difference, rel=1e-4)
        assert found[name].relative_difference < gain.untuned[name].relative_difference
    told = capsys.readouterr().out
    assert says(told, "`feature` by cosine, `tokens` by cosine, `map` by squared", "left out is `highest`: .*whole")
    assert says(str(gain), r"untuned +feature", r"tuned +map", r"24 held-out images, untuned = 1: 0\.\d+ ± 0\.\d+")


def test_no_output_drowns_another():
    """A thousandfold map weighs as much as before: the gradients of a step are the same."""
    rows = []
    for scale in (1.0, 1000.0):
        dense, student = pair(scale=scale)
        rows += finetune(dense, student, TRAIN, VAL, replace(SHORT, steps=1, looks=1)).rows
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)
    assert rows[0]["map"] * 1e6 == pytest.approx(rows[1]["map"], rel=1e-3)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "batches",
    [
        lambda images: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 8),
        lambda images: [{"x": part, "labels": torch.zeros(8)} for part in images.split(8)],
        lambda images: torch.utils.data.TensorDataset(images, torch.zeros(len(images))),
        lambda images: images,
    ],
    ids=["loader of tuples", "dicts", "data set", "tensor"],
)
def test_batches_come_in_any_form(batches):
    dense, student = pair()
    settings = Settings(epochs=1, lr=3e-4)
    gain = finetune(dense, student, batches(IMAGES[:40]), batches(IMAGES[40:]), settings, batch_size=8)
    other = finetune(*pair(), TRAIN, VAL, settings)
    assert [row["loss"] for row in gain.rows] == [row["loss"] for row in other.rows] and len(gain.rows) == 5


def test_a_generator_trains_but_is_not_held_out():
    gain = finetune(*pair(), iter(TRAIN), VAL, replace(SHORT, steps=5))
    assert len(gain.rows) == 5
    assert says(refusal(finetune, *pair(), iter(TRAIN), VAL, SHORT), "no more training images after 5 steps", "has 20")
    assert says(refusal(finetune, *pair(), TRAIN, iter(VAL), SHORT), "generator can be read only once", "DataLoader")
    assert says(refusal(finetune, *pair(), iter(TRAIN), VAL, Settings(epochs=1)), "name steps or a budget")


def test_what_makes_it_worse_is_not_returned(capsys):
    dense, student = pair("follow")
    before = fingerprint(student)
    gain = finetune(dense, student, TRAIN, VAL, replace(SHORT, lr=1.0, warmup=0.0))
    assert gain.finished and not gain.gained and fingerprint(student) == before
    assert says(str(gain), "nothing was gained beyond chance, at best", "the weights are the untuned ones")


def test_it_ends_when_it_no_longer_pays():
    gain = finetune(*pair("follow"), TRAIN, VAL, replace(SHORT, lr=1.0, warmup=0.0, looks=20, patience=3))
    assert gain.finished and gain.gave_up and len(gain.rows) == 3
    assert says(str(gain), "stopped after step 3, as it no longer paid")


def test_where_nothing_idles_there_is_nothing_to_gain():
    dense, student = pair(keep=1.0)
    gain = finetune(dense, student, TRAIN, VAL, SHORT)
    assert gain.finished and not gain.rows
    assert says(str(gain), "the outputs are those of the dense model already")


def test_an_interrupt_in_a_step_keeps_the_best_so_far(tmp_path):
    dense, student = pair()
    seen = iter(range(100))

    def stop():
        if next(seen) == 12:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        finetune(dense, student, TRAIN, VAL, SHORT, directory=tmp_path, stop=stop)
    best = checkpoints.safetensors.torch.load_file(tmp_path / checkpoints.BEST)
    assert all(torch.equal(best[name], value) for name, value in student.state_dict().items())
    found = idlefx.compare(dense, {"untuned": pair()[1], "tuned": student}, VAL, progress=False).changes
    assert found["tuned"]["feature"].cosine > found["untuned"]["feature"].cosine


def test_a_run_that_is_killed_goes_on_from_a_checkpoint_in_its_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKPOINT_SHARE", 1e9)
    settings = replace(SHORT, checkpoint_minutes=0.0)
    made = iter(range(1, 100))

    def killed():
        if next(made) == 4:
            raise SystemExit

    with pytest.raises(SystemExit):
        finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, stop=killed)
    assert checkpoints.load(tmp_path)["training"]["step"] == 3
    second = finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, resume=True)
    assert second.rows[0]["step"] == 4 and str(second) == str(finetune(*pair(), TRAIN, VAL, settings))


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"ema": 0.9, "w_cut": 1.0}, marks=pytest.mark.slow)],
    ids=["plain", "averaged, cut loss"],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(settings, tmp_path):
    settings = replace(SHORT, **settings)
    dense, whole = pair()
    unbroken = finetune(dense, whole, TRAIN, VAL, settings)
    made = iter(range(1, 100))
    first = finetune(*pair(), TRAIN, VAL, settings, directory=tmp_path, stop=lambda: next(made) == 7)
    assert not first.finished
    _, student = pair()
    second = finetune(dense, student, TRAIN, VAL, settings, directory=tmp_path, resume=True)
    assert [row["loss"] for row in first.rows + second.rows] == [row["loss"] for row in unbroken.rows]
    assert str(second) == str(unbroken) and second.looks == unbroken.looks
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_a_budget_becomes_steps():
    gain = finetune(*pair(), TRAIN, VAL, Settings(budget=0.02, lr=1e-4))
    assert gain.finished and len(gain.rows) > 3


def test_a_classifier_without_labels_is_compared_by_its_classes(capsys):
    dense = vit()
    finetune(dense, idlefx.convert(dense, layers=[1], keep=0.5), TRAIN, VAL, replace(SHORT, steps=1))
    assert "`output` by kl" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "which, changed",
    [("norms", lambda name, value: value.ndim <= 1), ("stages", lambda name, value: name.startswith("vit.blocks.1."))],
)
def test_a_part_of_the_parameters_is_trained(which, changed):
    dense, student = pair(schedule="blocks")
    before = {name: value.clone() for name, value in student.named_parameters()}
    gain = finetune(dense, student, TRAIN, VAL, replace(SHORT, parameters=which))
    assert gain.gained
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(changed(name, before[name]) for name in moved)


@pytest.mark.slow
def test_layers_learn_at_rates_that_fall(capsys):
    dense = vit()
    idle = idlefx.convert(dense, layers=[1], keep=0.5)
    assert len(finetune(dense, idle, TRAIN, VAL, replace(SHORT, steps=2, layer_decay=0.7)).rows) == 2
    message = refusal(finetune, *pair(), TRAIN, VAL, replace(SHORT, layer_decay=0.7))
    assert says(message, "settings: layer_decay", "group_matcher"), message


def test_distances_by_hand():
    dense = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    student = torch.tensor([[[4.0, 3.0], [2.0, 0.0]]])
    assert DISTANCES["cosine"](student, dense).tolist() == pytest.approx([(1 - 24 / 25 + 1) / 2])
    assert DISTANCES["squared"](student, dense).tolist() == pytest.approx([(1 + 1 + 4 + 4) / 4])
    p, q = dense.softmax(-1), student.softmax(-1)
    assert DISTANCES["kl"](student, dense).tolist() == pytest.approx([((p * (p / q).log()).sum() / 2).item()])


def test_the_distance_suits_the_shape():
    found = {
        shape: distance_for(shape, logits=False, token_counts={197, 196})
        for shape in [(384,), (197, 384), (100, 256), (100, 4), (4,), (1, 224, 224), ()]
    }
    cosines = {shape for shape, kind in found.items() if kind == "cosine"}
    assert cosines == {(384,), (197, 384)} and set(found.values()) == {"cosine", "squared"}
    assert distance_for((CLASSES,), logits=True, token_counts={}) == "kl"
