"""Tables, plot and picture of the study on the real model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from idlefx.data import scenes
from idlefx.demo.maps import draw_maps
from idlefx.demo.saliency import MEAN, STD
from idlefx.utils.files import whole_file

Result = dict[str, Any]
Runs = Callable[[str, int], Callable[[Tensor], dict[str, Tensor]]]
COLOURS = {
    "rest": "C3", "pruned": "C1", "ToMe": "C2", "follow, 3 stages": "C0", "follow, 6 stages": "C4",
    "follow, 6 stages, joined": "C6",
}  # fmt: skip
SHOWN = {"0.7": 1, "0.5": 3}  # the keep ratio of three stages: its level
COLUMNS = ("follow, 3 stages", "rest", "pruned")
SCENES = (0, 6, 13)


def tables(results: list[Result]) -> str:
    """Markdown tables for each image size: scenes, whole photographs, and times where they were taken."""
    parts = []
    for size in sorted({result["size"] for result in results}):
        of_size = [result for result in results if result["size"] == size]
        of_size.sort(key=lambda r: (r["method"] != "dense", r["level"], ["dense", *COLOURS].index(r["method"])))
        head = ["method", "how", "GMACs", "cosine", "agreement", "difference of saliency", "IoU"]
        body = [_cells(result) for result in of_size]
        dense = next(result for result in of_size if result["method"] == "dense")
        title = f"{size} pixels, {dense['scenes']} scenes; the classifier is right in {dense['accuracy']:.0%} of them:"
        parts.append(f"{title}\n\n{tabulate(body, head, tablefmt='github', disable_numparse=True)}")
        head = ["method", "GMACs", "cosine", "worst cosine", "difference of saliency"]
        body = [_cells_of_photographs(result) for result in of_size]
        title = f"{size} pixels, {dense['photographs']} whole photographs:"
        parts.append(f"{title}\n\n{tabulate(body, head, tablefmt='github', disable_numparse=True)}")
        for key in sorted({key for result in of_size for key in _time_keys(result)}):
            body = [(*_cells(r)[:4], *_speed(*r[key])) for r in of_size if key in r]
            head = ["method", "how", "GMACs", "cosine", key, "speed-up"]
            title = f"{size} pixels, the whole model compiled:"
            parts.append(f"{title}\n\n{tabulate(body, head, tablefmt='github', disable_numparse=True)}")
    return "\n\n".join(parts) + "\n"


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result["method"], result["saving"], f"{result['gmacs']:.2f}", f"{result['cosine']:.4f}",
        f"{result['agreement']:.1%}", f"{result['difference']:.4f}", f"{result['iou']:.3f}",
    )  # fmt: skip


def _cells_of_photographs(result: Result) -> tuple[str, ...]:
    cosine, worst, difference = (result[f"photographs' {name}"] for name in ("cosine", "worst cosine", "difference"))
    return result["method"], f"{result['gmacs']:.2f}", f"{cosine:.4f}", f"{worst:.3f}", f"{difference:.4f}"


def _speed(ms: float, dense_ms: float) -> tuple[str, str]:
    return f"{ms:.1f}", f"{dense_ms / ms:.2f}×"


def draw(results: list[Result], path: Path) -> None:
    """Over multiply-adds the direction of the feature and the overlap with the thing, over time the former again."""
    sizes = sorted({result["size"] for result in results})
    figure, shown = Figure(figsize=(13, 3.6 * len(sizes)), layout="constrained"), dict[str, Any]()
    for (left, middle, right), size in zip(figure.subplots(len(sizes), 3, squeeze=False), sizes, strict=True):
        of_size = [result for result in results if result["size"] == size]
        for method, colour in COLOURS.items():
            found = sorted((r for r in of_size if r["method"] == method), key=lambda r: r["gmacs"])
            style: dict[str, Any] = {"color": colour, "ms": 4, "label": method}
            gmacs, lost = [r["gmacs"] for r in found], [1 - r["cosine"] for r in found]
            left.semilogy(gmacs, lost, "o-", **style)
            middle.plot(gmacs, [r["iou"] for r in found], "o-", **style)
            timed = [r for r in found if _time_keys(r)]
            right.semilogy([r[_time_keys(r)[0]][0] for r in timed], [1 - r["cosine"] for r in timed], "o", **style)
        dense = next(r for r in of_size if r["method"] == "dense")
        middle.plot(dense["gmacs"], dense["iou"], "k*", ms=10, label="dense")
        taken = next((_time_keys(r)[0] for r in of_size if _time_keys(r)), "ms: not taken")
        lost_label = "1 − cosine to the dense feature"
        left.set(xlabel="GMACs of the blocks", ylabel=lost_label, title=f"{size} pixels")
        middle.set(xlabel="GMACs of the blocks", ylabel="IoU of saliency and thing", title=f"{size} pixels")
        right.set(xlabel=f"{taken}, the whole model compiled", ylabel=lost_label, title=f"{size} pixels, one budget")
        for axes in (left, middle, right):
            axes.grid(alpha=0.3)
        shown |= dict(zip(*reversed(middle.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside lower center", ncols=len(shown))
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _time_keys(result: Result) -> list[str]:
    return sorted(key for key in result if key.startswith("ms"))


@torch.inference_mode()
def picture(path: Path, dense: Callable[[Tensor], dict[str, Tensor]], runs: Runs) -> None:
    """Photograph, saliency of the dense model and of the others, side by side."""
    images = scenes(max(SCENES) + 1, split="test").images[list(SCENES)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    photographs = (images * std + mean).permute(0, 2, 3, 1).numpy()
    runs_of = {"dense": dense}
    runs_of |= {f"{name.split(',')[0]}, {keep}": runs(name, level) for keep, level in SHOWN.items() for name in COLUMNS}
    draw_maps(path, photographs, {name: run(images)["saliency"][:, 0].numpy() for name, run in runs_of.items()})
