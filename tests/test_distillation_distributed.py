"""Two processes tune without labels as one does with the joined batch, and go on exactly where they were."""

import csv
import os
import signal
import socket
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

from idlefx.cli.finetune import main
from idlefx.training.metric_log import MetricLog
from tests.models.colours import picture, vit

PROCESSES, BATCH, STEPS, STOPPED_AT = 2, 8, 6, 3
MODEL = f"{__name__}:encoder"
pytestmark = pytest.mark.slow


def encoder():
    return vit(num_classes=0)


def arguments(root, out, processes):
    return [
        "--model", MODEL, "--layers", "1", "--keep", "0.4", "--data", str(root / "data"), "--steps", str(STEPS),
        "--lr", "1e-3", "--batch-size", str(BATCH // processes), "--workers", "0", "--looks", "2", "--val-share", "0.3",
        "--device", "cpu", "--out", str(root / out), *(root / "more.txt").read_text().split(),
    ]  # fmt: skip


def interrupt_after(step):
    write = MetricLog.write

    def written(self, row):
        write(self, row)
        if row["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return written


def child(rank, ports, root):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    found, write = {}, MetricLog.write
    runs = {
        "whole": arguments(root, "whole", PROCESSES),
        "stopped": arguments(root, "stopped", PROCESSES),
        "resumed": ["--resume", str(root / "stopped")],
    }
    for port, (name, words) in zip(ports, runs.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        MetricLog.write = interrupt_after(STOPPED_AT) if name == "stopped" else write
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):
            found[name] = main(words), printed.getvalue()
    torch.save(found, root / f"{rank}.pt")


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def rows(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return [{**row, "images_per_s": ""} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", params=["", "--keep-from 0.9 --stream"], ids=["plain", "keep lowered, stream"])
def root(request, tmp_path_factory):
    """Where the data lies and the runs go."""
    root = tmp_path_factory.mktemp("pair")
    (root / "more.txt").write_text(request.param)
    (root / "data").mkdir()
    for number in range(60):
        picture(number, number).save(root / "data" / f"{number}.png")
    torch.multiprocessing.spawn(child, ([free_port() for _ in range(3)], root), nprocs=PROCESSES)
    return root


def test_two_processes_are_one_with_the_joined_batch(root):
    assert main(arguments(root, "alone", 1)) == 0
    pair, alone = rows(root / "whole"), rows(root / "alone")
    assert len(pair) == len(alone) == STEPS
    for row, other in zip(pair, alone, strict=True):
        for name in ("loss", "output", "distance", "distance_error", "held-out output"):
            assert bool(row[name]) == bool(other[name])
            assert not row[name] or float(row[name]) == pytest.approx(float(other[name]), rel=1e-3), name


def test_one_of_them_tells(root):
    found = [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    assert [each["whole"][0] for each in found] == [0, 0]
    assert "18 held-out images" in found[0]["whole"][1] and found[1]["whole"][1] == ""


def test_they_go_on_exactly_where_they_were(root):
    found = torch.load(root / "0.pt", weights_only=True)
    assert (found["stopped"][0], found["resumed"][0]) == (130, 0)
    assert rows(root / "stopped") == rows(root / "whole")
    assert found["resumed"][1].splitlines()[-5:-2] == found["whole"][1].splitlines()[-5:-2]
