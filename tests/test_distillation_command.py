"""The fine-tuning command on pictures without labels: what it prints, writes and continues."""

import json
import signal
from functools import partial

import pytest
import safetensors.torch
from PIL import Image

import idlefx
from idlefx.cli.finetune import main
from idlefx.cli.finetune_options import parse
from idlefx.training.metric_log import MetricLog
from tests.models.colours import picture, vit
from tests.support.messages import says
from tests.support.runs import rows, run_into

MODEL = f"{__name__}:encoder"


def encoder():
    return vit(num_classes=0)


def arguments(data, out, *more):
    return [
        "--model", MODEL, "--layers", "1", "--keep", "0.4", "--data", str(data), "--steps", "8", "--lr", "1e-3",
        "--batch-size", "8", "--workers", "0", "--looks", "4", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(60):
        picture(number, number).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    return run_into(tmp_path_factory.mktemp("runs") / "run", partial(arguments, data))


def test_it_says_how_the_data_is_read_what_is_compared_and_what_was_gained(command):
    assert command.status == 0
    assert says(
        command.printed,
        "data: 54 pictures to train on, 6 held out", "`output` by cosine", r"untuned +output", "GMACs: dense",
        r"distance to the dense model on 6 held-out images, untuned = 1: ", f"are in {command.directory}",
    ), command.printed  # fmt: skip


def test_it_leaves_weights_metrics_for_each_output_and_a_plot(command):
    told = rows(command.directory)
    assert list(told[0])[3:5] == ["loss", "output"]
    assert list(told[0])[-3:] == ["distance", "distance_error", "held-out output"]
    assert [bool(row["distance"]) for row in told] == [False, True] * 4
    assert Image.open(command.directory / "metrics.png").width > 500
    plan = json.loads((command.directory / "plan.json").read_text())["plan"]
    assert (plan["augment"], plan["weight_decay"], plan["classes"]) == ("crop", 0.0, None)
    model = encoder()
    safetensors.torch.load_model(model, command.directory / "best.safetensors")
    idlefx.convert(model, layers=[1], keep=0.4)


def test_nothing_gained_is_a_success(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "run", "--lr", "10", "--warmup", "0", "--patience", "1")) == 0
    assert says(capsys.readouterr().out, "nothing was gained beyond chance", "stopped after step 2")
    kept = safetensors.torch.load_file(tmp_path / "run" / "best.safetensors")
    assert all(value.equal(kept[name]) for name, value in encoder().state_dict().items())


def test_where_nothing_idles_it_says_so(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "run", "--keep", "1")) == 0
    assert says(capsys.readouterr().out, "the outputs are those of the dense model already")
    assert (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.slow
def test_an_interrupt_tells_what_there_is_and_can_be_continued(command, data, tmp_path, monkeypatch, capsys):
    write = MetricLog.write

    def interrupted(self, row):
        write(self, row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricLog, "write", interrupted)
    assert main(arguments(data, tmp_path / "run")) == 130
    told = capsys.readouterr()
    assert says(told.err, f"interrupted; continue with --resume {tmp_path / 'run'}")
    assert says(told.out, "6 held-out images, untuned = 1: ")
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert rows(tmp_path / "run") == rows(command.directory)


def test_distances_and_weights_are_named_in_the_shell(data, tmp_path, capsys):
    words = arguments(data, tmp_path, "--distance", "output=squared", "--weight", "a=2", "b=3", "--weight", "c=1")
    options = parse(words)
    assert options.distance == {"output": "squared"} and options.weight == {"a": 2.0, "b": 3.0, "c": 1.0}
    assert main(words) == 2
    assert says(capsys.readouterr().err, "error: settings: a is no output that can be tuned; such are: output")
    with pytest.raises(SystemExit):
        parse([*words, "--weight", "much"])
    assert says(capsys.readouterr().err, "'much' is not of the form NAME=VALUE")
