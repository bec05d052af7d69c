"""All modes and all models at one batch size: made ready, then timed in turn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idlefx.bench.results import DENSE, EAGER, IDLE, OTHER_ENGINES, Timing
from idlefx.bench.timer import WARM_UP, Run, lacks_memory, peak_mib, reclaim, release, time_in_turn
from idlefx.errors import first_line

REPLAYING = ("reduce-overhead", "max-autotune")  # modes that replay CUDA graphs, whose memory is out of sight
SCOPE = 64  # compiled versions of a model's code; past eight the compiler silently gives up on it

Prepare = Callable[[nn.Module, Callable[..., Any], Any], tuple[Run, Sequence[Tensor]]]


class BenchCase:
    """All modes and models at one batch size; they take turns.

    Args:
        models: By name; "dense" and "idle" among them.
        served: The same as other engines run them, by model and mode; empty if none is timed.
        prepare: Makes of a model, its compiled form and inputs a call, and says what stays in memory between calls.
        inputs: Makes the batch.
        batch: Its size.
        device: Where all of them are.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        served: Mapping[str, Mapping[str, nn.Module]],
        prepare: Mapping[str, Prepare],
        inputs: Callable[[], Any],
        batch: int,
        device: torch.device,
    ) -> None:
        self.models, self.served, self.prepare = models, served, prepare
        self.inputs, self.batch, self.device = inputs, batch, device
        self.runs: dict[tuple[str, str], Run] = {}
        self.peaks: dict[tuple[str, str], float | None] = {}
        self.samples: list[list[float]] = []
        self.skipped: list[str] = []
        self.interrupted = False

    def run(self, modes: Sequence[str], seconds: float, rounds: int | None) -> None:
        """Warm up and time in turn; what cannot be timed is noted in `skipped`, an interrupt in `interrupted`."""
        try:
            with torch._dynamo.config.patch(recompile_limit=SCOPE):
                inputs = self.inputs()
                for mode in modes:
                    self._warm(mode, inputs)
                pairs = len(self.runs) / 2
                if self.runs:
                    time_in_turn(list(self.runs.values()), self.device, self.samples, seconds * pairs, rounds)
        except KeyboardInterrupt:
            self.interrupted = True
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            self.skipped.append(
                f"batch {self.batch}: its inputs, or all modes beside one another, do not fit in memory"
            )
        finally:
            self.calls, self.runs = list(self.runs), {}
            release(self.device)

    def timings(self) -> list[Timing]:
        """Of the rounds that were finished."""
        columns = dict(zip(self.calls, zip(*self.samples, strict=True), strict=True)) if self.samples else {}
        found = []
        for mode in dict.fromkeys(mode for mode, _ in columns):
            ms = {name: tuple(taken) for (m, name), taken in columns.items() if m == mode}
            found.append(Timing(mode, self.batch, ms, {name: self.peaks[mode, name] for name in ms}))
        return found

    def _warm(self, mode: str, inputs: Any) -> None:
        """Make the calls of one mode; a peer that fails is left out, without dense or idle the mode is."""
        for name in self.models:
            try:
                self._prepare(mode, name, inputs)
            except Exception as error:
                self.skipped.append(f"{mode}, batch {self.batch}, {name}: {_reason(error, mode, name)}")
            if (mode, name) not in self.runs:
                reclaim(self.device)
                if name in (DENSE, IDLE):
                    for other in self.models:
                        self.runs.pop((mode, other), None)
                    return

    def _prepare(self, mode: str, name: str, inputs: Any) -> None:
        model = self.served[name][mode] if mode in OTHER_ENGINES else self.models[name]
        run = model if mode in (EAGER, *OTHER_ENGINES) else torch.compile(model, dynamic=False, mode=mode)
        once, resident = self.prepare[name](model, run, inputs)
        for _ in range(WARM_UP):
            once()
        hidden = mode in OTHER_ENGINES or (self.device.type == "cuda" and mode in REPLAYING)
        self.peaks[mode, name] = None if hidden else peak_mib(once, self.device, resident)
        self.runs[mode, name] = once


def _reason(error: Exception, mode: str, name: str) -> str:
    """Why a case is skipped; an eager model of the user's that fails for anything but memory is a fault to be seen."""
    if lacks_memory(error):
        return "it does not fit in memory"
    if mode == EAGER and name in (DENSE, IDLE):
        raise error
    what = "fails" if mode in (EAGER, *OTHER_ENGINES) else "does not compile"
    return f"it {what}, {type(error).__name__}: {first_line(error)}"
