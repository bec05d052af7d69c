"""Which dimensions of a residual stream hold the tokens: one of a sequence, neighbours that are the sides of a grid."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.image_input import image_input
from idlefx.analysis.movement import MOVES
from idlefx.analysis.propagation import follow, follow_windows
from idlefx.analysis.refusal import RefusedMovement, RefusedOperation, refuse
from idlefx.analysis.segments import segment_lengths
from idlefx.analysis.trunks import Trunk
from idlefx.analysis.walk import Walk
from idlefx.graph.queries import leaks, source_line
from idlefx.graph.sizes import follows_batch, shape_of


class Axes(NamedTuple):
    """Dimensions of a residual stream.

    Attributes:
        tokens: Those of the tokens, from the outermost side of a grid, such as its rows, to the innermost.
        batch: That of the batch; None where the stream is that of one image, or of several that are packed.
        grid: Sizes of the sides of the grid; empty where the tokens stand in one dimension.
    """

    tokens: tuple[int, ...]
    batch: int | None
    grid: tuple[int, ...] = ()


def find_axes(trunk: Trunk, nodes: list[fx.Node]) -> tuple[Axes, Walk]:
    """Find the dimensions that every core attends over and that come out of a block where they went in.

    Args:
        trunk: The block.
        nodes: Its nodes.

    Raises:
        RefusedOperation: There are none, or something inside the block is read outside.
    """
    if len(shape_of(trunk.entry)) not in (2, 3, 4, 5):
        raise RefusedOperation(
            f"the residual stream has {len(shape_of(trunk.entry))} dimensions instead of tokens and features, batch, "
            f"tokens and features, or batch, two or three sides of a grid, and features (at {source_line(trunk.entry)})"
        )
    _check_closed(trunk, nodes)
    refusals: list[tuple[Axes, RefusedOperation]] = []
    for axes in _possible(trunk.entry):
        layout = lay.stream(shape_of(trunk.entry), axes.tokens, axes.batch, axes.grid)
        try:
            walk = follow_block(nodes, trunk.entry, layout, trunk.cores)
        except RefusedOperation as refusal:
            refusals.append((axes, refusal))
            continue
        if walk[trunk.exit] == walk[trunk.entry]:
            return axes, walk
        reordered = f"the tokens leave the block in another order (at {source_line(trunk.exit)})"
        refusals.append((axes, RefusedOperation(reordered, trunk.exit)))
    # What does not hold the tokens is refused early: of the axes that went furthest is said what matters. The last
    # dimension is that of the features in most models, and may go far where a norm is spelled out.
    order = {node: place for place, node in enumerate(nodes)}
    _, furthest = max(refusals, key=lambda tried: (tried[0].tokens != (2,), order.get(tried[1].node, -1)))  # type: ignore[arg-type]
    raise furthest


def follow_block(nodes: list[fx.Node], entry: fx.Node, layout: lay.Layout, cores: Sequence[Core]) -> Walk:
    """Follow the tokens by the rules alone; where these refuse, through what moves them, or in windows of the stream.

    Args:
        nodes: The block.
        entry: Its entry.
        layout: That of the entry.
        cores: Its attention.

    Raises:
        RefusedOperation: By the rules, unless it can be said what is wrong with the movement.
    """
    try:
        walk = follow(nodes, {entry: layout})
        walk.segments = segment_lengths(walk, layout, cores)
        return walk
    except RefusedOperation as refusal:
        first = refusal
    if lay.shares_batch(layout):  # windows there are images of their own, which another layout of the stream says
        raise first
    if first.node is not None and first.node.target in MOVES:
        try:
            return follow_windows(nodes, {entry: layout}, cores)
        except RefusedMovement:
            raise
        except RefusedOperation as second:
            if second.node is not None and nodes.index(second.node) > nodes.index(first.node):
                first = RefusedOperation(f"{first}, behind which {second}", first.node)
    elif lay.grid_of(layout):
        with suppress(RefusedOperation):
            return follow_windows(nodes, {entry: lay.apart(layout)}, cores)
    raise first


def attends_over_batch(core: Core) -> bool:
    """Whether the queries of an attention stand where the batch does."""
    return follows_batch(core.query.meta["val"].shape[-2])


def _check_closed(trunk: Trunk, nodes: Sequence[fx.Node]) -> None:
    """Refuse a block of which something else reads the inside, or that attends over the batch."""
    if leaking := leaks(nodes, trunk.exit):
        returned = any(user.op == "output" for user in leaking[0].users)
        reader = "returned by the model, as an attention map may be" if returned else "read outside of it"
        raise RefusedOperation(f"`{leaking[0].name}` inside the block is {reader} (at {source_line(leaking[0])})")
    for core in trunk.cores:
        if attends_over_batch(core):
            refuse(core.out, "attends over the batch")


def _possible(stream: fx.Node) -> Iterator[Axes]:
    """Where batch and tokens may stand, the usual order first.

    Where the first dimension of (k * B, n, C) is a multiple of the batch, each image may have k windows there, of which
    every one is an image of its own for attention over windows, and part of one sequence for attention over all.
    """
    shape, sizes = stream.meta["val"].shape, shape_of(stream)
    symbolic = [d for d, size in enumerate(shape) if follows_batch(size)]
    if len(shape) == 2:
        yield Axes((0,), None)
    elif len(shape) == 3:
        for batch in symbolic or [0, 1]:
            yield from (Axes((d,), batch) for d in [d for d in range(2) if d != batch] + [2])
        windows, rest = divmod(sizes[0], shape_of(image_input(stream.graph))[0])
        if rest == 0 and windows > 1 and symbolic in ([], [0]):
            yield Axes((0, 1), 0, (windows, sizes[1]))
    else:
        sides = len(shape) - 2
        for batch in symbolic or [0]:
            dims = (tuple(range(d, d + sides)) for d in range(3) if not d <= batch < d + sides)
            yield from (Axes(each, batch, tuple(sizes[d] for d in each)) for each in dims)
