"""What a comparison found: a frozen record, which prints as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from idlefx.reporting.comparison.image_batches import Name


@dataclass(frozen=True)
class OutputChange:
    """How far one output of a converted model is from the dense model's, in the mean over all images.

    Attributes:
        shape: Of the output for one image.
        cosine: Of the two outputs, each image over all its numbers: 1 where they point the same way, and for two that
            are zero. None for whole numbers and truth values.
        relative_difference: Length of the difference over that of the dense output, both over all images:
            `sqrt(Σ |converted − dense|² / Σ |dense|²)`. None for whole numbers, and where the dense output is zero.
        worst_image: The image with the lowest cosine (or the fewest equal values): its file, or its place from 0.
        worst: That cosine, or share of equal values.
        same_values: Share of equal values, for whole numbers and truth values; else None.
        same_top1: Share of the images for which both models have the same highest class; None where the output is not
            known to be logits.
        kl_nats: `Σ p_dense · (log p_dense − log p_converted)` of the softmaxes of logits, in nats; else None.
    """

    shape: tuple[int, ...]
    cosine: float | None
    relative_difference: float | None
    worst_image: Name
    worst: float
    same_values: float | None = None
    same_top1: float | None = None
    kl_nats: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Converted models beside their dense one; prints as a table.

    Attributes:
        changes: By the name of the converted model, by the name of the output.
        images: How many images were looked at.
        left_out: Outputs that were not compared, as they have no entry for each image.
    """

    changes: Mapping[str, Mapping[str, OutputChange]]
    images: int
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON keeps as it is."""
        models = {
            model: {output: asdict(change) | {"shape": list(change.shape)} for output, change in outputs.items()}
            for model, outputs in self.changes.items()
        }
        return {"images": self.images, "left_out": list(self.left_out), "models": models}

    def __str__(self) -> str:
        changes = [change for outputs in self.changes.values() for change in outputs.values()]
        head = ["model", "output", "shape", "cosine", "relative difference", "worst image"]
        logits = any(change.same_top1 is not None for change in changes)
        whole = any(change.same_values is not None for change in changes)
        head += ["same top-1", "KL in nats"] * logits + ["same values"] * whole
        rows = [row[: 6 + 2 * logits] + row[8 : 8 + whole] for row in self._rows()]
        table = tabulate(
            rows, headers=head, disable_numparse=True, colalign=("left",) * 3 + ("right",) * (len(head) - 3)
        )
        notes = (
            f"{self.images} image{'s' * (self.images != 1)}; cosine to the dense model, mean over images, and in "
            f"parentheses that of the worst image{'; KL(dense ‖ converted)' * logits}"
        )
        if self.left_out:
            notes += f"\nleft out, as they have no entry for each image: {', '.join(self.left_out)}"
        return f"{table}\n{notes}"

    def _rows(self) -> Iterator[list[str]]:
        for model, outputs in self.changes.items():
            for output, c in outputs.items():
                yield [
                    model, output, " × ".join(map(str, c.shape)) or "-", _digits(c.cosine, ".5f"),
                    _digits(c.relative_difference, "#.3g"), f"{c.worst_image} ({c.worst:.5f})",
                    _digits(c.same_top1, ".2%"), _digits(c.kl_nats, ".3g"), _digits(c.same_values, ".2%"),
                ]  # fmt: skip


def _digits(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)
