"""Random numbers that follow from where one is in a run, so that a resumed run draws what an unbroken one drew."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*place: int, device: torch.device | None = None) -> Iterator[None]:
    """Let all random numbers drawn in the block follow from `place` alone, and leave the generators as they were.

    Args:
        *place: Numbers from 0 that name a place, such as seed, epoch and image.
        device: A CUDA device whose generator is to follow too.
    """
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    on_cuda = device is not None and device.type == "cuda"
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
