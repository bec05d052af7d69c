"""What the dimensions of a tensor mean: which of them hold tokens, which the batch, which features.

A dimension is a product of factors, as a reshape may merge the batch or the heads into it. A token factor
knows which positions of the sequence it holds, as runs `(start, stop)` in order.
"""

import math
from dataclasses import dataclass

from idlefx.graph.sizes import FREE_BATCH

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension: features unless `role` says "batch" or "tokens"."""

    size: int
    role: str = ""
    runs: Runs = ()


Dim = tuple[Factor, ...]  # a dimension of size one has no factors
Layout = tuple[Dim, ...]


def features(size: int) -> Dim:
    """A dimension that holds neither tokens nor the batch."""
    return () if size == 1 else (Factor(size, "batch" if size == FREE_BATCH else ""),)


def tokens(count: int) -> Dim:
    """A dimension that holds a whole sequence of `count` tokens."""
    return (Factor(count, "tokens", ((0, count),)),)


def stream(shape: list[int], token_dim: int, batch_dim: int) -> Layout:
    """The layout of a residual stream: tokens, batch and features, in any order."""
    return tuple(
        tokens(size) if d == token_dim else (Factor(size, "batch"),) if d == batch_dim else features(size)
        for d, size in enumerate(shape)
    )


def size(dim: Dim) -> int:
    """The size of a dimension."""
    return math.prod(f.size for f in dim)


def has(dim: Dim, *roles: str) -> bool:
    """Whether a dimension holds any of the roles."""
    return any(f.role in roles for f in dim)


def is_tokens(dim: Dim) -> bool:
    """Whether a dimension holds tokens and nothing else."""
    return len(dim) == 1 and dim[0].role == "tokens"


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
    for factor in (f for dim in layout for f in dim):
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
        result.append(tuple(dim))
    return tuple(result) if not pool else None
