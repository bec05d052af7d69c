"""A small encoder that is no classifier, its idling twins, and pictures to tune them on without labels."""

from copy import deepcopy
from functools import cache

import torch
from torch import nn

import idlefx
from tests.models.colours import SIDE, Colours, vit

IMAGES = torch.stack([Colours(64, 0.0)[index][0] for index in range(64)])
TRAIN, VAL = list(IMAGES[:40].split(8)), list(IMAGES[40:].split(8))
EXAMPLE = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Features, tokens, a map, and whole numbers; no classifier."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.vit, self.scale = vit(num_classes=0), scale

    def forward(self, x: torch.Tensor) -> dict:
        tokens = self.vit.forward_features(x)
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        highest = grid.flatten(1).argmax(1)
        return {"feature": tokens[:, 0], "tokens": tokens[:, 1:], "map": self.scale * grid[:, :2], "highest": highest}


@cache
def _converted(idle, scale, keep, schedule):
    dense = Encoder(scale).eval()
    return dense, idlefx.convert(dense, [1], keep, schedule=schedule, idle=idle, example_inputs=EXAMPLE)


def pair(idle="rest", *, scale=1.0, keep=0.4, schedule="stages"):
    """An encoder and its idling twin, fresh."""
    return deepcopy(_converted(idle, scale, keep, schedule))
