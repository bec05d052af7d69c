"""What the dimensions of a tensor mean: which of them hold tokens, which the batch, which features.

A dimension is a product of factors, as a reshape may merge the batch or the heads into it. A token factor
knows which positions of the sequence it holds, as runs `(start, stop)` in order.

Tokens that stand on a grid are one token axis too, which several dimensions may share: its sides, such as rows and
columns. Where only n of the tokens are there, they stand on a grid (1, n): the last side holds all of them.

Movement may bring the tokens into another order, such as that of windows. Then they stand on a grid of places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from idlefx.analysis.partition import Partition
from idlefx.graph.sizes import FREE_BATCH

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension.

    Attributes:
        size: How many entries it has.
        role: "batch" or "tokens"; empty for features.
        runs: Which tokens it holds.
        grid: Sizes of the grid that the tokens stand on; empty where they are a plain sequence.
        side: Which side of the grid this is; None where it is the whole token axis.
        partition: Which token stands at which place of the grid; None where they stand in the stream's own order.
    """

    size: int
    role: str = ""
    runs: Runs = ()
    grid: tuple[int, ...] = ()
    side: int | None = None
    partition: Partition | None = None


Dim = tuple[Factor, ...]  # a dimension of size one has no factors
Layout = tuple[Dim, ...]


def features(size: int) -> Dim:
    """A dimension that holds neither tokens nor the batch."""
    return () if size == 1 else (Factor(size, "batch" if size == FREE_BATCH else ""),)


def tokens(count: int) -> Dim:
    """A dimension that holds a whole sequence of `count` tokens."""
    return (Factor(count, "tokens", ((0, count),)),)


def sides(grid: Sequence[int]) -> tuple[Dim, ...]:
    """A dimension for each side of a grid of tokens; of a grid of one row, the last holds the plain sequence."""
    if all(size == 1 for size in grid[:-1]):
        return (*((),) * (len(grid) - 1), tokens(grid[-1]))
    runs, sizes = ((0, math.prod(grid)),), tuple(grid)
    return tuple((Factor(size, "tokens", runs, sizes, side),) for side, size in enumerate(sizes))


