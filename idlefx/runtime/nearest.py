"""Which tokens are most alike: all of them to anchors that are spread evenly, and idle ones to workers, by cosine."""

import math
from functools import reduce
from operator import add

import torch
from torch import Tensor

from idlefx.runtime import ops
from idlefx.runtime.gather_scatter import take_tokens

Anchors = tuple[int, int, int, int, int]  # see `anchors`


def anchors(tokens: int, kept: int) -> Anchors:
    """Which of M image tokens always work: A of them whose ranks are spread evenly, `A = min(⌈M / 6⌉, ⌈K / 3⌉)`.

    They are the ranks r with the smallest fractional part of r times the golden ratio. For M ranks or fewer these
    parts are in the order of `turn(r) = r * F(n-1) % F(n)`, where the Fibonacci number F(n) is M or more. So a graph
    needs no list of them: an anchor is a rank whose turn is below a bound, and turns can be turned back.

    Args:
        tokens: M, image tokens there are.
        kept: K, image tokens that work.

    Returns:
        How many there are, the bound of their turns, the factors that turn a rank and turn it back, and the modulus.
    """
    count = min(math.ceil(tokens / 6), math.ceil(kept / 3))
    factor, modulus = 1, 2
    while modulus < tokens:
        factor, modulus = modulus, factor + modulus
    turns = sorted(rank * factor % modulus for rank in range(tokens))
    return count, turns[count - 1] + 1, factor, pow(factor, -1, modulus), modulus


def are_anchors(positions: Tensor, prefix: tuple[int, ...], spread: Anchors) -> Tensor:
    """Which positions are those of anchors; what it says of prefix tokens means nothing."""
    _, bound, factor, _, modulus = spread
    before = reduce(add, ((positions > p).to(positions.dtype) for p in prefix), torch.zeros_like(positions))
    return (positions - before) * factor % modulus < bound


def likeness_to_anchors(unit: Tensor, prefix: tuple[int, ...], spread: Anchors) -> Tensor:
    """The largest cosine of each token to an anchor (B, N).

    Args:
        unit: Tokens of length one (B, N, C).
        prefix: Positions of the prefix tokens.
        spread: From `anchors`.
    """
    _, bound, _, back, modulus = spread
    images = unit.shape[1] - len(prefix)
    if ops.leads(prefix) and ops.runs_kernels(unit):
        try:
            likeness: Tensor = torch.ops.idlefx.likeness_to_anchors(unit, len(prefix), bound, back, modulus)
            return likeness
        except ops.BUILD_ERRORS as error:
            ops.do_without(unit.device, error)
    ranks = torch.arange(bound, device=unit.device) * back % modulus
    ranks = torch.where(ranks < images, ranks, 0)  # those there are not leave room to the first, which is an anchor
    found = reduce(add, ((ranks >= p - i).to(ranks.dtype) for i, p in enumerate(sorted(prefix))), ranks)
    return (unit @ take_tokens(unit, found.expand(unit.shape[0], -1)).mT).amax(-1)


def nearest_workers(unit: Tensor, order: Tensor, working: int, prefix: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The image worker with the largest cosine to each idle token, of equal ones the first.

    Args:
        unit: Tokens of length one (B, N, C).
        order: Positions of the workers, ascending, and of the idle tokens (B, N).
        working: W, how many workers there are, prefix tokens included.
        prefix: Positions of the prefix tokens, which are followed by nobody.

    Returns:
        The place of its worker among the workers for each idle token, in the order of `order` (B, I); and for each
        token, a worker's own being where it stands (B, N).
    """
    if working == order.shape[1]:  # nobody idles, as in a segment of one token
        return order[:, :0], order.argsort(dim=1)
    if ops.leads(prefix) and ops.runs_kernels(unit):
        try:
            found: tuple[Tensor, Tensor] = torch.ops.idlefx.nearest_workers(unit, order, working, len(prefix))
            return found
        except ops.BUILD_ERRORS as error:
            ops.do_without(unit.device, error)
    workers, idlers = order.narrow(1, 0, working), order.narrow(1, working, order.shape[1] - working)
    first = len(prefix) if ops.leads(prefix) else 0
    cosines = take_tokens(unit, idlers) @ take_tokens(unit, workers.narrow(1, first, working - first)).mT
    if not ops.leads(prefix):
        cosines = cosines.masked_fill(ops.are_prefix(workers, prefix).unsqueeze(1), -math.inf)
    leaders = cosines.argmax(-1) + first
    places = order.argsort(dim=1)
    return leaders, torch.where(places < working, places, leaders.gather(1, (places - working).clamp(min=0)))
