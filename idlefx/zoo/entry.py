"""What a row of the compatibility table is made of: a model that is built small, with random parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3
Inputs = Tensor | dict[str, Any]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the table.

    Attributes:
        label: What the table calls it.
        family: The library, and the file or class in it.
        build: Makes it, untrained.
        blocks: How many blocks it has; None where that is not the point.
        refused: What the reasons of those that cannot idle say, a regular expression; empty where all can.
        inputs: Makes a batch, a tensor or keyword inputs; guessed from the model if None.
    """

    label: str
    family: str
    build: Callable[[], nn.Module]
    blocks: int | None = DEPTH
    refused: str = ""
    inputs: Callable[[int], Inputs] | None = None

    def make(self) -> nn.Module:
        """The model with random parameters, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        return randomise(model).eval()


def images(batch: int, side: int = 40) -> Tensor:
    """Noise over a colour of its own for each image, so that images and their tokens are told apart."""
    return torch.randn(batch, 3, 1, 1) + torch.randn(batch, 3, side, side)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters, with activations of order one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 2 and parameter.shape[0] == 1:  # class tokens, registers, position embeddings
            parameter.copy_(0.5 * noise)
        elif parameter.ndim > 1:
            gain = 2 if parameter.ndim == 4 else 1  # convolutions stand before rectifiers
            parameter.copy_(noise * (gain / parameter[0].numel()) ** 0.5)
        elif parameter.numel() > 1 and not parameter.any():
            parameter.copy_(0.2 * noise)
        elif parameter.numel() > 1:
            parameter.copy_(0.8 + 0.2 * noise)
    return model
