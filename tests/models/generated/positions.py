"""Where the tokens of a generated model stand, and rotation by it.

Shapes: N tokens, prefix included, D head width.
"""

import torch
from torch import Tensor

from tests.models.generated.config import Config


def coordinates(config: Config) -> Tensor:
    """Row and column of every token (N, 2), the prefix at (0, 0)."""
    rows, columns = config.grid
    places = torch.zeros(config.tokens, 2)
    image = torch.cartesian_prod(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
    places[config.image_start : config.image_start + config.image_tokens] = image
    return places


def relative_index(config: Config) -> Tensor:
    """Which entry of a relative bias table serves each pair of tokens (N, N); the last one serves the prefix."""
    rows, columns = config.grid
    places = coordinates(config).long()
    step = places[:, None] - places[None]
    index = (step[..., 0] + rows - 1) * (2 * columns - 1) + step[..., 1] + columns - 1
    image = places[:, 0] > 0
    return torch.where(image[:, None] & image[None], index, (2 * rows - 1) * (2 * columns - 1))


def angles(places: Tensor, head_width: int) -> Tensor:
    """Rotary angles (…, D / 2) of places (…, 2)."""
    frequencies = 3.0 ** -torch.arange(head_width // 2, device=places.device)
    return (places[..., :1] + 0.5 * places[..., 1:]) * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features (…, D), one from each half, by given angles (…, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_complex(x: Tensor, turn: Tensor) -> Tensor:
    """Turn neighbouring features (…, D) by complex numbers (…, D / 2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)
