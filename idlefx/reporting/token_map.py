"""Pictures of what works and what idles: working patches as they are, idle ones faded or in their worker's colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from idlefx.analysis.image_input import takes_bytes
from idlefx.errors import InputError
from idlefx.reporting.images import Photo, Pixels, read_images
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.runtime.selections import groups
from idlefx.utils.files import whole_file

Grid = NDArray[np.int64]

FORMATS = ("png", "pdf", "svg")
DPI = 300
MOST_COLUMNS = 10
# Inches: width of a panel, room between panels, room for a caption, room between images, margin.
PANEL, GAP, CAPTION, APART, MARGIN = 1.15, 0.07, 0.30, 0.14, 0.04
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
FADED = 0.30  # contrast that is left of an idle patch


@dataclass(frozen=True)
class TokenMap:
    """One image of the picture.

    Attributes:
        pixels: (height, width, 3), between 0 and 1.
        workers: For each idling block, or stage of blocks, its grid of patches (rows, columns), each with the number of
            the one that works for it: its own where it works, -1 where it rests.
    """

    pixels: Pixels
    workers: dict[str, Grid]


def draw(idle: IdleModule, images: Photo | Sequence[Photo] | Tensor, path: str | Path) -> Path:
    """Draw which patches of each image work in each idling block, and what the others do.

    Where tokens rest, idle patches are grey and pale. Where they follow, each is in the mean colour of its worker, and
    a line runs around those that go together.

    Args:
        idle: The converted model.
        images: Photographs, as files or PIL images, cropped and normalised as the model's data configuration
            says; or a tensor (B, C, H, W) of the model's size, `uint8` for pixels, floating point for what
            the model takes, normalised already.
        path: Where to; its suffix chooses PNG, PDF or SVG.

    Returns:
        The path.

    Raises:
        InputError: An image cannot be read or does not fit, `path` cannot be written, or no token idles.
    """
    target = Path(path)
    form = target.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise InputError(f"draw: cannot tell the format of {target}; let its name end in .{', .'.join(FORMATS)}")
    if not any(step.idles for step in conversion_of(idle).plan):
        raise InputError("draw: no token of this model idles; convert it with a keep ratio below 1")
    with whole_file(target) as partial:
        samples = read_images(images, conversion_of(idle).facts, as_bytes=takes_bytes(idle.graph))
        bar = tqdm(samples, desc="draw", unit="image", delay=2, leave=False)
        rows = [TokenMap(pixels, _workers(idle, batch)) for pixels, batch in bar]
        if not rows:
            raise InputError("draw: there are no images to draw")
        _figure(rows).savefig(partial, format=form, dpi=DPI)
    return target


def _workers(idle: IdleModule, batch: Tensor) -> dict[str, Grid]:
    weight = next((p for p in idle.parameters() if p.is_floating_point()), batch)
    images = batch.to(weight.device, weight.dtype if batch.is_floating_point() else batch.dtype)
    leaders, workers = groups(idle, images), dict[str, Grid]()
    for first, *others in conversion_of(idle).plan.stages:  # the blocks of a stage have the same workers
        block = conversion_of(idle).blocks[first.block]
        if not block.over_image or len(block.grid) > 2:
            raise InputError(f"draw: the tokens of block {first.block} ({block.path}) form no grid over the image")
        patch = torch.full((block.tokens + 1,), -1)  # the last one for those that rest
        patch[torch.tensor(block.image_positions)] = torch.arange(block.image_tokens)
        numbers = patch[leaders[first.block][0].cpu()][torch.tensor(block.image_positions)]
        name = f"blocks {first.block}–{others[-1].block}" if others else f"block {first.block}"
        workers[name] = numbers.reshape(block.grid or _grid(block.image_tokens, *batch.shape[-2:])).numpy()
    return workers


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches that an image of so many pixels was cut into."""
    rows = math.isqrt(tokens * height // width)
    if rows * rows * width == tokens * height:
        return rows, tokens // rows
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    raise InputError(f"draw: {tokens} image tokens form no grid over {height} × {width} pixels")


def _figure(rows: Sequence[TokenMap]) -> Figure:
    """Set the rows: the image, then its blocks, on as many lines as keep them legible."""
    blocks = len(rows[0].workers)
    lines = math.ceil(blocks / MOST_COLUMNS)
    columns = math.ceil(blocks / lines)
    height, width = PANEL * rows[0].pixels.shape[0] / rows[0].pixels.shape[1], PANEL
    caption = CAPTION if lines > 1 else 0  # a single line is captioned once, at the top
    step_x, step_y = width + GAP, height + caption + GAP
    scale = 1 if lines == 1 else (step_y + height) / height  # the image stands as high as two lines
    left, top = MARGIN + scale * width + 2 * GAP, MARGIN + CAPTION
    row_step = (lines - 1) * step_y + height + caption + APART
    total = (left + columns * step_x - GAP + MARGIN, top + len(rows) * row_step - caption - APART + MARGIN)
    figure = Figure(figsize=total)

    def panel(x: float, y: float, size: float, image: Pixels) -> Axes:
        box = (
            x / total[0],
            1 - (y + size * height) / total[1],
            size * width / total[0],
            size * height / total[1],
        )
        axes = figure.add_axes(box)
        axes.imshow(image, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        return axes

    for number, row in enumerate(rows):
        y = top + number * row_step
        first = panel(MARGIN, y, scale, row.pixels)
        if number == 0:
            _caption(first, "image", f"{next(iter(row.workers.values())).size} patches")
        for place, (name, workers) in enumerate(row.workers.items()):
            line, column = divmod(place, columns)
            axes = panel(left + column * step_x, y + line * step_y, 1, _faded(row.pixels, workers))
            _edges(axes, workers, row.pixels.shape)
            if number == 0 or lines > 1:
                _caption(axes, name, f"{_working(workers)} of {workers.size}")
    return figure


def _working(workers: Grid) -> int:
    """How many patches work."""
    return int((workers == np.arange(workers.size).reshape(workers.shape)).sum())


def _caption(axes: Axes, title: str, detail: str) -> None:
    for text, size, colour, lift in ((title, 7.5, "black", 10.5), (detail, 6.5, "0.35", 2.5)):
        axes.annotate(
            text,
            (0.5, 1),
            xycoords="axes fraction",
            xytext=(0, lift),
            textcoords="offset points",
            size=size,
            color=colour,
            ha="center",
        )


def _faded(pixels: Pixels, workers: Grid) -> Pixels:
    """The image with its resting patches grey and pale, and those that follow in the mean colour of their worker."""
    patch = np.ix_(*[np.arange(n) * cells // n for n, cells in zip(pixels.shape, workers.shape, strict=False)])
    own = np.arange(workers.size).reshape(workers.shape)
    grey = (pixels @ LUMINANCE)[..., None]
    idle = 1 - FADED * (1 - grey)
    if (workers >= 0).any():
        inside = own[patch].ravel()
        sums = np.stack(
            [np.bincount(inside, channel.ravel(), workers.size) for channel in np.moveaxis(pixels, 2, 0)], 1
        )
        means = sums / np.bincount(inside, minlength=workers.size)[:, None]
        idle = np.where((workers >= 0)[patch][..., None], means[workers.clip(0)][patch], idle)
    faded: Pixels = np.where((workers == own)[patch][..., None], pixels, idle).astype(np.float32)
    return faded


def _edges(axes: Axes, workers: Grid, shape: tuple[int, ...]) -> None:
    """A thin line between neighbours that do not go together, but for two that work alone."""
    cell = np.array([shape[1] / workers.shape[1], shape[0] / workers.shape[0]])  # x, y
    numbers, sizes = np.unique(workers, return_counts=True)
    alone = np.isin(workers, numbers[(sizes == 1) & (numbers >= 0)])
    below = np.argwhere((workers[1:] != workers[:-1]) & ~(alone[1:] & alone[:-1]))
    right = np.argwhere((workers[:, 1:] != workers[:, :-1]) & ~(alone[:, 1:] & alone[:, :-1]))
    lines = [((x, y + 1), (x + 1, y + 1)) for y, x in below] + [((x + 1, y), (x + 1, y + 1)) for y, x in right]
    edges = [np.array(line) * cell for line in lines]
    axes.add_collection(LineCollection(edges, colors="0.25", linewidths=0.35, capstyle="projecting"), False)
