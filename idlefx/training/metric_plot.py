"""What `metrics.csv` tells, as a picture: the losses over the steps, and what was found on the held-out images."""

import csv
from collections.abc import Sequence
from pathlib import Path

from idlefx.utils.files import whole_file

PLOT = "metrics.png"
SMOOTH = 20  # of this many parts of a run each is shown by its mean


def draw_metrics(directory: Path) -> None:
    """Draw the metrics of a run beside them; nothing where there are none.

    Raises:
        InputError: The picture cannot be written.
    """
    path = directory / "metrics.csv"
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(rows[0])
    losses = names[names.index("lr") + 1 : names.index("grad_norm")]
    measure, *further = names[names.index("images_per_s") + 1 :]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in losses:
        values = [float(row[name]) for row in rows]
        if any(values):
            steps, means = _means([int(row["step"]) for row in rows], values)
            left.plot(steps, [mean / (max(abs(means[0]), 1e-12)) for mean in means], label=name)
    left.set(xlabel="step", ylabel="loss, 1 at the beginning", title="training images")
    left.legend(fontsize=8)
    looked = [row for row in rows if row[measure]]
    steps, values = [int(row["step"]) for row in looked], [float(row[measure]) for row in looked]
    errors = [float(row[f"{measure}_error"]) for row in looked] if f"{measure}_error" in further else None
    if errors:
        steps, values, errors = [0, *steps], [1.0, *values], [0.0, *errors]  # by definition of the untuned model
        right.axhline(1.0, color="0.6", lw=1, ls="--")
    right.errorbar(steps, values, errors, fmt="o-", ms=4, capsize=3)
    right.set(
        xlabel="step",
        ylabel="distance to the dense model" if errors else f"{measure}, percent",
        title="held-out images",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with whole_file(directory / PLOT) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _means(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Both, averaged over parts of equal length."""
    size = max(1, len(values) // SMOOTH)
    parts = [slice(start, start + size) for start in range(0, len(values) - size + 1, size)]
    return [_mean(steps[part]) for part in parts], [_mean(values[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
