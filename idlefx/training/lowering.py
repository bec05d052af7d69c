"""Keep ratios that fall to those of the plan over the first part of a run: idling is learnt little by little."""

from collections.abc import Callable, Sequence

from idlefx.errors import InputError
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.variants import with_keep

SHARE = 1 / 3  # of the run, over which they fall
LEVELS = 4  # ratios on the way, in equal steps

Keep = float | tuple[float, ...]


class Lowering:
    """The models on the way to a plan; each keeps fewer tokens than the one before, and all share their parameters.

    How many tokens work stands in the graph, so each level has a graph of its own, made when it is come to.

    Args:
        idle: The model of the plan.
        keep_from: What the ratios fall from; those of the plan that are as high stay as they are.
        prepared: What makes a student of a model, such as `with_cut_loss`.

    Attributes:
        ratios: The keep ratios of each level, those of the plan left out.

    Raises:
        InputError: The plan keeps as many tokens from the beginning.
    """

    def __init__(self, idle: IdleModule, keep_from: float, prepared: Callable[[IdleModule], IdleModule]) -> None:
        keep = conversion_of(idle).options.keep
        if keep_from <= (keep if isinstance(keep, float) else min(keep)):
            raise InputError(
                f"settings: keep_from is {keep_from:g}, but the plan keeps {_told(keep)}; name a higher ratio to begin "
                "with, or leave it out"
            )
        self.idle, self.prepared = idle, prepared
        self.ratios = tuple(_on_the_way(keep_from, keep, (level + 1) / (LEVELS + 1)) for level in range(LEVELS))
        self._present: tuple[int, IdleModule] | None = None

    def __str__(self) -> str:
        told = "; ".join(map(_told, self.ratios))
        return f"over the first {SHARE:.0%} of the run keep ratios fall to those of the plan: {told}"

    def student(self, step: int, steps: int) -> IdleModule | None:
        """The student of a step of a run; None once the ratios are those of the plan."""
        level = int(step * LEVELS / (SHARE * steps))
        if level >= LEVELS:
            return None
        if self._present is None or self._present[0] != level:
            self._present = level, self.prepared(with_keep(self.idle, self.ratios[level]))
        return self._present[1]


def _on_the_way(start: float, end: float | Sequence[float], share: float) -> Keep:
    if isinstance(end, float):
        return start + (end - start) * share
    return tuple(max(start, each) + (each - max(start, each)) * share for each in end)


def _told(keep: float | Sequence[float]) -> str:
    return " ".join(f"{each:.3g}" for each in ([keep] if isinstance(keep, float) else keep))
