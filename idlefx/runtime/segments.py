"""Choose the tokens that work in each segment of a sequence, or group tokens in each."""

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from idlefx.runtime import ops
from idlefx.runtime.following import group_tokens
from idlefx.runtime.nearest import Anchors, anchors

Alike = tuple[int, int, int, Anchors]


def choose_in_segments(
    scores: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...], among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the highest scores of each segment; a tie goes to the lower position.

    Args:
        scores: A score per token (B, N), the segments one after the other.
        lengths: How many tokens each segment has.
        kept: K of each.
        among: Positions (B, n) to choose from, at least K of each segment; all if None.

    Returns:
        Positions (B, sum of K) of those that work, ascending; and for each token where it stands, first those that
        work and then those that idle (B, N).
    """
    if among is not None:
        scores = ops.rank_among(scores, among)
    count, device = scores.shape[1], scores.device
    starts = torch.tensor((0, *accumulate(lengths))[:-1], device=device)
    positions = torch.arange(count, device=device)
    segment = (positions.unsqueeze(1) >= starts).sum(1) - 1
    order = ops.descending(scores)
    # The highest first within each segment: tokens of a segment stand together again, where the segment stands.
    order = order.gather(1, (segment[order] * count + positions).sort(dim=1).values % count)
    works = positions - starts[segment] < torch.tensor(kept, device=device)[segment]
    order = torch.where(works, order, order + count).sort(dim=1).values
    return order.narrow(1, 0, sum(kept)), (order % count).argsort(dim=1)


def alike_of(lengths: Sequence[int], kept: Sequence[int]) -> tuple[Alike, ...]:
    """Neighbouring segments that are equally long: how many, the tokens of each, K of each, and the anchors of each."""
    together = [(sizes, len(list(same))) for sizes, same in groupby(zip(lengths, kept, strict=True))]
    return tuple((count, size, few, anchors(size, few)) for (size, few), count in together)


def group_in_segments(x: Tensor, alike: tuple[Alike, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Form groups in each segment as if it were an image; see `following.group_tokens`.

    Args:
        x: What the likeness is of (B, N, C), the segments one after the other.
        alike: From `alike_of`.

    Returns:
        Positions of the workers, ascending (B, W); for each token the place of its worker among these (B, N);
        positions of the workers and then of the idle tokens, ascending (B, N); and for each idle one the place of its
        worker (B, I).
    """
    parts: list[tuple[Tensor, ...]] = []
    batch, start, worker = x.shape[0], 0, 0
    for count, size, few, spread in alike:
        each = x.narrow(1, start, count * size).reshape(-1, size, x.shape[2])  # (B * count, size, C)
        workers, places, order, leaders = group_tokens(each, None, (), few, spread)
        numbers = torch.arange(count, device=x.device).repeat(batch).unsqueeze(1)
        tokens_before, workers_before = start + numbers * size, worker + numbers * few
        told = (
            workers + tokens_before,
            places + workers_before,
            order[:, few:] + tokens_before,
            leaders + workers_before,
        )
        parts.append(tuple(values.reshape(batch, -1) for values in told))
        start, worker = start + count * size, worker + count * few
    index, place, idle, leaders = (torch.cat(values, 1) for values in zip(*parts, strict=True))
    return index, place, torch.cat([index, idle], 1), leaders
