"""Time calls in turn and take their peak memory, on CPU and CUDA."""

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
WARM_UP = 3  # calls that are not counted
FEWEST_ROUNDS, MOST_ROUNDS = 5, 500
MEMORY_ERRORS = ("out of memory", "allocate memory", "not enough memory")


def time_in_turn(
    runs: Sequence[Run], device: torch.device, samples: list[list[float]], seconds: float, rounds: int | None = None
) -> None:
    """Call all of them in turn, round after round, so that whatever disturbs the machine disturbs them alike.

    Args:
        runs: Calls that are warm. Each round begins with another of them.
        device: Where they run.
        samples: Gets one entry per finished round, the milliseconds in the order of `runs`; so an interrupt loses
            no more than the round it falls into.
        seconds: About how long to go on, within `FEWEST_ROUNDS` and `MOST_ROUNDS`.
        rounds: How many rounds instead.
    """
    start = time.perf_counter()
    while len(samples) < (rounds or FEWEST_ROUNDS) or (
        rounds is None and len(samples) < MOST_ROUNDS and time.perf_counter() - start < seconds
    ):
        first = len(samples) % len(runs)
        order = [*range(first, len(runs)), *range(first)]
        taken = {i: time_ms(runs[i], device) for i in order}
        samples.append([taken[i] for i in range(len(runs))])


def time_ms(run: Run, device: torch.device) -> float:
    """Milliseconds of one call; on CUDA between two events of the device itself."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def peak_mib(run: Run, device: torch.device, resident: Iterable[Tensor]) -> float:
    """The most memory that tensors take during a call, in MiB.

    It is what is there before (`resident`: weights, inputs, optimizer state) and what the call adds to it at most.
    The size of the process would not do: it keeps what other models took, and the allocator's leftovers. On a CPU
    every allocation of the call is followed, compiled code's too; scratch space inside library calls is not seen.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident}
    added = _added_on_cuda(run, device) if device.type == "cuda" else _added_on_cpu(run)
    return (sum(storages.values()) + added) / 2**20


def _added_on_cuda(run: Run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _added_on_cpu(run: Run) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and end on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    taken = most = 0
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for change in sorted(changes, key=lambda e: e.start_ns()):  # the backward pass has a thread of its own
        taken += change.nbytes()
        most = max(most, taken)
    return most


def release(device: torch.device) -> None:
    """Forget compiled code, and give memory back."""
    torch.compiler.reset()
    reclaim(device)


def reclaim(device: torch.device) -> None:
    """Give memory back that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or any(hint in str(error) for hint in MEMORY_ERRORS)