def stream(shape: list[int], token_dims: Sequence[int], batch_dim: int | None, grid: Sequence[int] = ()) -> Layout:
    """The layout of a residual stream: batch, features, and tokens in one dimension or, on a grid, in several.

    Args:
        shape: Its sizes.
        token_dims: Where the tokens stand, from the outermost side of a grid on.
        batch_dim: Where the batch stands; a side of the grid may stand in that dimension too, inside the batch. None
            without one, so that no factor stands for it.
        grid: Sizes of the sides; those of their dimensions if not told.
    """
    sizes = grid or [shape[d] for d in token_dims]
    axes = dict(zip(token_dims, sides(sizes) if len(sizes) > 1 else (tokens(sizes[0]),), strict=True))
    if batch_dim in axes:
        axes[batch_dim] = (Factor(shape[batch_dim] // size(axes[batch_dim]), "batch"), *axes[batch_dim])
    return tuple(
        axes[d] if d in axes else (Factor(count, "batch"),) if d == batch_dim else features(count)
        for d, count in enumerate(shape)
    )


def shares_batch(layout: Layout) -> bool:
    """Whether tokens of one image stand in several entries of the batch, as windows do that are stacked there."""
    return any(has(dim, "batch") and has(dim, "tokens") for dim in layout)


def apart(layout: Layout) -> Layout:
    """The layout of a stream on a grid, whose sides are those of a partition: attention may be over some of them."""
    grid = grid_of(layout)
    own = Partition.of(torch.arange(math.prod(grid)).view(grid))
    return tuple(tuple(replace(f, partition=own) if f.role == "tokens" else f for f in dim) for dim in layout)


def size(dim: Dim) -> int:
    """The size of a dimension."""
    return math.prod(f.size for f in dim)


def has(dim: Dim, *roles: str) -> bool:
    """Whether a dimension holds any of the roles."""
    return any(f.role in roles for f in dim)


def is_tokens(dim: Dim) -> bool:
    """Whether a dimension holds tokens and nothing else, in their own order, and not one side of their grid alone."""
    return len(dim) == 1 and dim[0].role == "tokens" and dim[0].side is None and dim[0].partition is None


def partition_of(dim: Dim) -> Partition | None:
    """The partition that a dimension is made of, if it is made of places of one and nothing else."""
    held = {f.partition for f in dim}
    return held.pop() if len(held) == 1 else None


def is_axis(dim: Dim) -> bool:
    """Whether attention over a dimension may be over tokens: all of a sequence, or some sides of a partition."""
    return is_tokens(dim) or partition_of(dim) is not None


def sides_of(dim: Dim) -> tuple[int, ...]:
    """The sides of a partition that a dimension holds."""
    return tuple(s.side for f in dim if f.partition is not None for s in opened(f) if s.side is not None)


def merge(runs: Runs) -> Runs:
    """Join runs that follow one another."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return tuple(joined)


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """The runs of what stands at `start … stop` along an axis made of `runs`."""
    parts, offset = [], 0
    for low, high in runs:
        left, right = max(start - offset, 0), min(stop - offset, high - low)
        if right > left:
            parts.append((low + left, low + right))
        offset += high - low
    return tuple(parts)


def heads(layout: Layout) -> int:
    """How many heads queries or keys of a layout (…, N, D) have: what is neither batch, tokens nor head features."""
    return size(tuple(f for dim in layout[:-1] for f in dim if not f.role))


def token_axis(runs: Runs) -> Dim:
    """A dimension that holds these runs of tokens; a single token still counts as one."""
    return (Factor(sum(b - a for a, b in runs), "tokens", runs),)


def regroup(layout: Layout, shape: list[int]) -> Layout | None:
    """The layout after a reshape, which keeps the order in memory; None if it would break up the tokens.

    Args:
        layout: Before the reshape.
        shape: Sizes after it.
    """
    pool: list[Factor] = []
    for factor in (side for dim in layout for f in dim for side in opened(f)):
        if pool and not factor.role and not pool[-1].role:
            pool[-1] = Factor(pool[-1].size * factor.size)
        else:
            pool.append(factor)
    result: list[Dim] = []
    for target in shape:
        dim: list[Factor] = []
        left = target
        while left > 1 or (pool and pool[0].size == 1 and not dim):
            if not pool:
                return None
            factor = pool.pop(0)
            if left % factor.size == 0:
                dim.append(factor)
                left //= factor.size
            elif not factor.role and factor.size % left == 0:
                pool.insert(0, Factor(factor.size // left))
                dim.append(Factor(left))
                left = 1
            else:
                return None
        result.append(closed(tuple(dim)))
    return tuple(result) if not pool else None


def opened(factor: Factor) -> tuple[Factor, ...]:
    """The sides of a whole grid; anything else as it is."""
    if not factor.grid or factor.side is not None:
        return (factor,)
    return tuple(replace(factor, size=size, side=side) for side, size in enumerate(factor.grid))


def closed(dim: Dim) -> Dim:
    """A dimension in which the sides of a grid that stand together, all and in order, are the whole token axis."""
    result: list[Factor] = []
    for factor in dim:
        result.append(factor)
        count = len(factor.grid)
        if factor.side is not None and tuple(result[-count:]) == opened(replace(factor, side=None)):
            result[-count:] = [replace(factor, size=math.prod(factor.grid), side=None)]
    return tuple(result)


def grid_of(layout: Layout) -> tuple[int, ...]:
    """The grid of which each side stands once in a layout; empty if there is none."""
    held = [side for dim in layout for f in dim if f.role == "tokens" for side in opened(f)]
    grid = held[0].grid if held and held[0].partition is None else ()
    once = len(held) == len(grid) and {side.side for side in held} == set(range(len(grid)))
    return grid if once else ()


def flat(layout: Layout) -> Layout:
    """The layout after dimensions that are the sides of one grid, in order, are merged."""
    result: list[Dim] = []
    for dim in layout:
        result.append(dim)
        count = len(dim[0].grid) if len(dim) == 1 and dim[0].side is not None else 0
        merged = closed(tuple(f for each in result[-count:] for f in each)) if count else dim
        if count and is_tokens(merged):
            result[-count:] = [merged]
    return tuple(result)
