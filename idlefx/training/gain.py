"""What a fine-tune without labels came to: how far the outputs were from the dense model's, and how far they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from idlefx.records import written
from idlefx.reporting.comparison.record import Comparison, OutputChange
from idlefx.reporting.cost_report import report
from idlefx.runtime.module import IdleModule

SURE = 2.0  # standard errors by which a model must be better than the untuned one
_SAVED = ("images", "distances", "each", "distance", "error", "best_step", "looks")
Changes = Mapping[str, OutputChange]


@dataclass
class Gain:
    """Outputs before and after, and every step between; prints as a table.

    The distance of a model is the mean over held-out images and outputs of the distances to the dense model, each
    output's divided by what it was before training: 1 for the untuned model, 0 for the dense one.

    Attributes:
        dense_gmacs: Multiply-adds of the dense model for one image, in units of 1e9.
        idle_gmacs: Those of the idling one.
        images: How many held-out images were looked at.
        distances: Of each output before training, in the mean over the images.
        each: The distance of the untuned model for each image.
        distance: Of the best model.
        error: Standard error, over the images, of what it is better than the untuned one.
        best_step: After how many steps it was the best; 0 if nothing was gained.
        looks: Step, distance and error of each look at the held-out images.
        untuned: How outputs compare with the dense model's before training, by name.
        tuned: How those of the best model do.
        rows: Losses, learning rate and images per second of each step of this call.
        finished: Whether the run came to its end, and was not interrupted.
        gave_up: Whether this end was that it had stopped paying.
    """

    dense_gmacs: float
    idle_gmacs: float
    images: int = 0
    distances: dict[str, float] = field(default_factory=dict)
    each: list[float] = field(default_factory=list)
    distance: float = 1.0
    error: float = 0.0
    best_step: int = 0
    looks: list[tuple[int, float, float]] = field(default_factory=list)
    untuned: Changes = field(default_factory=dict)
    tuned: Changes = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    gave_up: bool = False

    @classmethod
    def of(cls, idle: IdleModule) -> "Gain":
        """An empty one for this model."""
        cost = report(idle)
        return cls(cost.dense_gmacs, cost.idle_gmacs)

    @property
    def gained(self) -> bool:
        """Whether a model was found that is better than the untuned one, beyond chance."""
        return self.best_step > 0

    def begin(self, distances: Mapping[str, float], each: Sequence[float], changes: Changes) -> None:
        """Take down the untuned model."""
        self.distances, self.each, self.images = dict(distances), list(each), len(each)
        self.untuned = self.tuned = dict(changes)

    def note(self, step: int, each: Sequence[float], changes: Changes) -> tuple[dict[str, float], bool]:
        """Take down a look.

        Args:
            step: After how many steps.
            each: The distance for each image, in the order of before.
            changes: How the outputs compare.

        Returns:
            Distance and error, and whether the model is the best so far and surely better than the untuned one.
        """
        better = [before - after for before, after in zip(self.each, each, strict=True)]
        distance, error = sum(each) / len(each), standard_error(better)
        self.looks.append((step, distance, error))
        best = distance < self.distance and sum(better) / len(better) > SURE * error
        if best:
            self.distance, self.error, self.best_step, self.tuned = distance, error, step, dict(changes)
        return {"distance": distance, "distance_error": error}, best

    def state(self) -> dict[str, Any]:
        """What a continued run needs to know."""
        changes = {when: {name: asdict(c) for name, c in getattr(self, when).items()} for when in ("untuned", "tuned")}
        return {**{name: getattr(self, name) for name in _SAVED}, **changes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name in _SAVED:
            setattr(self, name, state[name])
        for when in ("untuned", "tuned"):
            setattr(self, when, {name: OutputChange(**change) for name, change in state[when].items()})

    def __str__(self) -> str:
        changes = {"untuned": self.untuned, **({"tuned": self.tuned} if self.gained else {})}
        cost = f"GMACs: dense {written(self.dense_gmacs)}, idle {written(self.idle_gmacs)}"
        return f"{Comparison(changes, self.images)}\n{cost}\n{self._verdict()}"

    def _verdict(self) -> str:
        what = f"distance to the dense model on {self.images} held-out images, untuned = 1"
        stopped = f"; stopped after step {self.looks[-1][0]}, as it no longer paid" if self.gave_up else ""
        if self.gained:
            return (
                f"{what}: {self.distance:.3f} ± {self.error:.3f} (standard error) after step {self.best_step}{stopped}"
            )
        if not any(self.distances.values()):
            return "the outputs are those of the dense model already: there is nothing to tune"
        if not self.looks:
            return f"{what}: no step was looked at; the weights are the untuned ones"
        _, distance, error = min(self.looks, key=lambda look: look[1])
        return (
            f"{what}: nothing was gained beyond chance, at best {distance:.3f} ± {error:.3f} (standard error)"
            f"{stopped}; the weights are the untuned ones"
        )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of values that were drawn by chance; infinite for a single one."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
