"""Rules for what takes tensors apart and puts them together."""

import operator
from typing import Any

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Cut, Resize
from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import refuse
from idlefx.analysis.rules.registry import rule
from idlefx.analysis.walk import Walk, dimension, need_features, read_by_position, sizes_of
from idlefx.graph.queries import argument, tensor_argument
from idlefx.graph.sizes import plain_shape

aten = torch.ops.aten


@rule(aten.unbind.int)
def unbind(walk: Walk, node: fx.Node) -> tuple[Layout, ...]:
    """Take features apart, such as query, key and value."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 1, "dim", 0), len(layout))
    need_features(node, layout, [dim], "takes tensors apart")
    return tuple((*layout[:dim], *layout[dim + 1 :]) for _ in node.meta["val"])


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(walk: Walk, node: fx.Node) -> tuple[Layout, ...]:
    """Cut features into pieces; tokens too, where the sizes are written down."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 2, "dim", 0), len(layout))
    pieces = [plain_shape(piece)[dim] for piece in node.meta["val"]]
    if lay.is_tokens(layout[dim]) and node.target is aten.split_with_sizes.default:
        ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
        runs = [lay.cut(layout[dim][0].runs, end - size, end) for end, size in zip(ends, pieces, strict=True)]
        cuts = [lay.token_axis(part) for part in runs]
        walk.edit(node, *(Resize(1, entry, cut) for entry, cut in enumerate(cuts)))
    else:
        need_features(node, layout, [dim], "cuts")
        cuts = [lay.features(size) for size in pieces]
    return tuple((*layout[:dim], cut, *layout[dim + 1 :]) for cut in cuts)


@rule(operator.getitem)
def getitem(walk: Walk, node: fx.Node) -> Layout:
    """One of several results."""
    return walk.layouts[tensor_argument(node, 0)][node.args[1]]


@rule(aten.select.int)
def select(walk: Walk, node: fx.Node) -> Layout:
    """Pick one entry; of tokens, one whose place is known."""
    layout = walk[node.args[0]]
    dim = dimension(node, node.args[1], len(layout))
    if lay.is_tokens(layout[dim]):
        tokens = layout[dim][0]
        walk.edit(node, Cut(2, argument(node, 2) % tokens.size, tokens.runs))
    else:
        need_features(node, layout, [dim], "picks an entry")
    return (*layout[:dim], *layout[dim + 1 :])


@rule(aten.slice.Tensor)
def cut(walk: Walk, node: fx.Node) -> Layout:
    """Cut a range out of a dimension; of tokens, one whose bounds are known."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 1, "dim", 0), len(layout))
    size = lay.size(layout[dim])
    if sizes_of(node)[dim] == size:
        return layout
    if not lay.is_tokens(layout[dim]):
        need_features(node, layout, [dim], "cuts")
        return (*layout[:dim], lay.features(sizes_of(node)[dim]), *layout[dim + 1 :])
    runs = layout[dim][0].runs
    start, stop, step = argument(node, 2, "start") or 0, argument(node, 3, "end"), argument(node, 4, "step", 1)
    if step != 1 or not isinstance(start, int) or not (stop is None or isinstance(stop, int)):
        refuse(node, "cuts the token axis with a step or with computed bounds")
    start, stop, _ = slice(start, stop).indices(size)
    walk.edit(node, Cut(2, start, runs), *([Cut(3, stop, runs)] if len(node.args) > 3 else []))
    return (*layout[:dim], lay.token_axis(lay.cut(runs, start, stop)), *layout[dim + 1 :])


@rule(aten.cat.default)
def cat(walk: Walk, node: fx.Node) -> Layout:
    """Join along features, or join runs of tokens."""
    pieces = argument(node, 0)
    own = [walk[p] for p in pieces if p in walk]
    dim = dimension(node, argument(node, 1, "dim", 0), len(own[0]))
    if len({(*layout[:dim], *layout[dim + 1 :]) for layout in own}) > 1:
        refuse(node, "joins tensors that are laid out differently")
    if lay.has(own[0][dim], "tokens"):
        if len(own) < len(pieces) or not all(lay.is_tokens(layout[dim]) for layout in own):
            refuse(node, "joins tokens of this sequence with others")
        runs = lay.merge(tuple(run for layout in own for run in layout[dim][0].runs))
        return (*own[0][:dim], lay.token_axis(runs), *own[0][dim + 1 :])
    need_features(node, own[0], [dim], "joins")
    result = (*own[0][:dim], lay.features(sizes_of(node)[dim]), *own[0][dim + 1 :])
    for piece in pieces:
        if piece not in walk:
            read_by_position(walk, node, piece, result, skip=dim)
    return result


@rule(aten.pad.default)
def pad(walk: Walk, node: fx.Node) -> Layout:
    """Widen features; to pad by nothing, as windows do that fit, changes nothing."""
    layout, widths = list(walk[node.args[0]]), argument(node, 1)
    for at in range(0, len(widths), 2):
        if any(widths[at : at + 2]):
            dim = len(layout) - 1 - at // 2
            if lay.has(layout[dim], "tokens"):
                refuse(node, "pads the token axis, as for windows")
            need_features(node, tuple(layout), [dim], "pads")
            layout[dim] = lay.features(sizes_of(node)[dim])
    return tuple(layout)


@rule(aten.roll.default)
def roll(walk: Walk, node: fx.Node) -> Layout:
    """Move features round."""
    layout, dims = walk[node.args[0]], argument(node, 2, "dims", [])
    rolled = [dims] if isinstance(dims, int) else dims or range(len(layout))
    if any(lay.has(layout[dim], "tokens") for dim in rolled):
        refuse(node, "rolls the token axis, as for shifted windows")
    need_features(node, layout, rolled, "rolls")
    return layout


@rule(aten.stack.default)
def stack(walk: Walk, node: fx.Node) -> Layout:
    """Put tensors of one layout side by side."""
    pieces = argument(node, 0)
    if not all(p in walk for p in pieces) or len({walk[p] for p in pieces}) > 1:
        refuse(node, "stacks tensors that are laid out differently")
    layout = walk[pieces[0]]
    dim = dimension(node, argument(node, 1, "dim", 0), len(layout) + 1)
    return (*layout[:dim], lay.features(len(pieces)), *layout[dim:])


@rule(aten.glu.default)
def glu(walk: Walk, node: fx.Node) -> Layout:
    """Gate one half of the features with the other."""
    return _resized(walk, node, argument(node, 1, "dim", -1), "gates")


@rule(aten.repeat_interleave.self_int)
def repeat(walk: Walk, node: fx.Node) -> Layout:
    """Repeat features, such as the heads of grouped queries."""
    return _resized(walk, node, argument(node, 2, "dim"), "repeats")


def _resized(walk: Walk, node: fx.Node, dim: Any, does: str) -> Layout:
    layout = walk[node.args[0]]
    at = dimension(node, dim, len(layout))
    need_features(node, layout, [at], does)
    return (*layout[:at], lay.features(sizes_of(node)[at]), *layout[at + 1 :])


@rule(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
def create(walk: Walk, node: fx.Node) -> Layout:
    """A fresh tensor, such as the coin tosses of drop path: it must not be as long as the tokens."""
    if any(lay.size(d) in sizes_of(node)[1:] for d in walk[node.args[0]] if lay.has(d, "tokens")):
        refuse(node, "makes a tensor that may have an entry per token")
    return tuple(lay.features(s) for s in sizes_of(node))
