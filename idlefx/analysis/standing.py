"""How the tokens of a layout stand: every one of them once, and in which order."""

import torch
from torch import Tensor

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Factor, Layout


def factors_of(layout: Layout, role: str) -> list[Factor]:
    """The factors of that role, in the order in which they stand."""
    return [f for dim in layout for f in dim if f.role == role]


def stands_once(layout: Layout) -> bool:
    """Whether every token of the sequence stands in a layout once, and the images have a factor of their own."""
    return token_sides(layout) is not None and len(factors_of(layout, "batch")) == 1


def token_sides(layout: Layout) -> list[Factor] | None:
    """The sides of the token axis in the order in which they stand; None if one is not there, or twice."""
    sides = [side for f in factors_of(layout, "tokens") for side in lay.opened(f)]
    if not sides or len({(side.partition, side.grid, side.runs) for side in sides}) > 1:
        return None
    runs, grid = sides[0].runs, sides[0].grid
    whole = len(runs) == 1 and runs[0][0] == 0
    once = sorted(side.side or 0 for side in sides) == list(range(max(1, len(grid))))
    return sides if whole and once else None


def token_count(sides: list[Factor]) -> int:
    """How many tokens there are."""
    ((_, stop),) = sides[0].runs
    return stop


def places(sides: list[Factor]) -> Tensor:
    """The token at each place, with the sizes of the sides as they stand."""
    first = sides[0]
    if first.partition is not None:
        numbered = first.partition.places
    else:
        numbered = torch.arange(token_count(sides)).view(first.grid or (-1,))
    return numbered.permute([side.side or 0 for side in sides])


def in_stream_order(layout: Layout, grid: tuple[int, ...]) -> Layout:
    """A layout whose tokens stand in the order of the stream, though it names a partition, as one of the stream.

    Args:
        layout: Any layout; one of another order, or in other dimensions than the stream may have, stays as it is.
        grid: Sizes of the grid that the tokens of the stream stand on, if they do.
    """
    moved = any(f.partition is not None for dim in layout for f in dim)
    sides = token_sides(layout) if moved else None
    if sides is None:
        return layout
    count, standing = token_count(sides), places(sides).flatten()
    if not torch.equal(standing, torch.arange(count)):
        return layout
    alone = [d for d, dim in enumerate(layout) if lay.partition_of(dim) is not None]
    if sum(lay.has(dim, "tokens") for dim in layout) > len(alone):
        return layout
    if len(alone) == 1:
        dims: tuple[lay.Dim, ...] = ((Factor(count, "tokens", ((0, count),), grid),),)
    elif tuple(lay.size(layout[d]) for d in alone) == grid and alone[-1] - alone[0] == len(grid) - 1:
        dims = lay.sides(grid)
    else:
        return layout
    named = dict(zip(alone, dims, strict=True))
    return tuple(named.get(d, dim) for d, dim in enumerate(layout))
