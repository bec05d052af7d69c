"""Rows of a batch as runtimes of ONNX copy them, as a whole and without scattering, and the sorting that they know."""

import torch
from torch import Tensor
from torch.nn.functional import embedding


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Each image's own tokens (B, n, C) of (B, N, C), or of (1, N, C) that serves all images."""
    images, tokens, _ = x.shape
    if isinstance(images, int) and images == 1:
        return embedding(index, x[0])
    first = torch.arange(images, device=x.device).unsqueeze(1) * tokens
    return embedding(index + first, x.flatten(0, 1))


def parted(ranking: Tensor, idle: Tensor, working: int) -> tuple[Tensor, Tensor]:
    """Put those that work in front.

    Args:
        ranking: All positions (B, N), in any order.
        idle: Which entries of it idle (N).
        working: W, how many do not.

    Returns:
        Positions of those that work and then of the others, ascending each, and where each position stands, (B, N).
    """
    count, places = ranking.shape[1], torch.arange(ranking.shape[1], device=ranking.device)
    ascending = (ranking + torch.where(idle, count, 0)).topk(count, dim=1, largest=False).values
    order = ascending - torch.where(places < working, 0, count)
    return order, turned(order)


def turned(order: Tensor) -> Tensor:
    """Where each position stands in an order (B, N)."""
    return order.topk(order.shape[1], dim=1, largest=False).indices
