"""What following the token axis through a region finds out: layouts, and what must change for fewer tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Axis, Edit, Read, ReadPlaces
from idlefx.analysis.layouts import Dim, Layout
from idlefx.analysis.partition import Windows
from idlefx.analysis.refusal import refuse
from idlefx.graph.queries import value
from idlefx.graph.sizes import plain_shape


@dataclass
class Walk:
    """The state of following one region.

    Attributes:
        layouts: Those that were found, by node.
        edits: What must change for fewer tokens, by node.
        grid: Sizes of the grid that the tokens of the stream stand on, if they do.
        apart: Whether the sides of that grid are windows and their slots, and so stand apart in all that is found.
        shares_batch: Whether the first side of that grid stands in the dimension of the batch.
        windows: What the attention is over, where it is over windows.
        segments: How many tokens each segment of the sequence has, where the attention is over such.
        has_batch: Whether the batch has a dimension of the stream.
    """

    layouts: dict[fx.Node, Any]
    edits: dict[fx.Node, list[Edit]] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    apart: bool = False
    shares_batch: bool = False
    windows: Windows | None = None
    segments: tuple[int, ...] = ()
    has_batch: bool = True

    def __getitem__(self, node: Any) -> Layout:
        layout: Layout = self.layouts[node]
        return layout

    def __contains__(self, node: Any) -> bool:
        return node in self.layouts

    def edit(self, node: fx.Node, *edits: Edit) -> None:
        """Note what must change at a node."""
        self.edits.setdefault(node, []).extend(edits)


def dimension(node: fx.Node, dim: Any, rank: int) -> int:
    """A dimension argument as a number from 0."""
    if not isinstance(dim, int):
        refuse(node, f"has a dimension {dim} that is no constant")
    return dim % rank


def sizes_of(node: fx.Node) -> list[int]:
    """The shape of a node's tensor as plain numbers."""
    tensor = value(node)
    if tensor is None:
        refuse(node, "carries no tensor")
    return plain_shape(tensor)


def need_features(node: fx.Node, layout: Layout, dims: Iterable[int], does: str) -> None:
    """Refuse what a node does if it does it over tokens or over the batch."""
    for d in dims:
        if lay.has(layout[d], "tokens"):
            refuse(node, f"{does} over the token axis outside attention")
        if lay.has(layout[d], "batch"):
            refuse(node, f"{does} over the batch")


def broadcast(walk: Walk, node: fx.Node, operands: Iterable[Any], rank: int) -> Layout:
    """The common layout of operands that are broadcast together; what is read by position is noted as such."""
    own = [o for o in operands if o in walk]
    result: list[Dim] = []
    for d in range(rank):
        dims = _one_batch({walk[o][d - rank] for o in own if len(walk[o]) >= rank - d} - {()})
        dims = _one_token_axis(dims)
        if len(dims) > 1:
            refuse(node, "combines tokens with something that is not laid out like them")
        result.append(dims.pop() if dims else ())
    for operand in operands:
        if not isinstance(operand, fx.Node) or value(operand) is None:
            continue
        if operand not in walk or walk[operand] != tuple(result):
            read_by_position(walk, node, operand, tuple(result))
        if operand not in walk:
            sizes = sizes_of(operand)
            for d in range(rank - len(sizes), rank):
                result[d] = result[d] or lay.features(sizes[d - rank])
    return tuple(result)


def _one_batch(dims: set[Dim]) -> set[Dim]:
    """Where a trace fixed the batch, the size of noise for each image does not say so; what it is added to does."""
    batch = next((dim for dim in dims if len(dim) == 1 and dim[0].role == "batch"), None)
    return {batch if batch is not None and dim == lay.features(lay.size(batch)) else dim for dim in dims}


def _one_token_axis(dims: set[Dim]) -> set[Dim]:
    """Features that are added to tokens, one to each, are a table that is read by position."""
    axis = next((dim for dim in dims if dim and all(f.role == "tokens" for f in dim)), None)
    return {axis if axis is not None and dim == lay.features(lay.size(axis)) else dim for dim in dims}


def read_by_position(walk: Walk, node: fx.Node, operand: fx.Node, output: Layout, skip: int | None = None) -> None:
    """Note which dimensions of an operand run along tokens of the output it is broadcast to, and are none of its own.

    Of an operand that comes from outside the region, none are: it is a table with an entry for each token. So is what
    has been computed of each token for all positions, such as a bias that depends on the queries.
    """
    sizes, rank = sizes_of(operand), len(output)
    own: Layout = walk[operand] if operand in walk else ((),) * len(sizes)
    axes: dict[int, Axis] = {}
    places: list[int] = []
    for d in range(max(rank - len(sizes), 0), rank):
        shrinks = lay.has(own[d - rank], "tokens")
        if sizes[d - rank] != 1 and lay.has(output[d], "tokens") and not shrinks and d != skip:
            if lay.sides_of(output[d]):
                places.append(d)
                continue
            axis = _axis_through(output, d)
            if axis is None:
                refuse(node, f"reads `{operand.name}` by position along an axis that tokens share")
            axes[axis.dim] = axis
    if places:
        walk.edit(node, ReadPlaces(operand, output, tuple(places), operand in walk))
    if axes:
        batch = next((d for d, dim in enumerate(output) if dim and dim[0].role == "batch"), None)
        if walk.has_batch and (batch is None or lay.has(output[batch], "tokens")):
            refuse(node, f"reads `{operand.name}` by position where the batch has no axis of its own")
        copies = 1 if batch is None else lay.size(output[batch][1:])
        walk.edit(node, Read(operand, tuple(axes.values()), rank, batch, copies))


def _axis_through(layout: Layout, d: int) -> Axis | None:
    """The token axis that a dimension is, or is a side of; None if something else shares it."""
    if lay.is_tokens(layout[d]):
        return Axis(d, layout[d][0].runs)
    if len(layout[d]) > 1:
        return None
    (side,) = layout[d]
    assert side.side is not None
    first, count = d - side.side, len(side.grid)
    if first < 0 or layout[first : first + count] != lay.sides(side.grid):
        return None
    return Axis(first, side.runs, side.grid)
