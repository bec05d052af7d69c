"""Draw docs/how_it_works.png: lanes of tokens through three blocks, and the steps inside one."""

from pathlib import Path

import numpy as np
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

TARGET = Path(__file__).parent.parent / "docs" / "how_it_works.png"
INK, QUIET, WORK, CLASS, PAPER = "#22303c", "#aab4be", "#2f7fb8", "#d9902f", "#eef3f7"
BLOCKS = ("block 3", "block 4", "block 5", "block 6")
WORKING = ({1, 2, 4, 5, 7, 8}, {1, 2, 4, 5, 6, 8}, {0, 1, 4, 5, 7, 8}, {1, 4, 5, 7})  # of nine image tokens
NOTE = {"color": INK, "size": 8, "style": "italic", "va": "center"}
STEPS = (
    ("score", "class query · keys:\none vector per image,\nso nearly free"),
    ("choose", "the K highest,\nprefix always,\npositions ascending"),
    ("gather", "P + K of N tokens,\npositional tables\nat their old places"),
    ("block", "attention and MLP,\nas they were,\non fewer tokens"),
    ("put back", "working tokens updated,\nidle ones bit-identical,\nnone dropped"),
)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = "none") -> None:
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.12", fc=colour, ec=edge, lw=0.8)
    axes.add_patch(shape)


def lanes(axes: Axes, patches: list[np.ndarray]) -> None:
    """One lane per token: a filled cell where it works, a bare line where it idles."""
    lane_y = [9.0, *(8.1 - 0.8 * i for i in range(9))]  # the class token, then the image tokens
    end = 2.3 + 3.5 * len(BLOCKS)
    for y in lane_y:
        axes.plot((1.4, end), (y, y), color=QUIET, lw=1.0, zorder=0)
    box(axes, 0.62, lane_y[0] - 0.33, 0.72, 0.66, CLASS)
    axes.text(0.98, lane_y[0], "cls", color="white", size=7, ha="center", va="center")
    for y, patch in zip(lane_y[1:], patches, strict=True):
        axes.imshow(patch, extent=(0.62, 1.34, y - 0.36, y + 0.36), aspect="auto", zorder=2)
    for number, (name, working) in enumerate(zip(BLOCKS, WORKING, strict=True)):
        x = 2.3 + 3.5 * number
        box(axes, x, lane_y[-1] - 0.55, 2.4, lane_y[0] - lane_y[-1] + 1.1, PAPER, QUIET)
        axes.text(x + 1.2, lane_y[0] + 1.12, name, color=INK, size=9, ha="center", weight="bold")
        axes.text(x + 1.2, lane_y[0] + 0.74, f"{len(working)} of 9 work", color=INK, size=7, ha="center")
        for token, y in enumerate(lane_y, start=-1):
            if token < 0 or token in working:
                box(axes, x + 0.3, y - 0.27, 1.8, 0.54, CLASS if token < 0 else WORK)
            else:
                axes.plot((x, x + 2.4), (y, y), color=QUIET, lw=1.0)
    axes.text(end + 0.15, lane_y[5], "no token\nis dropped", color=INK, size=8, va="center")
    axes.text(
        2.3,
        lane_y[-1] - 0.98,
        "an idle token passes the block unchanged and may work again in a later one",
        **NOTE,
    )


def steps(axes: Axes) -> None:
    """What an idling block does, from left to right."""
    axes.text(0.62, -0.5, "inside an idling block", **NOTE)
    for number, (name, words) in enumerate(STEPS):
        x, y = 0.62 + 3.56 * number, -2.6
        box(axes, x, y, 2.96, 1.75, PAPER, QUIET)
        axes.text(x + 1.48, y + 1.44, name, color=INK, size=9, ha="center", va="center", weight="bold")
        axes.text(x + 1.48, y + 0.66, words, color=INK, size=6.6, ha="center", va="center", linespacing=1.3)
        if number:
            arrow = FancyArrowPatch((x - 0.58, y + 0.87), (x - 0.02, y + 0.87), arrowstyle="-|>", mutation_scale=8)
            arrow.set_color(INK)
            axes.add_patch(arrow)


def main() -> None:
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).crop((56, 0, 456, 400))
    pixels = np.asarray(photo.resize((360, 360)))
    patches = [pixels[r : r + 120, c : c + 120] for r in (0, 120, 240) for c in (0, 120, 240)]
    figure = Figure(figsize=(8.8, 6.2))
    axes = figure.add_axes((0, 0, 1, 1))
    lanes(axes, patches)
    steps(axes)
    axes.set(xlim=(0.4, 18.1), ylim=(-2.8, 10.55))
    axes.set_axis_off()
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=200)
    print(TARGET)


if __name__ == "__main__":
    main()
