"""Fine-tuning: what it trains, what it leaves alone, what it tells, and what it refuses."""

import csv
import json
import os
import re
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import idlefx
from idlefx.cli.finetune import main
from idlefx.training.config import Settings
from idlefx.training.datasets import Source, open_loaders
from idlefx.training.distributed import World, processes
from idlefx.training.feature_taps import class_count, has_features, tap, token_parameters
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import evaluate, finetune
from idlefx.training.metric_log import MetricLog
from idlefx.training.trainer import LOSSES
from tests.models.colours import CLASSES, MODEL, PLAIN, SIDE, Colours, batches, folder, models
from tests.models.small import build, fingerprint, images
from tests.support.messages import says

ALONE = Settings(epochs=5, lr=3e-3, mixup=0.0, cutmix=0.0, smoothing=0.0, w_cut=0.0, w_kd=0.0, w_feat=0.0)
TRAIN_IMAGES = 120


def refusal(function, *arguments, **options):
    with pytest.raises(idlefx.IdleFxError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# The command


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
    """A run from the shell: its directory, exit status and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    with redirect_stdout(StringIO()) as printed:
        status = main(arguments(data, directory))
    return SimpleNamespace(directory=directory, status=status, printed=printed.getvalue())


def rows(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return [{**row, "images_per_s": ""} for row in csv.DictReader(file)]


def test_command_prints_accuracy_and_gmacs_of_dense_untuned_and_tuned(command):
    assert command.status == 0
    report = idlefx.report(models()[1])
    for name, gmacs in (("dense", report.dense_gmacs), ("untuned", report.idle_gmacs), ("tuned", report.idle_gmacs)):
        assert says(command.printed, rf"\b{name} +\d+\.\d\d % +{gmacs:.3g}"), command.printed
    assert report.idle_gmacs < report.dense_gmacs


def test_command_leaves_plan_weights_state_and_metrics(command):
    files = {path.name for path in command.directory.iterdir()}
    assert files == {"plan.json", "best.safetensors", "last.safetensors", "training.pt", "metrics.csv"}
    plan = json.loads((command.directory / "plan.json").read_text())["plan"]
    assert (plan["model"], plan["layers"], plan["keep"]) == (MODEL, [1], [0.5])
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
        (["--keep", "0.7"], [r"keep is \[0.5\] there, \[0.7\] now"]),
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


# What is trained


def test_training_wins_accuracy_and_leaves_the_teacher_alone():
    dense, idle = models()
    before = fingerprint(dense)
    history = finetune(dense, idle, *batches(96), ALONE)
    assert history.dense < 50 < 90 < history.tuned <= history.best
    assert history.tuned == evaluate(tap(idle), ImageLoader(Colours(24, 0.0), 8))
    assert fingerprint(dense) == before
    assert len(history.rows) == 5 * 12 and history.finished
    assert not idle.training and all(parameter.requires_grad for parameter in idle.parameters())


@pytest.mark.parametrize("train_all", [False, True])
def test_tokens_and_positions_are_frozen_unless_asked_for(train_all):
    dense, idle = models()
    finetune(dense, idle, *batches(16), replace(ALONE, epochs=1, train_all=train_all))
    before = dense.state_dict()
    same = {name for name, value in idle.state_dict().items() if torch.equal(value, before[name])}
    assert same == (set() if train_all else {"cls_token", "pos_embed"})


@pytest.mark.parametrize("name", ["distilled", "registers_gap", "siglip"])
def test_tokens_and_positions_are_found_in_every_family(name):
    model = build(name)
    idle = idlefx.convert(model, layers=[1], keep=0.5)
    wanted = {n for n, _ in model.named_parameters() if n in ("cls_token", "dist_token", "reg_token", "pos_embed")}
    assert token_parameters(idle) == wanted and wanted
    tapped, x = tap(idle), images(model, 2)
    logits, features = tapped(x)
    assert torch.equal(logits, idle(x)) and class_count(tapped) == 10
    assert features.shape == (2, (2 if name == "distilled" else 1) * model.embed_dim)
    heads = [model.head, model.head_dist] if name == "distilled" else [model.head]
    votes = [head(part) for head, part in zip(heads, features.chunk(len(heads), dim=1), strict=True)]
    assert torch.allclose(sum(votes) / len(votes), logits, atol=1e-5)


class Unusual(nn.Module):
    """Names that say nothing, and a head that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        vit = models()[0]
        self.alpha, self.beta = nn.Parameter(torch.randn(1, 24)), nn.Parameter(torch.randn(17, 24))
        self.gamma, self.delta, self.epsilon = vit.patch_embed, vit.blocks, nn.Parameter(torch.randn(24))
        self.zeta = nn.Parameter(torch.randn(CLASSES, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gamma(x) * self.epsilon
        x = torch.cat([self.alpha.expand(len(x), 1, -1), x], dim=1) + self.beta
        return -torch.cdist(self.delta(x)[:, 0], self.zeta)


def test_names_do_not_matter_and_without_a_linear_classifier_features_are_not_compared(capsys):
    dense = Unusual().eval()
    example = torch.randn(2, 3, SIDE, SIDE)
    idle = idlefx.convert(dense, layers=[1], keep=0.5, example_inputs=example)
    assert token_parameters(idle) == {"alpha", "beta"}
    assert not has_features(tap(idle))
    history = finetune(dense, idle, *batches(16), replace(PLAIN, epochs=1), example_inputs=example)
    assert says(capsys.readouterr().out, "no linear classifier was found, so w_feat is off")
    assert all(row["feat"] == 0 < row["cut"] for row in history.rows)


def test_averaged_weights_are_kept_and_the_last_ones_continue(tmp_path):
    _, idle = trained = models()
    finetune(*trained, *batches(16), replace(ALONE, epochs=2), directory=tmp_path)
    state = torch.load(tmp_path / "training.pt", weights_only=True)["training"]
    assert torch.equal(idle.head.weight, state["averaged"]["head.weight"])
    assert not torch.equal(idle.head.weight, state["model"]["head.weight"])


# Losses


def test_loss_is_the_weighted_sum_of_its_parts():
    settings = Settings(steps=3, lr=1e-2, w_cut=3.0, w_kd=5.0, w_feat=7.0, cut_warmup=1.0)
    history = finetune(*models(), *batches(24), settings)
    for step, row in enumerate(history.rows, start=1):
        assert min(row[name] for name in LOSSES) > 0
        parts = row["task"] + 3 * step / 3 * row["cut"] + 5 * row["kd"] + 7 * row["feat"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_cut_weight_rises_over_its_share_of_the_run():
    weights = [Settings(w_cut=20.0, cut_warmup=0.5).cut_weight(step, 8) for step in range(8)]
    assert weights == [5, 10, 15, 20, 20, 20, 20, 20]
    assert Settings(w_cut=20.0).cut_weight(0, 8) == 20


def test_learning_rate_follows_the_size_of_a_step():
    assert Settings().rate(1024) == pytest.approx(2e-5)
    assert Settings(lr=1e-3).rate(1024) == 1e-3


def test_half_precision_is_used_where_it_is_asked_for():
    settings = Settings(steps=2, lr=1e-3)
    full, half = (finetune(*models(), *batches(16), replace(settings, amp=amp)) for amp in (False, True))
    assert full.rows[0]["loss"] != half.rows[0]["loss"] == pytest.approx(full.rows[0]["loss"], rel=0.02)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses():
    eager, compiled = (finetune(*models(), *batches(16), replace(PLAIN, epochs=1, compile=c)) for c in (False, True))
    for row, other in zip(eager.rows, compiled.rows, strict=True):
        assert [other[name] for name in LOSSES] == pytest.approx([row[name] for name in LOSSES], rel=1e-3)


class Broken(Colours):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image * torch.nan, label


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    stop = iter([False, True])
    finetune(*models(), *batches(16), replace(ALONE, epochs=3), directory=tmp_path, stop=lambda: next(stop))
    before = (tmp_path / "training.pt").read_bytes()
    _, idle = broken = models()
    train, val = ImageLoader(Broken(16), 8, training=True), ImageLoader(Colours(8), 8)
    message = refusal(finetune, *broken, train, val, replace(ALONE, epochs=3), directory=tmp_path, resume=True)
    assert says(message, r"step 3 gave loss nan, task nan, grad_norm nan", "last checkpoint"), message
    assert (tmp_path / "training.pt").read_bytes() == before
    assert all(torch.isfinite(parameter).all() and parameter.requires_grad for parameter in idle.parameters())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"accumulate": 3}, ["accumulate is 3", "2 batches"]),
        ({"mixup": 0.5}, ["mixup", "batch has 5", "even"]),
    ],
    ids=["accumulate", "odd batch"],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings, words):
    message = refusal(finetune, *models(), *batches(10, 5), replace(ALONE, **settings))
    assert says(message, *words), message


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"ema": 1.5}, {"lr": -1.0}, {"w_cut": float("nan")}], ids=str)
def test_settings_out_of_range_are_refused(setting):
    assert says(refusal(Settings, **setting), f"settings: {next(iter(setting))} is", "expected")


