"""Rules for what moves numbers: dimensions are split, merged and moved, the token axis staying whole."""

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Resize
from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import refuse
from idlefx.analysis.rules.registry import rule
from idlefx.analysis.walk import Walk, broadcast, dimension, sizes_of
from idlefx.graph.queries import argument

aten = torch.ops.aten


@rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(walk: Walk, node: fx.Node) -> Layout:
    """Split and merge dimensions; the token axis stays whole."""
    return _regrouped(walk, node, 1, 0)


@rule(aten.unflatten.int)
def unflatten(walk: Walk, node: fx.Node) -> Layout:
    """Split one dimension."""
    return _regrouped(walk, node, 2, dimension(node, node.args[1], len(walk[node.args[0]])))


def _regrouped(walk: Walk, node: fx.Node, arg: int, first: int) -> Layout:
    layout = lay.regroup(walk[node.args[0]], sizes_of(node))
    if layout is None:
        refuse(node, "breaks up the token axis (windows or a grid of patches)")
    for entry, size in enumerate(argument(node, arg)):
        if lay.has(layout[first + entry], "tokens") and size != -1:
            walk.edit(node, Resize(arg, entry, layout[first + entry]))
    return layout


@rule(aten.flatten.using_ints, aten.squeeze.default)
def flatten(walk: Walk, node: fx.Node) -> Layout:
    """Merge dimensions; no size is written down."""
    layout = lay.regroup(walk[node.args[0]], sizes_of(node))
    return layout if layout is not None else refuse(node, "breaks up the token axis")


@rule(aten.reshape_as.default, aten.view_as.default)
def reshape_as(walk: Walk, node: fx.Node) -> Layout:
    """Split and merge dimensions as they are in another tensor, which shrinks with the tokens too."""
    layout, other = lay.regroup(walk[node.args[0]], sizes_of(node)), node.args[1]
    follows = other in walk and walk[other] == layout
    if layout is None or not (follows or not any(lay.has(dim, "tokens") for dim in layout)):
        refuse(node, "breaks up the token axis")
    return layout


@rule(aten.expand_as.default)
def expand_as(walk: Walk, node: fx.Node) -> Layout:
    """Repeat dimensions of size one until the shape is that of another tensor."""
    return broadcast(walk, node, node.args[:2], len(sizes_of(node)))


@rule(aten.expand.default)
def expand(walk: Walk, node: fx.Node) -> Layout:
    """Repeat dimensions of size one."""
    layout, wanted = walk[node.args[0]], sizes_of(node)
    new = len(wanted) - len(layout)
    result = []
    for d, size in enumerate(wanted):
        before = layout[d - new] if d >= new else ()
        result.append(before if before and lay.size(before) == size else lay.features(size))
        if lay.has(result[-1], "tokens") and argument(node, 1)[d] != -1:
            walk.edit(node, Resize(1, d, result[-1]))
    return tuple(result)


@rule(aten.permute.default)
def permute(walk: Walk, node: fx.Node) -> Layout:
    """Reorder dimensions."""
    layout = walk[node.args[0]]
    return tuple(layout[d] for d in argument(node, 1))


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(walk: Walk, node: fx.Node) -> Layout:
    """Swap two dimensions."""
    layout = list(walk[node.args[0]])
    a, b = argument(node, 1), argument(node, 2)
    layout[a], layout[b] = layout[b], layout[a]
    return tuple(layout)


@rule(aten.mT.default)
def matrix_transpose(walk: Walk, node: fx.Node) -> Layout:
    """Swap the last two dimensions."""
    *stack, rows, columns = walk[node.args[0]]
    return (*stack, columns, rows)


@rule(aten.t.default, aten.numpy_T.default)
def reverse(walk: Walk, node: fx.Node) -> Layout:
    """All dimensions the other way round."""
    return tuple(reversed(walk[node.args[0]]))


@rule(aten.movedim.int)
def movedim(walk: Walk, node: fx.Node) -> Layout:
    """Move one dimension."""
    layout = list(walk[node.args[0]])
    source, target = (dimension(node, d, len(layout)) for d in node.args[1:3])
    layout.insert(target, layout.pop(source))
    return tuple(layout)


@rule(aten.unsqueeze.default)
def unsqueeze(walk: Walk, node: fx.Node) -> Layout:
    """Insert a dimension of size one."""
    layout = walk[node.args[0]]
    at = dimension(node, node.args[1], len(layout) + 1)
    return (*layout[:at], (), *layout[at:])


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(walk: Walk, node: fx.Node) -> Layout:
    """Remove dimensions of size one."""
    layout, removed = walk[node.args[0]], argument(node, 1)
    dims = {dimension(node, d, len(layout)) for d in ([removed] if isinstance(removed, int) else removed)}
    return tuple(dim for d, dim in enumerate(layout) if d not in dims or lay.size(dim) > 1)


@rule(aten.view_as_complex.default)
def view_as_complex(walk: Walk, node: fx.Node) -> Layout:
    """Pairs of features become complex ones."""
    return walk[node.args[0]][:-1]


@rule(aten.view_as_real.default)
def view_as_real(walk: Walk, node: fx.Node) -> Layout:
    """Complex features become pairs."""
    return (*walk[node.args[0]], lay.features(2))
