"""Tokens on a grid: tables that are read there, and work in the whole grid for the few tokens that are there.

Few tokens stand in one row: n tokens of a grid (H, W) stand as (1, n).
"""

import math
from collections.abc import Sequence

from torch import Tensor

from idlefx.runtime.gather_scatter import put_tokens, take_tokens

Dims = tuple[tuple[tuple[str, int], ...], ...]
"""For each dimension of a tensor what it is a product of: ("batch", 0), ("side", which) or ("features", size)."""


def put_on_grid(x: Tensor, index: Tensor, dims: Dims, grid: tuple[int, ...]) -> Tensor:
    """Put each image's tokens at their places in the whole grid, and zeros at all others.

    Args:
        x: n tokens of each image, in one row.
        index: Their positions (B, n).
        dims: What the dimensions of `x` hold.
        grid: Sizes of the grid.

    Returns:
        `x` with the sizes of the grid.
    """
    batch, few = index.shape[0], _one_row(index, grid)
    tokens = tokens_first(x, dims, few, batch)
    whole = tokens.new_zeros((batch, math.prod(grid), *tokens.shape[2:]))
    return laid_out(put_tokens(whole, index, tokens), dims, grid)


def take_from_grid(x: Tensor, index: Tensor, dims: Dims, grid: tuple[int, ...]) -> Tensor:
    """Take each image's tokens from the whole grid again.

    Args:
        x: All tokens, on the grid.
        index: Positions of those that are taken (B, n).
        dims: What the dimensions of `x` hold.
        grid: Sizes of the grid.

    Returns:
        `x` with the tokens in one row.
    """
    tokens = take_tokens(tokens_first(x, dims, grid, index.shape[0]), index)
    return laid_out(tokens, dims, _one_row(index, grid))


def read_on_grid(table: Tensor, index: Tensor, dim: int, batch_dim: int, grid: tuple[int, ...]) -> Tensor:
    """Read a table at each image's tokens.

    Args:
        table: With an entry for each place of the grid from `dim` on; one that serves a whole side is 1 long there.
        index: Positions (B, n).
        dim: The first dimension of the grid.
        batch_dim: The dimension of the images, of which one entry may serve all.
        grid: Sizes of the grid.

    Returns:
        The entries in one row: `table` with sizes (1, …, n) from `dim` on.
    """
    further = len(grid) - 1
    shape = (*table.shape[:dim], *grid, *table.shape[dim + 1 + further :])
    entries = table.expand(shape).flatten(dim, dim + further)
    entries = take_tokens(entries, index, dim, batch_dim - further if batch_dim > dim else batch_dim)
    for _ in range(further):
        entries = entries.unsqueeze(dim)
    return entries


def _one_row(index: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*(1,) * (len(grid) - 1), index.shape[1])


def tokens_first(x: Tensor, dims: Dims, grid: Sequence[int], batch: int) -> Tensor:
    """(B, tokens, …) of a tensor whose tokens stand on a grid of these sizes."""
    sizes, order = _sizes(dims, grid, batch), _order(dims)
    return x.reshape([size for dim in sizes for size in dim]).permute(order).flatten(1, len(grid))


def laid_out(tokens: Tensor, dims: Dims, grid: Sequence[int]) -> Tensor:
    """Undo `tokens_first`."""
    sizes, order = _sizes(dims, grid, tokens.shape[0]), _order(dims)
    factors = [size for dim in sizes for size in dim]
    x = tokens.reshape([factors[at] for at in order]).permute([order.index(at) for at in range(len(order))])
    return x.reshape([math.prod(dim) for dim in sizes])


def _sizes(dims: Dims, grid: Sequence[int], batch: int) -> list[list[int]]:
    return [[batch if what == "batch" else grid[n] if what == "side" else n for what, n in dim] for dim in dims]


def _order(dims: Dims) -> list[int]:
    """Where the batch, the sides of the grid in order, and then the features stand among all factors."""
    factors = [factor for dim in dims for factor in dim]
    first = {"batch": -1, "side": 0, "features": len(factors)}
    rank = [first[what] + (n if what == "side" else 0) for what, n in factors]
    return sorted(range(len(factors)), key=lambda at: rank[at])