# Data


def seen(part, *place):
    return [(images.clone(), labels.tolist()) for images, labels in part.epoch(*place)]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) and x == y for (a, x), (b, y) in zip(some, others, strict=True)
    )


def test_batches_follow_from_seed_epoch_and_place_alone():
    train, _ = batches(40)
    first = seen(train, 3)
    torch.randn(5)
    assert same(first, seen(train, 3))
    assert same(first, seen(batches(40, workers=2)[0], 3))
    assert same(first[2:], seen(train, 3, 2))
    assert not same(first, seen(train, 4))
    assert not same(first, seen(batches(40, seed=1)[0], 3))


class Stream(IterableDataset):
    """Pictures in an order that follows from the epoch, shared among workers, as timm's readers do it."""

    def __init__(self, size: int = 40) -> None:
        self.images, self.epoch = Colours(size), torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, number: int) -> None:
        self.epoch.fill_(number)

    def set_loader_cfg(self, num_workers: int) -> None:
        self.workers = num_workers

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(int(self.epoch)))
        yield from (self.images[int(at)] for at in order[worker.id :: worker.num_workers])


def test_streams_follow_from_seed_epoch_and_place_too():
    train = ImageLoader(Stream(), 8, training=True, workers=2)
    first = seen(train, 1)
    assert len(train) == 5 and len(first) == 4  # each of two workers has 20 images
    assert same(first[1:], seen(train, 1, 1)) and same(
        first, seen(ImageLoader(Stream(), 8, training=True, workers=2), 1)
    )
    assert not same(first, seen(train, 2))


