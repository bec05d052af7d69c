"""What a search came to: the plan, what it changes on pictures that had no part in it, and what else there was."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from idlefx.options import PlanOptions
from idlefx.planning.model_plan import ModelPlan
from idlefx.records import written
from idlefx.reporting.comparison.image_batches import Name
from idlefx.utils.files import whole_file

LONGEST = 48  # letters of a list in the table


@dataclass(frozen=True)
class Point:
    """A plan and what it costs and changes.

    Attributes:
        options: The plan.
        gmacs: Billions of multiply-adds for one image.
        ms: Predicted milliseconds of a call; None where no times were asked for.
        change: 1 − cosine to the dense outputs, in the mean over pictures and outputs.
    """

    options: PlanOptions
    gmacs: float
    ms: float | None
    change: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"plan": self.options.to_dict(), "gmacs": self.gmacs, "ms": self.ms, "change": self.change}


@dataclass(frozen=True)
class Findings:
    """What a search found out besides the plan.

    Attributes:
        budget: What was asked for, in words.
        chosen: The plan; its change is that on the few pictures of the frontier.
        frontier: Plans of its shape at other budgets, the cheapest first, the chosen one among them.
        dense_gmacs: Of the dense model.
        dense_ms: Of the dense model, measured; None where no times were asked for.
        measured_ms: Of the chosen plan, measured beside the dense model.
        conditions: Where, how and for which batch size times are; empty if there are none.
        reach: What can be had at all, in words.
        change: Of the chosen plan on the pictures that were held out.
        calibration_change: On those that it was chosen on.
        worst_image: The held-out picture that is changed most, and in which output.
        worst: Its cosine there.
        pictures: How many the frontier is of, how many it was chosen on, and how many were held out.
        tried: How many plans were looked at.
        interrupted: Whether the user stopped the search early.
    """

    budget: str
    chosen: Point
    frontier: tuple[Point, ...]
    dense_gmacs: float
    dense_ms: float | None
    measured_ms: float | None
    conditions: str
    reach: str
    change: float
    calibration_change: float
    worst_image: tuple[Name, str]
    worst: float
    pictures: tuple[int, int, int]
    tried: int
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON keeps as it is."""
        told = {name: value for name, value in vars(self).items() if name not in ("chosen", "frontier")}
        frontier = [point.to_dict() for point in self.frontier]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        return {**plain, "chosen": self.chosen.to_dict(), "frontier": frontier}

    def __str__(self) -> str:
        timed = self.dense_ms is not None
        head = ["", "layers", "keep", "GMACs", "of dense", "change", *(["ms", "speed-up"] if timed else [])]
        rows = [self._row(point, timed) for point in self.frontier]
        table = tabulate(rows, headers=head, disable_numparse=True)
        return "\n".join([table, *self._notes()])

    def _row(self, point: Point, timed: bool) -> list[str]:
        share = f"{point.gmacs / self.dense_gmacs:.0%}"
        row = [
            "→" if point == self.chosen else "", _list(point.options["layers"]), _list(point.options["keep"]),
            written(point.gmacs), share, f"{point.change:.2g}",
        ]  # fmt: skip
        if timed and point.ms is not None and self.dense_ms is not None:
            row += [f"{point.ms:.4g}", f"{self.dense_ms / point.ms:.2f}"]
        return row

    def _notes(self) -> list[str]:
        few, calibration, held_out = self.pictures
        joined = "" if self.chosen.options["reselect"] else "; groups join from stage to stage (reselect=False)"
        notes = [
            f"→ chosen for {self.budget}{joined}",
            f"change: 1 − cosine to the dense outputs, on {few} of {calibration} pictures that plans were chosen on",
            f"on {held_out} pictures that had no part in it, the chosen plan changes {self.change:.2g} (on the "
            f"{calibration}: {self.calibration_change:.2g}); most of all {said(self.worst_image[0])}, whose `"
            f"{self.worst_image[1]}` has a cosine of {self.worst:.4f}",
            f"{self.tried} plans were looked at; {self.reach}",
        ]
        if self.dense_ms is not None:
            measured = f"; measured {self.measured_ms:.4g} ms" if self.measured_ms is not None else ""
            notes.append(f"ms: predicted; dense {self.dense_ms:.4g} ms{measured}; {self.conditions}")
        if self.interrupted:
            notes.append("interrupted: the best until then; with a file to write, resume=True or --resume goes on")
        return notes


@dataclass(frozen=True)
class Proposal(ModelPlan):
    """A plan that was chosen for a budget: `PlanOptions`, which `convert` takes; prints as a table.

    Attributes:
        findings: What it costs and changes, and what else there was.
    """

    findings: Findings = field(repr=False, kw_only=True)

    def told(self) -> dict[str, Any]:
        """What stands in a file beside the options."""
        return {**super().told(), "findings": self.findings.to_dict()}

    def write(self, path: str | Path) -> Path:
        """Write it where `read_plan` and `--plan` find it.

        Raises:
            InputError: The path cannot be written.
        """
        with whole_file(path) as partial:
            partial.write_text(self.to_json() + "\n")
        return Path(path)

    def __str__(self) -> str:
        return str(self.findings)


def said(name: Name) -> str:
    """A picture in a sentence: its file, or its place among those that were given."""
    return name if isinstance(name, str) else f"image {name}"


def _list(values: Sequence[float]) -> str:
    text = " ".join(f"{value:.2g}" for value in values)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
