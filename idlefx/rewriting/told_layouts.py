"""Layouts and edits as the functions of `runtime.grids` and `runtime.windows` want to be told them."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import ReadPlaces, Rearrange
from idlefx.analysis.layouts import Layout
from idlefx.analysis.subset import Subset
from idlefx.graph.sizes import shape_of
from idlefx.runtime.grids import Dims


def products(layout: Layout, order: Sequence[int] = ()) -> Dims:
    """What the dimensions of a layout are products of.

    Args:
        layout: It.
        order: The sides of its tokens from the outermost on, where that is not how they are numbered.
    """

    def told(factor: lay.Factor) -> list[tuple[str, int]]:
        if factor.role == "batch":
            return [("batch", 0)]
        if factor.role != "tokens":
            return [("features", factor.size)]
        sides = [each.side or 0 for each in lay.opened(factor)]
        return [("side", order.index(side) if order else side) for side in sides]

    return tuple(tuple(each for factor in dim for each in told(factor)) for dim in layout)


def rearranging(subset: Subset, edit: Rearrange, copy: fx.Node) -> tuple[Any, ...]:
    """Arguments of `rearrange` for the end of a chain of movement.

    Args:
        subset: The tokens that are there.
        edit: The chain.
        copy: What stands for its start.
    """
    before, after = (_told(subset, layout) for layout in (edit.before, edit.after))
    tokens = len(subset.free) if _is_padded(edit.after) and not _is_padded(edit.before) else 0
    return (copy, subset.index, *before, *after, tokens)


def _told(subset: Subset, layout: Layout) -> tuple[Dims, tuple[int, ...]]:
    """A layout of the tokens that are there, and the sizes of its sides, those that say which window first."""
    factor = next(f for dim in layout for f in dim if f.role == "tokens")
    if factor.partition is None:
        return products(layout), (*(1,) * (len(factor.grid) - 1), subset.kept)
    sizes, order = subset.sides(factor.partition), subset.order(factor.partition)
    return products(layout, order), tuple(sizes[side] for side in order)


def _is_padded(layout: Layout) -> bool:
    return any(f.partition is not None and f.partition.is_padded for dim in layout for f in dim)


def reading(subset: Subset, node: fx.Node, edit: ReadPlaces) -> tuple[Any, ...] | None:
    """Further arguments of `read_places` for an operand; None where it need not be read.

    Args:
        subset: The tokens that are there.
        node: What reads it.
        edit: How.
    """
    dims = subset.places_read(node, edit)
    if dims is None or subset.windows is None:
        return None
    shape = shape_of(edit.operand)
    full = (*(False,) * (len(dims) - len(shape)), *(size != 1 for size in shape))
    return dims, full, subset.windows.count, subset.windows.size, subset.unit
