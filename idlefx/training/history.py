"""What a fine-tune came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from idlefx.records import written
from idlefx.reporting.cost_report import report
from idlefx.runtime.module import IdleModule

_SAVED = ("dense", "untuned", "tuned", "best", "best_step")


@dataclass
class History:
    """Accuracy before and after, and every step between; prints as a table.

    Attributes:
        dense_gmacs: Multiply-adds of the dense model for one image, in units of 1e9.
        idle_gmacs: Those of the idling one.
        dense: Top-1 accuracy of the dense model, percent.
        untuned: Of the idling model before training.
        tuned: Of the idling model with its last averaged weights.
        best: The highest after any epoch.
        best_step: After how many steps that was.
        rows: Losses, learning rate and images per second of each step of this call.
        finished: Whether the run came to its end, and was not interrupted.
    """

    dense_gmacs: float
    idle_gmacs: float
    dense: float = 0.0
    untuned: float = 0.0
    tuned: float = 0.0
    best: float = -1.0
    best_step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def of(cls, idle: IdleModule) -> "History":
        """An empty one for this model."""
        found = report(idle)
        return cls(found.dense_gmacs, found.idle_gmacs)

    def note(self, top1: float, step: int) -> bool:
        """Take down an evaluation; returns whether there was no better one."""
        self.tuned = top1
        if top1 > self.best:
            self.best, self.best_step = top1, step
            return True
        return False

    def state(self) -> dict[str, float]:
        """What a continued run needs to know."""
        return {name: getattr(self, name) for name in _SAVED}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        for name in _SAVED:
            setattr(self, name, state[name])

    def __str__(self) -> str:
        rows = [
            ("dense", f"{self.dense:.2f} %", written(self.dense_gmacs)),
            ("idle, untuned", f"{self.untuned:.2f} %", written(self.idle_gmacs)),
            ("idle, tuned", f"{self.tuned:.2f} %", written(self.idle_gmacs)),
        ]
        text = tabulate(rows, headers=["", "top-1", "GMACs"], disable_numparse=True, stralign="right")
        better = self.best > self.tuned
        return text + (f"\nbest after step {self.best_step}: {self.best:.2f} %" if better else "")
