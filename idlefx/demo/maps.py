"""A picture of what the real model sees, and of what it sees where tokens are saved: saliency over photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from idlefx.utils.files import whole_file

INCHES = 1.5  # side of one image
MAP = 0.65  # part of the colours that is the map's, not the photograph's


def draw_maps(
    path: Path, photographs: Sequence[NDArray[np.float32]], maps: Mapping[str, Sequence[NDArray[np.float32]]]
) -> Path:
    """Draw a row for each photograph: itself, and each map over it in grey.

    Args:
        path: The picture, a PNG.
        photographs: (S, S, 3), from 0 to 1.
        maps: By heading, one for each photograph, (S, S), from 0 to 1.
    """
    figure = Figure(figsize=(INCHES * (1 + len(maps)), 1.08 * INCHES * len(photographs)), layout="constrained")
    grid = figure.subplots(len(photographs), 1 + len(maps), squeeze=False)
    columns = {"": photographs, **{name: list(map(_over, photographs, drawn)) for name, drawn in maps.items()}}
    for place, (heading, images) in enumerate(columns.items()):
        grid[0, place].set_title(heading, size=9)
        for axes, image in zip(grid[:, place], images, strict=True):
            axes.imshow(np.clip(image, 0, 1))
            axes.set_axis_off()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path


def _over(photograph: NDArray[np.float32], drawn: NDArray[np.float32]) -> NDArray[np.float32]:
    colours: NDArray[np.float32] = colormaps["inferno"](drawn)[..., :3]
    return (1 - MAP) * photograph.mean(-1, keepdims=True) + MAP * colours
