"""FSDP2: two processes that share a converted model and its teacher train as one does that has them whole."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import idlefx
from idlefx.finetune import Taught
from tests.models.colours import Colours, vit

PROCESSES, STEPS = 2, 2
IMAGES = torch.stack([Colours(16, 0.0)[index][0] for index in range(16)])
pytestmark = pytest.mark.slow


def shard(idle):
    """Each block by itself, what is in none of them together."""
    for block in idle.plan.blocks:
        inside = [path for path in idle.conversion.free_layers if path.startswith(f"{block.path}.")]
        fully_shard([idle.get_submodule(path) for path in inside])
    fully_shard(idle, reshard_after_forward=True)


def shard_dense(dense):
    for block in dense.blocks:
        fully_shard(block)
    fully_shard(dense, reshard_after_forward=True)


def trained(idle, stream, rank=0, processes=1):
    """Losses, and whole parameters after some steps on the same images, however many processes share them."""
    dense = vit(num_classes=0).eval()
    student = idlefx.convert(dense, [1], 0.4, idle=idle)
    if stream:  # what compares the streams is traced of the whole models
        taught = Taught(dense, student, IMAGES, stream=True).train()
        student = taught.idle
    if processes > 1:
        shard(student)
    if not stream:
        if processes > 1:
            shard_dense(dense)
        taught = Taught(dense, student, IMAGES).train()
    optimizer, losses = torch.optim.SGD(taught.parameters(), lr=1e-4), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = taught(IMAGES[rank::processes])["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    held = sum(getattr(value, "to_local", lambda value=value: value)().numel() for value in taught.parameters())
    whole = get_model_state_dict(taught, options=StateDictOptions(full_state_dict=True))
    losses = torch.stack(losses)
    if processes > 1:
        distributed.all_reduce(losses)
    return losses / processes, whole, held


def child(rank, port, directory):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    distributed.init_process_group("gloo")
    try:
        found = {(idle, stream): trained(idle, stream, rank, PROCESSES) for idle, stream in CASES}
        torch.save(found, Path(directory) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


CASES = [("rest", False), ("follow", False), ("rest", True)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the first of two processes found."""
    directory = tmp_path_factory.mktemp("shared")
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.spawn(child, (port, directory), nprocs=PROCESSES)
    return torch.load(directory / "0.pt", weights_only=True)


@pytest.mark.parametrize("idle, stream", CASES)
def test_steps_of_a_sharded_model_are_those_of_a_whole_one(idle, stream, shared):
    losses, weights, held = shared[idle, stream]
    alone, whole, size = trained(idle, stream)
    assert losses.tolist() == pytest.approx(alone.tolist(), rel=1e-4)
    assert weights.keys() == whole.keys() and held < 0.6 * size
    for name, value in whole.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)