def test_labels_that_the_head_does_not_know_are_refused():
    part = ImageLoader(Colours(8), 8, classes=3)
    assert says(refusal(lambda: list(part.epoch())), "class 3", "head has 3 classes")


def test_fewer_images_than_a_step_needs_are_refused():
    message = refusal(batches, 6, 4, world=World(1, 2))
    assert says(message, "6 training images are fewer than the 8", "--batch-size"), message


def open_folder(path, name=None, **source):
    return open_loaders(Source(str(name or path), augment="none", **source), models()[1], 4)


def test_folder_is_opened_with_the_classes_of_the_training_images(tmp_path):
    folder(tmp_path)
    for file in (tmp_path / "validation" / "a").iterdir():
        file.unlink()
    train, val = open_folder(tmp_path)
    assert (len(train.dataset), len(val.dataset)) == (48, 12)
    assert sorted(label for _, labels in val.epoch() for label in labels.tolist()) == [1] * 4 + [2] * 4 + [3] * 4
    picture, label = val.dataset[0]
    assert picture.shape == (3, SIDE, SIDE) and label == 1 and picture.argmax(0).float().mean() > 0.9


@pytest.mark.parametrize(
    "classes, words",
    [
        ("", ["cannot open split train", "Found 0 images"]),
        ("a", ["one class only"]),
        ("abc", ["has 3 classes", "head has 4"]),
        ("abcde", ["has 5 classes", "head has 4"]),
    ],
)
def test_data_of_other_classes_than_the_model_is_refused(tmp_path, classes, words):
    folder(tmp_path, classes)
    for split in ("train", "validation"):
        (tmp_path / split).mkdir(exist_ok=True)
    message = refusal(open_folder, tmp_path)
    assert says(message, "^data: ", *words), message


def test_data_that_is_not_there_is_refused(tmp_path):
    assert says(refusal(open_folder, tmp_path / "none"), "there is no .*none", "hfds/")
    assert says(refusal(open_folder, tmp_path, "hfds/no-such/data"), "hfds/no-such/data", "pip install|cannot open")
    assert says(refusal(open_folder, tmp_path, "torch/no-such"), "cannot open split train of torch/no-such")


def test_data_without_validation_images_is_refused(tmp_path):
    folder(tmp_path / "train", "abcd")
    message = refusal(open_folder, tmp_path / "train" / "train")
    assert says(message, "must hold the folders train and validation", "--val-split"), message


def test_validation_images_of_unknown_classes_are_refused(tmp_path):
    folder(tmp_path)
    (tmp_path / "validation" / "d").rename(tmp_path / "validation" / "z")
    assert says(refusal(open_folder, tmp_path), "classes without training images: z")


@pytest.mark.parametrize("training", [True, False])
def test_too_many_unreadable_images_stop_the_run(tmp_path, training, capsys):
    folder(tmp_path)
    bad = tmp_path / ("train" if training else "validation") / "c" / "0.png"
    bad.write_text("no picture")
    part = open_folder(tmp_path)[not training]
    message = refusal(lambda: [list(part.epoch(number)) for number in range(9)])
    assert says(message, "1 of (48|16) images cannot be read, more than 1%", "c/0.png"), message
    assert says(capsys.readouterr().out, "left out .*c/0.png: cannot identify image file")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setitem(os.environ, name, value)
    message = refusal(processes().__enter__)
    assert says(message, "4 processes", "2 GPUs", "--nproc-per-node 2", "--device cpu"), message


def test_tensorboard_is_asked_for_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refusal(MetricLog, tmp_path, done=0, steps=1, images=1, show=False, tensorboard=True)
    assert says(message, "pip install tensorboard")


def test_tensorboard_is_told_every_loss(tmp_path):
    pytest.importorskip("tensorboard")
    finetune(*models(), *batches(16), replace(ALONE, epochs=1), directory=tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {*LOSSES, "lr", "top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
