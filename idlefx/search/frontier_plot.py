"""What a search found, as a picture: change over cost, and below it the picture that suffers most."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from idlefx.bench.plot import DPI, check_chart
from idlefx.search.proposal import Findings, Point, said
from idlefx.search.worst_picture import WorstPicture
from idlefx.utils.files import whole_file

WIDTH, HEIGHT = 9.0, 6.4  # inches
TITLE = 38  # letters that fit above the photograph


def draw_findings(findings: Findings, worst: WorstPicture, path: str | Path) -> Path:
    """Draw the frontier and the picture that is changed most.

    Args:
        findings: Of a search.
        worst: The picture.
        path: Where to; its suffix chooses PNG, PDF or SVG.

    Raises:
        InputError: The path cannot be written or its suffix is another.
    """
    form = check_chart(path)
    with whole_file(path) as partial:
        figure(findings, worst).savefig(partial, format=form, dpi=DPI)
    return Path(path)


def figure(findings: Findings, worst: WorstPicture) -> Figure:
    """The picture itself."""
    picture = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    above, below = picture.subfigures(2, 1, squeeze=False)[:, 0]
    costs = {"GMACs": ([point.gmacs for point in findings.frontier], findings.dense_gmacs)}
    if findings.dense_ms is not None:
        costs["predicted ms"] = ([point.ms or 0.0 for point in findings.frontier], findings.dense_ms)
    panels = above.subplots(1, len(costs), squeeze=False)[0]
    for axes, (label, (values, dense)) in zip(panels, costs.items(), strict=True):
        _frontier(axes, findings.frontier, findings.chosen, values, dense)
        axes.set_xlabel(label)
    panels[0].set_ylabel("change (1 − cosine)")
    panels[0].legend(frameon=False, fontsize="small")
    _worst(below.subplots(1, 3), worst)
    return picture


def _frontier(axes: Axes, points: Sequence[Point], chosen: Point, costs: Sequence[float], dense: float) -> None:
    changes = [point.change for point in points]
    axes.plot(costs, changes, "o-", color="tab:blue", lw=1, label="plans of this shape")
    at = points.index(chosen)
    axes.plot(costs[at], changes[at], "*", color="tab:red", ms=14, label="chosen")
    axes.axvline(dense, color="grey", ls="--", lw=1, label="dense")
    if all(change > 0 for change in changes):
        axes.set_yscale("log")


def _worst(panels: Sequence[Axes], worst: WorstPicture) -> None:
    image = worst.image.float()
    low, high = image.amin(), image.amax()
    shown = (image - low) / (high - low).clamp(min=1e-12)
    _show(panels[0], shown.permute(1, 2, 0) if len(shown) == 3 else shown.flatten(0, -3)[:1].squeeze(0))
    panels[0].set_title(fill(f"changed most: {Path(said(worst.name)).name}", TITLE), fontsize="small")
    both = (worst.dense.float(), worst.idle.float())
    titles = (f"dense: {worst.output}", f"idle: {worst.output}, cosine {worst.cosine:.4f}")
    for axes, output, title in zip(panels[1:], both, titles, strict=True):
        axes.set_title(title, fontsize="small")
        plane = _plane(output)
        if plane is None:
            axes.plot(output.flatten().numpy(), lw=0.7)
        else:
            _show(axes, plane, (float(both[0].min()), float(both[0].max())))


def _plane(output: Tensor) -> Tensor | None:
    """A map over the image, the mean of its channels; None where the output is none."""
    if output.ndim < 2 or min(output.shape[-2:]) < 2:
        return None
    return output.reshape(-1, *output.shape[-2:]).mean(0)


def _show(axes: Axes, image: Tensor, limits: tuple[float | None, float | None] = (None, None)) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=limits[0], vmax=limits[1])
    axes.set_axis_off()
