"""What an evaluation found: a frozen record, which prints as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

DENSE = "dense"


@dataclass(frozen=True)
class Accuracy:
    """Of one model; all in percent, or in percentage points.

    Attributes:
        top1: Share of the images for whose class the logit is highest.
        error: Standard error of `top1`.
        change: `top1` less that of the dense model.
        change_error: Standard error of `change`. The images are the same, so it is the smaller one of paired samples.
        same_top1: Share of the images to which the dense model gives the same class, right or wrong.
    """

    top1: float
    error: float
    change: float
    change_error: float
    same_top1: float


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of models on the same images; prints as a table.

    Attributes:
        models: By name; "dense" is the dense one.
        images: How many images were looked at.
        classes: How many classes the models tell apart.
    """

    models: Mapping[str, Accuracy]
    images: int
    classes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON keeps as it is."""
        return asdict(self) | {"models": {name: asdict(accuracy) for name, accuracy in self.models.items()}}

    def __str__(self) -> str:
        head = ["model", "top-1, %", "change, points", "same class, %"]
        rows = [
            [name, f"{each.top1:.2f} ± {each.error:.2f}"]
            + ([] if name == DENSE else [f"{each.change:+.2f} ± {each.change_error:.2f}", f"{each.same_top1:.2f}"])
            for name, each in self.models.items()
        ]
        table = tabulate(rows, head, disable_numparse=True, colalign=("left", "right", "right", "right"))
        return f"{table}\n{self.images} images of {self.classes} classes; ± is one standard error"
