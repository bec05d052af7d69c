"""Which input of a graph holds the images, and in what form."""

import math

import torch
from torch import fx

from idlefx.errors import BlockError
from idlefx.graph.queries import placeholders, value
from idlefx.graph.sizes import shape_of


def image_input(graph: fx.Graph) -> fx.Node:
    """The input that the tokens are made of: the largest one of floating point, or of bytes as in a picture's file.

    Raises:
        BlockError: There is none.
    """
    inputs = [p for p in placeholders(graph) if (v := value(p)) is not None and _holds_pixels(v)]
    if not inputs:
        raise BlockError("blocks: the model has no input of floating point or uint8, so no image to take tokens from")
    return max(inputs, key=lambda p: (math.prod(shape_of(p)), p.meta["val"].is_floating_point()))


def takes_bytes(graph: fx.Graph) -> bool:
    """Whether images go in as they stand in their files, and the model normalises them itself."""
    return image_input(graph).meta["val"].dtype == torch.uint8


def _holds_pixels(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8
