"""What a bench found, as a picture: speed-up over the ratio of multiply-adds, whose diagonal is the limit."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from idlefx.bench.results import DENSE, IDLE, Bench, speed_up
from idlefx.errors import InputError
from idlefx.utils.files import whole_file

FORMATS = ("png", "pdf", "svg")
SIZE, DPI = (6.4, 4.8), 200
MARKERS = "osD^vPX*"


def check_chart(path: str | Path) -> str:
    """The format that the suffix of a path names.

    Raises:
        InputError: It names none.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise InputError(f"plot: cannot tell the format of {path}; let its name end in .{', .'.join(FORMATS)}")
    return form


def plot(benches: Sequence[Bench], path: str | Path) -> Path:
    """A point for each model, keep ratio and batch size: the best compiled against the best compiled dense model.

    Where nothing was compiled, eager stands against eager. Colours tell batch sizes apart, markers models; peers
    are hollow.

    Args:
        benches: What was measured.
        path: Where to; its suffix chooses PNG, PDF or SVG.

    Raises:
        InputError: The path cannot be written or its suffix is another.
    """
    form = check_chart(path)
    with whole_file(path) as partial:
        figure(benches).savefig(partial, format=form, dpi=DPI)
    return Path(path)


def figure(benches: Sequence[Bench]) -> Figure:
    """The picture itself."""
    picture = Figure(figsize=SIZE, layout="constrained")
    axes = picture.add_subplot()
    batches = sorted({t.batch for b in benches for t in b.timings})
    models = list(dict.fromkeys(_model(b) for b in benches))
    colours = {batch: colormaps["viridis"](0.9 * i / max(1, len(batches) - 1)) for i, batch in enumerate(batches)}
    markers = {model: MARKERS[i % len(MARKERS)] for i, model in enumerate(models)}
    furthest = 1.1
    for bench in benches:
        for batch, name, gained in points(bench):
            limit, fill = bench.limit(name), "full" if name == IDLE else "none"
            furthest = max(furthest, limit, gained)
            axes.plot(limit, gained, markers[_model(bench)], color=colours[batch], fillstyle=fill)
    axes.plot([1, furthest], [1, furthest], "--", color="grey", lw=1)
    axes.axhline(1, color="grey", lw=0.5)
    axes.set_xlabel("GMACs of the dense model / GMACs")
    axes.set_ylabel("speed-up over the dense model")
    key = [Line2D([], [], color="grey", ls="--", lw=1, label="limit")]
    key += [Line2D([], [], color=c, marker="s", ls="", label=f"batch {batch}") for batch, c in colours.items()]
    key += [Line2D([], [], color="black", marker=m, ls="", label=model) for model, m in markers.items()]
    peers = dict.fromkeys(n for b in benches for n in b.gmacs if n not in (DENSE, IDLE))
    key += [Line2D([], [], color="black", marker="o", ls="", fillstyle="none", label=name) for name in peers]
    axes.legend(handles=key, fontsize="small", frameon=False, loc="upper left")
    axes.set_title("\n".join(dict.fromkeys(b.machine for b in benches)), fontsize="small")
    return picture


def points(bench: Bench) -> list[tuple[int, str, float]]:
    """Batch size, name and speed-up of every model that was timed against the dense one."""
    return [(batch, name, speed_up(dense.ms[DENSE], other.ms[name])) for batch, name, dense, other in bench.finals()]


def _model(bench: Bench) -> str:
    return bench.title.partition(",")[0]
