"""How long a plan takes on a device: from its table of block times, and a few calls of the model itself.

1. What the dense model takes beside its blocks, it takes with any plan. A block takes what the table has for the tokens
   that work.
2. So a plan takes `dense - scale * saved + choosing * choices`: what its blocks save by the table, and what choosing
   costs. `scale` and `choosing` are those with which two plans take what was measured, one of many choices and one of a
   single choice.
3. Of the plan that is chosen in the end, `scale` learns once more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from idlefx.bench.block_latency import measure_times
from idlefx.bench.results import EAGER
from idlefx.bench.timer import WARM_UP, release, time_in_turn
from idlefx.capture.inputs import call
from idlefx.errors import InputError
from idlefx.records import BlockTable, Plan
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import evaluating, placed
from idlefx.reporting.latency import BlockTimes, size_of, times_for, times_of, times_to_json
from idlefx.search.candidates import Candidate
from idlefx.search.pictures import repeated
from idlefx.utils.devices import machine_in_words

PARTS = 12  # token counts of a table that is measured here
BLOCK_S, MODEL_S = 0.4, 6.0  # about how long to measure a count, and two models in turn


@dataclass
class Timing:
    """Predicts times.

    Attributes:
        tables: Block times.
        dense_ms: Of the dense model, measured.
        scale: How much of what blocks save by the table arrives.
        choosing_ms: Of one choice among all tokens.
        measure: Milliseconds of the dense model and of another one, called in turn.
    """

    tables: Sequence[BlockTimes]
    dense_ms: float
    scale: float
    choosing_ms: float
    measure: Callable[[nn.Module], tuple[float, float]]

    def ms(self, plan: Plan) -> float:
        """Predicted milliseconds of a call with the plan."""
        return self.dense_ms - self.scale * self.saved(plan) + self.choosing_ms * choices(plan)

    def saved(self, plan: Plan) -> float:
        """What the blocks save by the table."""
        steps = [step for step in plan if step.idles]
        return sum(self._block(plan, s.block) - self._block(plan, s.block, s.kept) for s in steps)

    def learn(self, plan: Plan, ms: float) -> float:
        """Predict from now on what a plan was measured to take, and plans like it accordingly.

        Returns:
            By what share the prediction was off.
        """
        off = abs(self.ms(plan) / ms - 1)
        if saved := self.saved(plan):
            self.scale = (self.dense_ms + self.choosing_ms * choices(plan) - ms) / saved
        return off

    def measured_ms(self, module: nn.Module) -> float:
        """Milliseconds of a call, measured beside the dense model, at the pace at which that takes `dense_ms`."""
        dense_ms, ms = self.measure(module)
        return self.dense_ms * ms / dense_ms

    @property
    def conditions(self) -> str:
        """Where, how and for which batch size."""
        table = self.tables[0]
        return f"{table.machine}, {table.mode}, batch {table.batch}"

    def told(self) -> dict[str, Any]:
        """What another run needs to predict the same: plain data."""
        figures = {"dense_ms": self.dense_ms, "scale": self.scale, "choosing_ms": self.choosing_ms}
        return {"tables": times_to_json(self.tables), **figures}

    def _block(self, plan: Plan, index: int, kept: int | None = None) -> float:
        block = plan.blocks[index]
        tokens = block.tokens if kept is None else kept + len(block.prefix)
        return times_for(block, self.tables).at(tokens)


def choices(plan: Plan) -> float:
    """How many times tokens are chosen; among the few groups that are left, where they join, it counts for less."""
    total, left = 0.0, 0
    for step in plan:
        total += (left / step.tokens if step.joins else 1.0) if step.opens and step.idles else 0.0
        left = step.kept
    return total


def timing_of(
    dense: nn.Module,
    examples: tuple[Candidate, Candidate],
    one: ImageBatch,
    batch: int,
    tables: Sequence[BlockTimes] | None = None,
    told: Mapping[str, Any] | None = None,
) -> Timing:
    """Measure what times are predicted from.

    Args:
        dense: The dense model.
        examples: A plan with many choices, and one with few.
        one: A picture.
        batch: Images per call, unless a table says how many.
        tables: What `bench --table` wrote; measured here if None.
        told: What another timing told of itself; then nothing is measured.

    Raises:
        InputError: The table was measured on another device, or is for blocks of another size.
    """
    weight = next(parameter for parameter in dense.parameters() if parameter.is_floating_point())
    blocks = examples[0].plan.blocks
    if told is not None:
        tables = times_of(told["tables"])
    elif tables is None:
        tables = _measured_tables(blocks, weight, batch)
    _check(tables, weight)
    measure = partial(_in_turn, dense, repeated(one, tables[0].batch), weight, tables[0].mode)
    if told is not None:
        return Timing(tables, told["dense_ms"], told["scale"], told["choosing_ms"], measure)
    dense_ms, many_ms = measure(examples[0].module)
    timing = Timing(tables, dense_ms, 1.0, 0.0, measure)
    gains = dense_ms - many_ms, dense_ms - timing.measured_ms(examples[1].module)
    plans = [example.plan for example in examples]
    return _fitted(timing, [timing.saved(plan) for plan in plans], [choices(plan) for plan in plans], gains)


def _fitted(timing: Timing, saved: Sequence[float], chosen: Sequence[float], gains: Sequence[float]) -> Timing:
    """The timing by which two plans gain what they do: `gain = scale * saved - choosing_ms * chosen`.

    Choosing costs nothing where noise says that it costs less.
    """
    determinant = saved[1] * chosen[0] - saved[0] * chosen[1]
    choosing = (saved[0] * gains[1] - saved[1] * gains[0]) / determinant if determinant else 0.0
    choosing = max(0.0, choosing)
    both = sum(gains) + choosing * sum(chosen)
    return replace(timing, scale=both / sum(saved) if sum(saved) else 1.0, choosing_ms=choosing)


def _measured_tables(blocks: BlockTable, weight: Tensor, batch: int) -> list[BlockTimes]:
    tables = []
    for block in {size_of(block): block for block in blocks if block.tokens}.values():
        counts = sorted({max(1, block.tokens * part // PARTS) for part in range(PARTS + 1)})
        tables.append(measure_times(block, counts, batch, weight, EAGER, BLOCK_S))
    return tables


def _check(tables: Sequence[BlockTimes], weight: Tensor) -> None:
    here = machine_in_words(weight)
    if other := [table.machine for table in tables if table.machine != here]:
        raise InputError(
            f"times: the table was measured on {other[0]}, but the model is on {here}; measure anew here with "
            "`bench --table`, or leave the table out, and it is done on the spot"
        )
    if not tables:
        raise InputError("times: the table is empty; measure anew with `bench --table`")


def _in_turn(dense: nn.Module, inputs: Any, weight: Tensor, mode: str, other: nn.Module) -> tuple[float, float]:
    samples: list[list[float]] = []
    models = [dense, other]
    with evaluating(models), torch.inference_mode():
        runs = models if mode == EAGER else [torch.compile(model, dynamic=False, mode=mode) for model in models]
        calls = [partial(call, run, placed(inputs, dense)) for run in runs]
        for once in calls * WARM_UP:
            once()
        time_in_turn(calls, weight.device, samples, MODEL_S)
    if mode != EAGER:
        release(weight.device)
    first, second = (median(taken) for taken in zip(*samples, strict=True))
    return first, second
