"""How many steps a run has, and after how many of them it looks at the held-out images."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from idlefx.errors import InputError
from idlefx.training.config import Settings
from idlefx.training.distributed import World
from idlefx.training.objective import Objective
from idlefx.training.seeding import seeded

LOOKING = 0.2  # share of a budget that may be spent on held-out images
TRIED = 3  # batches that are tried to see how long a step takes; the first one is not counted
OPTIMISER = 1.05  # a step takes longer than its batches by about so much


@dataclass(frozen=True)
class Length:
    """Of a run.

    Attributes:
        steps: All of them.
        every: Steps between two looks at the held-out images.
    """

    steps: int
    every: int

    def due(self, step: int) -> bool:
        """Whether the held-out images are looked at after this step."""
        return step % self.every == 0 or step == self.steps


def planned_length(settings: Settings, per_epoch: int | None, *, labelled: bool) -> Length:
    """The length that the settings name.

    Args:
        settings: How to train.
        per_epoch: Steps of an epoch; None if it is not known.
        labelled: Whether the images have labels, so that they are looked at after every epoch.

    Raises:
        InputError: They name epochs, and it is not known how many steps an epoch has.
    """
    if not settings.steps and per_epoch is None:
        raise InputError("settings: it is not known how many batches an epoch has; name steps or a budget")
    steps = settings.steps or settings.epochs * (per_epoch or 0)
    if labelled and per_epoch:
        return Length(steps, per_epoch)
    return Length(steps, math.ceil(steps / settings.looks))


def affordable_length(
    settings: Settings, batches: Iterator[Any], objective: Objective[Any], seconds: float, look: float, world: World
) -> Length:
    """As many steps and looks as fit into some seconds, by how long the first batches take; no weight is changed.

    Args:
        settings: How to train.
        batches: Training batches to try.
        objective: What is minimised.
        seconds: What is left of the budget.
        look: Seconds that a look at the held-out images takes.
        world: The processes that train together, which agree.
    """
    each = _seconds_of_a_batch(batches, objective, settings.seed) * settings.accumulate * OPTIMISER
    each, look = world.mean(each), world.mean(look)
    looks = max(1, min(settings.looks, int(LOOKING * seconds / max(look, 1e-9))))
    steps = max(1, int(world.mean(seconds - looks * look) / each))
    return Length(steps, math.ceil(steps / looks))


def _seconds_of_a_batch(batches: Iterator[Any], objective: Objective[Any], seed: int) -> float:
    student, times = objective.student, list[float]()
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    before = time.perf_counter()
    with seeded(seed):
        for batch in islice(batches, TRIED):
            loss = objective.parts(student, batch, 0, 1)[0]
            loss.backward()
            float(loss.detach())  # waits for the device
            times.append(time.perf_counter() - before)
            before = time.perf_counter()
    student.zero_grad()
    with torch.no_grad():
        for name, buffer in student.named_buffers():
            buffer.copy_(buffers[name])
    if not times:
        raise InputError("data: the training images gave no batch")
    counted = times[1:] or times
    return sum(counted) / len(counted)
