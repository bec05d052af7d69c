"""Runs that end early: what is on the disk is whole, and going on is as if nothing had happened."""

import csv
import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch

import idlefx
from idlefx.training import checkpoints
from idlefx.training.config import Settings
from idlefx.training.feature_taps import tap
from idlefx.training.labelled import LOSSES, evaluate
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune
from idlefx.training.metric_log import COLUMNS, MetricLog
from tests.models.colours import CLASSES, PLAIN, SIDE, Colours, batches, models, vit
from tests.support.messages import refusal, says

# Everything random is on: order, noise, dropout, mixup, cutmix; and everything with a state: momentum, averaging.
RANDOM = Settings(epochs=2, lr=1e-3, warmup=0.2, accumulate=2)
STEPS = 12


def run(directory, settings=RANDOM, *, steps=STEPS, resume=False, workers=0):
    """Train, stopping after so many steps; the history and the idling model."""
    dense, idle = models(proj_drop_rate=0.1)
    made = count(1)
    history = finetune(
        dense, idle, *batches(48, 4, workers=workers), settings, directory=directory, resume=resume,
        stop=lambda: next(made) == steps,
    )  # fmt: skip
    return history, idle


def losses(history):
    return [[row[name] for name in (*LOSSES, "lr", "grad_norm")] for row in history.rows]


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """History and model of a run of two epochs of six steps without interruption, and its directory."""
    directory = tmp_path_factory.mktemp("unbroken")
    return *run(directory), directory


def metrics(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return [{**row, "images_per_s": ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize("steps, workers", [(2, 0), (6, 2)], ids=["in an epoch", "after one, with workers"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(unbroken, tmp_path, steps, workers):
    whole, trained, directory = unbroken
    first, _ = run(tmp_path, steps=steps, workers=workers)
    second, resumed = run(tmp_path, resume=True, workers=workers)
    assert not first.finished and second.finished
    assert len(first.rows) == steps and len(second.rows) == STEPS - steps
    assert losses(first) + losses(second) == losses(whole)
    assert same_weights(resumed, trained)
    assert str(second) == str(whole)
    assert metrics(tmp_path) == metrics(directory)


def test_another_seed_is_seen_in_the_losses(unbroken, tmp_path):
    other, trained = run(None, replace(RANDOM, seed=1), steps=2)
    assert losses(other)[0] != losses(unbroken[0])[0]
    assert not same_weights(trained, unbroken[1])


def test_going_on_without_the_state_of_the_optimiser_is_noticed(unbroken, tmp_path):
    run(tmp_path, steps=2)
    state = checkpoints.load(tmp_path)
    state["training"]["optimizer"]["state"] = {}
    torch.save(state, tmp_path / checkpoints.STATE)
    second, _ = run(tmp_path, resume=True)
    assert losses(second) != losses(unbroken[0])[2:]


def test_weights_load_into_the_original_and_into_a_conversion(unbroken):
    history, trained, directory = unbroken
    dense, (_, idle) = vit(proj_drop_rate=0.1), models(proj_drop_rate=0.1)
    for name, top1 in ((checkpoints.BEST, history.best), (checkpoints.LAST, history.tuned)):
        for model in (dense, idle):
            safetensors.torch.load_model(model, directory / name)
        assert same_weights(idle, dense)
        assert evaluate(tap(idle.eval()), ImageLoader(Colours(24, 0.0), 8)) == top1
        with safetensors.safe_open(directory / name, "pt") as file:
            assert float(file.metadata()["top1"]) == top1
    assert same_weights(idle, trained)
    assert same_weights(idlefx.convert(dense, layers=[1], keep=0.5), trained)


def test_plan_is_a_file_for_people(tmp_path):
    dense, idle = models()
    plan = checkpoints.plan_of_run(dense, idle, PLAIN, {"model": "vit"}, {"workers": 2})
    checkpoints.start(tmp_path / "new" / "run", plan)
    told = json.loads((tmp_path / "new" / "run" / checkpoints.PLAN).read_text())
    assert told["plan"]["model"] == "vit" and told["plan"]["classes"] == CLASSES
    assert told["plan"]["image_size"] == [3, SIDE, SIDE]
    assert [block["kept"] for block in told["plan"]["blocks"]] == [8, 8]
    assert told["plan"]["w_cut"] == PLAIN.w_cut and told["options"] == {"workers": 2}
    assert set(told["versions"]) == {"idlefx", "torch", "timm"}


def plan_of_run(**options):
    dense, _ = models()
    idle = idlefx.convert(dense, **{"layers": [1], "keep": 0.5, **options})
    return checkpoints.plan_of_run(dense, idle, PLAIN, {"batch_size": 8}, {})


def test_a_run_of_another_plan_is_refused(tmp_path):
    checkpoints.start(tmp_path, plan_of_run())
    checkpoints.start(tmp_path, plan_of_run(), resume=True)
    for options, words in (
        ({"keep": 0.7}, "keep is 0.5 there, 0.7 now"),
        ({"prefix": [0]}, r"prefix is null there, \[0\]"),
    ):
        message = refusal(checkpoints.start, tmp_path, plan_of_run(**options), resume=True)
        assert says(message, "another model or plan", words), message


def test_a_run_of_other_weights_is_refused(tmp_path):
    checkpoints.start(tmp_path, plan_of_run())
    dense, idle = models()
    with torch.no_grad():
        dense.head.bias[0] += 1e-3
    plan = checkpoints.plan_of_run(dense, idle, PLAIN, {"batch_size": 8}, {})
    message = refusal(checkpoints.start, tmp_path, plan, resume=True)
    assert says(message, "another model or plan", "dense_weights"), message


def test_a_second_run_never_overwrites_the_first(tmp_path):
    checkpoints.start(tmp_path, plan_of_run())
    assert says(refusal(checkpoints.start, tmp_path, plan_of_run()), "holds a run", "--resume", "--out")


def test_resuming_nothing_is_refused(tmp_path):
    assert says(refusal(checkpoints.read_plan, tmp_path / "none"), "no run in", "plan.json")
    message = refusal(checkpoints.load, tmp_path)
    assert says(message, "before its first checkpoint", "start anew"), message


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / checkpoints.STATE).write_bytes(b"not a checkpoint")
    assert says(refusal(checkpoints.load, tmp_path), "cannot read", checkpoints.STATE)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"training": Evil()}, tmp_path / checkpoints.STATE)
    assert says(refusal(checkpoints.load, tmp_path), "cannot read")
    assert not (tmp_path / "touched").exists()


@contextmanager
def largest_file(size):
    """As on a full disk: no file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save(directory, step, size):
    module = torch.nn.Linear(size, 1)
    checkpoints.save(directory, {"step": step, "weights": module.state_dict()}, module, {"step": step}, best=True)


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path):
    save(tmp_path, step=1, size=100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with largest_file(20_000):
        message = refusal(save, tmp_path, step=2, size=10_000)
    assert says(message, "cannot write", "last whole checkpoint", f"--resume {tmp_path}"), message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert checkpoints.load(tmp_path)["step"] == 1


def test_metrics_of_a_full_disk_are_mended(tmp_path):
    options = {"steps": 3, "images": 8, "show": False}
    row = dict.fromkeys(COLUMNS, 1.0)
    with MetricLog(tmp_path, done=0, **options) as told:
        told.write(row)
        with largest_file(8):
            message = refusal(told.write, row)
    assert says(message, "cannot write", "metrics.csv"), message
    (tmp_path / "metrics.csv").open("a").write("2,0,0.0")
    with MetricLog(tmp_path, done=1, **options) as told:
        told.write(row)
    assert len(metrics(tmp_path)) == 2
