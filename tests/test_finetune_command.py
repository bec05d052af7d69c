"""The fine-tuning command: what it prints, writes, continues and refuses."""

import json
import re
import signal
from functools import partial

import pytest

import idlefx
from idlefx.cli.finetune import main
from idlefx.training.metric_log import MetricLog
from tests.models.colours import CLASSES, MODEL, folder, models
from tests.support.messages import says
from tests.support.runs import rows, run_into

TRAIN_IMAGES = 120


def arguments(data, out):
    return [
        "--model", MODEL, "--layers", "1", "--keep", "0.5", "--data", str(data), "--epochs", "2",
        "--lr", "1e-3", "--batch-size", "30", "--workers", "0", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of which one in training and one in validation cannot be read."""
    root = folder(
        tmp_path_factory.mktemp("data") / "colours", train=TRAIN_IMAGES // CLASSES, val=TRAIN_IMAGES // CLASSES
    )
    (root / "train" / "b" / "3.png").write_bytes(b"no picture")
    (root / "validation" / "c" / "1.png").write_bytes((root / "validation" / "c" / "2.png").read_bytes()[:100])
    return root


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    return run_into(tmp_path_factory.mktemp("runs") / "run", partial(arguments, data))


def test_command_prints_accuracy_and_gmacs_of_dense_untuned_and_tuned(command):
    assert command.status == 0
    report = idlefx.report(models()[1])
    for name, gmacs in (("dense", report.dense_gmacs), ("untuned", report.idle_gmacs), ("tuned", report.idle_gmacs)):
        assert says(command.printed, rf"\b{name} +\d+\.\d\d % +{gmacs:.3g}"), command.printed
    assert report.idle_gmacs < report.dense_gmacs


def test_command_leaves_plan_weights_state_and_metrics(command):
    files = {path.name for path in command.directory.iterdir()}
    assert files == {"plan.json", "best.safetensors", "last.safetensors", "training.pt", "metrics.csv", "metrics.png"}
    plan = json.loads((command.directory / "plan.json").read_text())["plan"]
    assert (plan["model"], plan["layers"], plan["keep"]) == (MODEL, [1], 0.5)
    told = rows(command.directory)
    assert [int(row["step"]) for row in told] == list(range(1, 9))
    assert [bool(row["top1"]) for row in told] == [False, False, False, True] * 2
    assert float(told[-1]["lr"]) < float(told[0]["lr"])


def test_unreadable_images_are_named_skipped_and_counted(command):
    assert says(command.printed, r"left out .*train/b/3\.png: cannot identify", r"left out .*validation/c/1\.png: ")
    assert says(command.printed, r"images that could not be read: 2 \(.*b/3\.png, .*c/1\.png\)")


def test_an_interrupt_ends_the_run_after_its_step_and_it_can_be_continued(command, data, tmp_path, monkeypatch, capsys):
    write = MetricLog.write

    def interrupted(self, row):
        write(self, row)
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricLog, "write", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(arguments(data, tmp_path / "run")) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; continue with --resume {tmp_path / 'run'}"
    assert len(rows(tmp_path / "run")) == 3
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert rows(tmp_path / "run") == rows(command.directory)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--keep", "0.7"], ["keep is 0.5 there, 0.7 now"]),
        (["--w-cut", "5", "--seed", "3"], ["w_cut is 20.0 there, 5.0 now", "seed is 0 there, 3 now"]),
    ],
    ids=["plan", "settings"],
)
def test_a_run_is_not_continued_with_another_plan(command, capsys, options, words):
    assert main(["--resume", str(command.directory), *options]) == 2
    told = capsys.readouterr().err
    assert says(told, "^error: resume: .* another model or plan", *words) and len(told.splitlines()) == 1, told


def test_resuming_nothing_is_refused_in_a_line(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert says(told, "^error: resume: there is no run in", "plan.json") and len(told.splitlines()) == 1, told


def test_without_arguments_a_trained_model_is_tuned_on_scenes_that_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("idlefx.training.datasets.GLYPHS_VAL", 96)
    assert main(["--steps", "2", "--batch-size", "16", "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert float(re.search(r"dense +([\d.]+) %", told)[1]) > 60, told
    assert says(told, r"idle, untuned +[\d.]+ %", r"idle, tuned +[\d.]+ %")
    assert len(rows(tmp_path / "run")) == 2
