"""Two processes train what one process trains on the joined batch."""

import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

import idlefx
from idlefx.cli.finetune import main
from idlefx.pipeline import spell
from idlefx.training.distributed import World, processes
from idlefx.training.feature_taps import tap
from idlefx.training.history import History
from idlefx.training.labelled import Labelled, evaluate
from idlefx.training.loader import ImageLoader
from idlefx.training.trainer import Trainer
from tests.models.colours import CLASSES, MODEL, PLAIN, Colours, folder, vit

PROCESSES, IMAGES, TO_LOOK_AT = 2, 8, 25


def training(world, accumulate):
    """A student and a teacher in double precision."""
    dense = vit().double()
    idle = idlefx.convert(dense, layers=[1], keep=0.5)
    with torch.no_grad():
        for parameter in idle.parameters():
            parameter.add_(0.01)  # so that there is something to learn from the teacher
    student, teacher = (
        tap(idlefx.with_cut_loss(idle).train()),
        tap(spell(idlefx.capture.export.capture(dense).eval_graph)),
    )
    settings = idlefx.training.config.Settings(**{**vars(PLAIN), "accumulate": accumulate, "clip": 0.0, "w_cut": 20.0})
    settings = settings.settled(labelled=True, idle="rest")
    batch_size = IMAGES // (world.size * accumulate)
    val = ImageLoader(Colours(IMAGES), batch_size, world=world)
    objective = Labelled(student, teacher, settings, val, History.of(idle), batch_size)
    return Trainer(idle.eval(), objective, settings, steps=1, batch_size=batch_size, world=world)


def gradients(world, accumulate, images=IMAGES):
    """Losses and gradients of one step on the same images, however many share them."""
    found = training(world, accumulate)
    pixels, labels = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(IMAGES)
    pixels, labels = pixels.double()[:images], labels[:images] % CLASSES
    shares = [(x[world.rank :: world.size], y[world.rank :: world.size]) for x, y in
              zip(pixels.chunk(accumulate), labels.chunk(accumulate), strict=True)]  # fmt: skip
    row = found.update(shares)
    return row, {name: p.grad for name, p in found.idle.named_parameters() if p.grad is not None}


def accuracy(world):
    images = ImageLoader(Colours(TO_LOOK_AT), 4, world=world)
    return evaluate(vit(), images), sum(len(labels) for _, labels in images.epoch())


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def command(directory):
    """Arguments of a short run."""
    return [
        "--model", MODEL, "--layers", "1", "--keep", "0.5", "--data", str(directory / "data"), "--epochs", "1",
        "--batch-size", "8", "--workers", "0", "--w-cut", "0", "--device", "cpu", "--out", str(directory / "run"),
    ]  # fmt: skip


def child(rank, ports, directory):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_PORT": str(ports[0])}
    with processes("cpu") as world:
        found = {"gradients": gradients(world, accumulate=2), "accuracy": accuracy(world), "any": world.any(rank == 1)}
        part = ImageLoader(Colours(100), 4, world=world)
        part.unreadable[rank] = "damaged"
        try:
            part.agree()
        except idlefx.IdleFxError as refusal:
            found["refusal"] = str(refusal)
    os.environ["MASTER_PORT"] = str(ports[1])
    with redirect_stdout(StringIO()) as printed:
        found["status"] = main(command(directory))
    torch.save({**found, "printed": printed.getvalue()}, directory / f"{rank}.pt")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the data lies and a run goes."""
    found = tmp_path_factory.mktemp("pair")
    folder(found / "data")
    return found


@pytest.fixture(scope="module")
def pair(directory):
    """What each of two processes found."""
    torch.multiprocessing.spawn(child, ([free_port(), free_port()], directory), nprocs=PROCESSES)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone():
    """Losses and gradients of one process with the joined batch."""
    return gradients(World(), accumulate=1)


def close(some, others):
    return some.keys() == others.keys() and all(torch.allclose(some[n], others[n], 1e-9, 1e-12) for n in some)


@pytest.mark.slow
def test_gradients_are_those_of_one_process_with_the_joined_batch(pair, alone):
    row, joined = alone
    assert len(joined) > 30 and all(float(grad.abs().max()) > 0 for grad in joined.values())
    for found in pair:
        other, grads = found["gradients"]
        assert close(grads, joined)
        assert other == pytest.approx(row, rel=1e-5)


def test_gradients_of_half_the_batch_are_others(alone):
    _, joined = alone
    _, half = gradients(World(), accumulate=1, images=IMAGES // 2)
    assert joined.keys() == half.keys() and not close(joined, half)


@pytest.mark.slow
def test_accuracy_is_that_of_one_process_though_the_images_do_not_divide(pair):
    alone, seen = accuracy(World())
    assert seen == TO_LOOK_AT
    assert [found["accuracy"][0] for found in pair] == [alone, alone]
    assert sorted(found["accuracy"][1] for found in pair) == [12, 13]


def test_what_one_process_knows_all_are_told(pair):
    assert all(found["any"] for found in pair)
    assert all("2 of 100 images cannot be read" in found["refusal"] for found in pair)


def test_training_images_are_shared_out_and_change_places_from_epoch_to_epoch():
    def seen(rank, epoch):
        part = ImageLoader(Colours(24, noise=0.0), 4, training=True, world=World(rank, PROCESSES))
        return [image.numpy().tobytes() for images, _ in part.epoch(epoch) for image in images]

    shares = [seen(rank, epoch=0) for rank in range(PROCESSES)]
    assert len(shares[0]) == len(shares[1]) == 12
    assert len({*shares[0], *shares[1]}) == 24
    assert shares[0] != seen(0, epoch=1)


def check_run(directory, printed):
    assert printed.count("idle, tuned") == 1
    assert len((directory / "run" / "metrics.csv").read_text().splitlines()) == 1 + 48 // (8 * PROCESSES)
    assert (directory / "run" / "best.safetensors").exists()


def test_command_runs_in_two_processes_and_one_of_them_writes(pair, directory):
    assert [found["status"] for found in pair] == [0, 0]
    assert pair[1]["printed"] == ""
    check_run(directory, pair[0]["printed"])


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path):
    folder(tmp_path / "data")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--master-port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "idlefx.finetune", *command(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_run(tmp_path, done.stdout)


def test_another_number_of_processes_does_not_go_on_exactly_and_is_refused(pair, directory, capsys):
    assert main(["--resume", str(directory / "run")]) == 2
    assert "processes is 2 there, 1 now" in capsys.readouterr().err
