"""Time a dense model and its idling twin side by side."""

import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from idlefx.errors import InputError
from idlefx.module import IdleModule
from idlefx.report import report
from idlefx.timings import Bench, Timing

WARM_UP = 3  # calls of each model that are not counted
FEWEST_ROUNDS, MOST_ROUNDS = 5, 500


def bench(
    dense: nn.Module,
    idle: IdleModule,
    example: Any,
    *,
    batches: Sequence[int] = (1, 8, 16),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
    seconds: float = 4.0,
    rounds: int | None = None,
    progress: bool = True,
) -> Bench:
    """Time the dense and the idling model, call by call in turn, in one warm process, in evaluation mode.

    Args:
        dense: The original model.
        idle: Its idling twin.
        example: An input, batch first: a tensor, a tuple of positional or a dict of keyword inputs.
        batches: Batch sizes.
        device: Where to; copies of the models are moved. By default they stay where they are.
        dtype: Number type of the copies and of the input; by default the models' own.
        compiled: Whether to time `torch.compile(dynamic=False)` too; every batch size is compiled anew.
        seconds: About how long to measure one pair.
        rounds: How many rounds to measure instead.
        progress: Whether to show a progress bar.

    Raises:
        InputError: A batch size is not positive, there is none, or the device is missing.
    """
    if not batches or min(batches) < 1:
        raise InputError(f"bench: batch sizes must be positive, got {list(batches)}")
    if device is not None:
        device = present(device)
    totals = report(idle)
    timings: list[Timing] = []
    skipped: list[str] = []
    interrupted = False
    cases = [(batch, mode) for batch in batches for mode in ("eager", "compiled")[: 1 + compiled]]
    with _ready(dense, device, dtype) as first, _ready(idle, device, dtype) as second, torch.inference_mode():
        weight = next(first.parameters())
        bar = tqdm(cases, desc="bench", unit="case", leave=False, disable=not progress)
        try:
            for batch, mode in bar:
                bar.set_postfix_str(f"{mode}, batch {batch}")
                try:
                    timings.append(_measure((first, second), example, batch, weight, mode, seconds, rounds))
                except RuntimeError as error:
                    skipped.append(f"{mode}, batch {batch}: {_reason(error, mode)}")
                _release(weight.device)
        except KeyboardInterrupt:
            interrupted = True
        machine = _machine(weight)
    return Bench(machine, totals.dense_gmacs, totals.idle_gmacs, tuple(timings), tuple(skipped), interrupted)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a dict of keyword inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def present(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: There is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise InputError(f"device: cannot use {device}: {str(error).partition(chr(10))[0]}") from error
    return torch.device(device)


@contextmanager
def _ready(model: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None) -> Iterator[nn.Module]:
    """The model in evaluation mode, or a moved copy of it; its own modes come back."""
    if device is not None or dtype is not None:
        model = deepcopy(model).to(device=device, dtype=dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


def _measure(
    models: tuple[nn.Module, nn.Module],
    example: Any,
    batch: int,
    weight: Tensor,
    mode: str,
    seconds: float,
    rounds: int | None,
) -> Timing:
    runs = [_prepared(model, example, batch, weight, mode) for model in models]
    for run in runs * WARM_UP:
        _time_ms(run, weight.device)
    samples: list[list[float]] = []
    start = time.perf_counter()
    while len(samples) < (rounds or FEWEST_ROUNDS) or (
        rounds is None and len(samples) < MOST_ROUNDS and time.perf_counter() - start < seconds
    ):
        samples.append([_time_ms(run, weight.device) for run in runs])
    dense_ms, idle_ms = zip(*samples, strict=True)
    return Timing(mode, batch, dense_ms, idle_ms)


def _prepared(model: nn.Module, example: Any, batch: int, weight: Tensor, mode: str) -> Callable[[], Any]:
    def resize(value: Tensor) -> Tensor:
        whole = value[:1].expand(batch, *value.shape[1:]).contiguous().to(weight.device)
        return whole.to(weight.dtype) if whole.is_floating_point() else whole

    inputs = tree_map_only(Tensor, resize, example)
    run = torch.compile(model, dynamic=False) if mode == "compiled" else model
    return lambda: call(run, inputs)


def _time_ms(run: Callable[[], Any], device: torch.device) -> float:
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


def _release(device: torch.device) -> None:
    """Forget compiled code: past eight versions of a model the compiler silently gives up on it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: RuntimeError, mode: str) -> str:
    """Why a case is skipped; an eager model that fails for anything but memory is a fault to be seen."""
    words = str(error)
    if any(hint in words for hint in ("out of memory", "allocate memory", "not enough memory")):
        return "it does not fit in memory"
    if mode == "eager":
        raise error
    return f"it does not compile, {type(error).__name__}: {words.strip().partition(chr(10))[0]}"


def _machine(weight: Tensor) -> str:
    if weight.device.type == "cuda":
        name = torch.cuda.get_device_name(weight.device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}, torch {torch.__version__}, {platform.system()}"
