"""Idling in the towers of `tests.models.packed`, written from the definition with only the working tokens in a block.

A segment has L tokens, of which K = max(1, floor(keep * L)) work; a sequence (N, C) has one segment after the other.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tests.models.packed import EACH, HEADS, Block, Tower
from tests.oracles import following


class Result(NamedTuple):
    """What the model returns, who works in each block, ascending, and the smallest gap of a choice."""

    output: Tensor
    working: dict[int, Tensor]
    margin: float


def share(keep: float, count: int) -> int:
    """How many of so many tokens work."""
    return max(1, math.floor(keep * count + 1e-9))


def projected(block: Block, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (H, n, D) of tokens that stand at these positions."""

    def of(layer: torch.nn.Linear, heads: int, turns: bool) -> Tensor:
        each = layer(x).reshape(len(x), heads, EACH).permute(1, 0, 2).repeat_interleave(HEADS // heads, 0)
        if turns and block.angles is not None:
            cos, sin = block.angles[at].cos(), block.angles[at].sin()
            a, b = each[..., : EACH // 2], each[..., EACH // 2 :]
            each = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return each

    heads = block.key_heads
    return of(block.query, HEADS, True), of(block.key, heads, True), of(block.value, heads, False)


def work(block: Block, x: Tensor, at: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The block on tokens (n, C) that stand at these ascending positions, each for so many."""

    def attention(x: Tensor) -> Tensor:
        q, k, v = projected(block, x, at)
        logits = q @ k.mT * EACH**-0.5
        if block.bias is not None:
            logits = logits + block.bias[:, at][:, :, at]
        if sizes is not None:
            logits = logits + sizes.log()
        segment = torch.repeat_interleave(torch.arange(len(block.lengths)), torch.tensor(block.lengths))[at]
        logits = logits.masked_fill(segment[:, None] != segment, -math.inf)
        return block.out((logits.softmax(-1) @ v).permute(1, 0, 2).flatten(1))

    if block.post_norm:
        x = block.norm(x + attention(x))
        return block.norm2(x + block.mlp(x))
    x = x + attention(block.norm(x))
    return x + block.mlp(block.norm2(x))


def spans(lengths: Sequence[int]) -> list[slice]:
    return [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]


def choose(block: Block, x: Tensor, keep: float) -> tuple[Tensor, float]:
    """Positions of the tokens that work, by the logits of the mean query of their segment."""
    q, k, _ = projected(block, x if block.post_norm else block.norm(x), torch.arange(len(x)))
    chosen, gaps = [], [math.inf]
    for span in spans(block.lengths):
        scores = (q[:, span].mean(1, keepdim=True) * k[:, span]).sum(-1).mean(0)
        kept, (best, order) = share(keep, len(scores)), scores.sort(descending=True, stable=True)
        chosen.append(order[:kept].sort().values + span.start)
        if kept < len(scores):
            gaps.append(float(best[kept - 1] - best[kept]))
    return torch.cat(chosen), min(gaps)


def rest(model: Tower, keeps: Mapping[int, float], patches: Tensor) -> Result:
    """Patches (N, 12) where in these blocks so large a share of each segment works, and the others rest."""
    x, working, margins = model.patches(patches) + model.positions, {}, [math.inf]
    for index, block in enumerate(model.blocks):
        chosen, margin = choose(block, x, keeps.get(index, 1.0))
        x = x.index_copy(0, chosen, work(block, x[chosen], chosen))
        if index in keeps:
            working[index], margins = chosen, [*margins, margin]
    return Result(model.head(model.norm(x)), working, min(margins))


def follow(model: Tower, stages: Sequence[tuple[range, float]], patches: Tensor, *, joins: bool = False) -> Result:
    """Patches (N, 12) where groups are formed in each segment once a stage, and its blocks run on their means.

    Args:
        model: The tower.
        stages: Which blocks, and the share of each segment that works; blocks outside see all tokens.
        patches: Those of all images.
        joins: Whether each stage joins groups of the one before instead of forming them anew.
    """
    x, working, margins = model.patches(patches) + model.positions, {}, [math.inf]
    begun: list[tuple[Tensor, Tensor, Tensor]] = []  # what was averaged, means, and who goes with whom
    at, sizes, stream = torch.arange(len(x)), torch.ones(len(x)), x
    for index, block in enumerate(model.blocks):
        opens = next((keep for blocks, keep in stages if blocks.start == index), None)
        if opens is not None:
            if begun and not joins:
                stream, begun = restored(begun, stream), []
                at, sizes = torch.arange(len(x)), torch.ones(len(x))
            leaders, gap = grouped(block, stream, at, opens)
            margins.append(gap)
            workers = leaders.unique()
            places = torch.searchsorted(workers, leaders)
            counts = torch.zeros(len(workers)).index_add(0, places, sizes)
            sums = torch.zeros(len(workers), stream.shape[1]).index_add(0, places, stream * sizes[:, None])
            means = sums / counts[:, None]
            begun.append((stream, means, places))
            at, sizes, stream = at[workers], counts, means
        if any(index in blocks for blocks, _ in stages):
            working[index] = at
        stream = work(block, stream, at, sizes)
    return Result(model.head(model.norm(restored(begun, stream))), working, min(margins))


def grouped(block: Block, stream: Tensor, at: Tensor, keep: float) -> tuple[Tensor, float]:
    """For each token of a stream whose tokens stand at these positions the place of the one it goes with."""
    likeness, leaders, gaps = stream if block.post_norm else block.norm(stream), [], []
    for span in spans(block.lengths):
        inside = ((at >= span.start) & (at < span.stop)).nonzero().flatten()
        told = following.group(likeness[inside][None], None, share(keep, span.stop - span.start), ())
        leaders.append(told.leaders[0] + inside[0])
        gaps.append(float(told.margins))
    return torch.cat(leaders), min(gaps)


def restored(begun: Sequence[tuple[Tensor, Tensor, Tensor]], stream: Tensor) -> Tensor:
    """What all tokens are once each has what was added to the mean of its group, in all stages that were joined."""
    for before, means, places in reversed(begun):
        stream = before + (stream - means)[places]
    return stream
