"""One process or many: which of them this is, where its tensors live, and how numbers are added up over all."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from idlefx.errors import InputError
from idlefx.utils.devices import present


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: Which of them this is, from 0; the first one writes and reports.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; all of them must ask."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def mean(self, value: float) -> float:
        """The mean of a number over all processes; all of them must ask."""
        if self.size == 1:
            return value
        return float(self.total(torch.tensor(value, device=self.device, dtype=torch.float32))) / self.size

    def any(self, told: bool) -> bool:
        """Whether any process was told so; all of them must ask."""
        return bool(self.total(torch.tensor(float(told), device=self.device))) if self.size > 1 else told

    def gather(self, items: Iterable[Any]) -> list[Any]:
        """What the processes have, in order and without repetitions; all of them must ask."""
        return sorted(set(self.lists(items)))

    def lists(self, items: Iterable[Any]) -> list[Any]:
        """What the processes have, one after the other; all of them must ask."""
        every = [list(items)] * self.size
        if self.size > 1:
            distributed.all_gather_object(every, every[0])
        return [item for one in every for item in one]


@contextmanager
def interrupts(world: World) -> Iterator[Callable[[], bool]]:
    """Turn an interrupt into a question that can be asked: whether there was one.

    A second one ends a single process at once; to many of them `torchrun` itself sends a second one.
    """
    seen = []

    def note(*_: Any) -> None:
        seen.append(True)
        if world.size == 1:
            signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def processes(device: str | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: "cpu", "cuda" or "cuda:1"; by default a GPU where there is one.

    Raises:
        InputError: There is no such device, or there are more processes than GPUs.
    """
    rank, size, local, here = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda":
        gpus = torch.cuda.device_count()
        if here > gpus > 0:
            raise InputError(
                f"device: {here} processes on this machine, but {gpus} GPU{'s' * (gpus > 1)}; "
                f"start torchrun with --nproc-per-node {gpus}, or name --device cpu"
            )
        chosen = f"cuda:{local}"
    elif here > 1 and chosen.startswith("cuda"):
        raise InputError(f"device: {here} processes cannot share {chosen}; name --device cuda to give each its own GPU")
    found = present(chosen)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if size == 1:
        yield World(device=found)
        return
    distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(rank, size, found)
    finally:
        distributed.destroy_process_group()
