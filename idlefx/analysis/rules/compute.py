"""Rules for what computes: tokens pass one by one, but for attention, where they meet."""

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import WholeGrid, WholeWindows
from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import refuse
from idlefx.analysis.rules.registry import rule
from idlefx.analysis.walk import Walk, broadcast, dimension, need_features, read_by_position, sizes_of
from idlefx.graph.queries import argument, tensor_argument

aten = torch.ops.aten


# One tensor in, the same layout out.


@rule(
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.bernoulli_.float, aten.zeros_like.default, aten.ones_like.default, aten.dropout_.default,
)  # fmt: skip
def same(walk: Walk, node: fx.Node) -> Layout:
    """Nothing moves."""
    first = node.args[0]
    return walk[first] if first in walk else tuple(lay.features(s) for s in sizes_of(node))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def normalize(walk: Walk, node: fx.Node) -> Layout:
    """Statistics over the trailing dimensions."""
    layout = walk[node.args[0]]
    rank = len(layout)
    need_features(node, layout, range(rank - len(argument(node, 1)), rank), "normalises")
    return layout


@rule(aten.batch_norm.default)
def batch_norm(walk: Walk, node: fx.Node) -> Layout:
    """Recorded statistics are a scale per feature; those of train mode are taken over the tokens."""
    layout = walk[node.args[0]]
    if node.args[5]:
        refuse(node, "takes statistics over the tokens")
    need_features(node, layout, [1], "scales")
    return layout


@rule(aten.group_norm.default)
def group_norm(walk: Walk, node: fx.Node) -> Layout:
    """Statistics over all dimensions but the batch, for some features at a time."""
    layout = walk[node.args[0]]
    need_features(node, layout, range(1, len(layout)), "normalises")
    return layout


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(walk: Walk, node: fx.Node) -> Layout:
    """Over features; or over the keys of an attention map, which has queries on another token axis."""
    layout = walk[node.args[0]]
    dim = dimension(node, node.args[1], len(layout))
    if not _has_map(layout, layout[dim]):
        need_features(node, layout, [dim], "takes a softmax")
    return layout


def _has_map(layout: Layout, keys: lay.Dim) -> bool:
    """Whether a layout has queries and keys: two dimensions of the same tokens, all of them or those of a window."""
    if lay.partition_of(keys) is not None:
        return sum(dim == keys for dim in layout) == 2
    return lay.is_tokens(keys) and sum(lay.is_tokens(dim) for dim in layout) == 2


@rule(torch.ops.higher_order.wrap_with_autocast)
def autocast(walk: Walk, node: fx.Node) -> Layout:
    """A region is one node, whose inside has number types that the whole would not have."""
    refuse(node, "switches autocast inside the block; switch it around the call of the model instead")


# Several tensors, broadcast.


@rule(
    torch.Tag.pointwise, aten.hardswish.default, aten.log_sigmoid.default, aten.absolute.default, aten.negative.default,
    aten.multiply.Tensor, aten.divide.Tensor, aten.subtract.Tensor, aten.rsub.Tensor, aten.special_expit.default,
    aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip
def pointwise(walk: Walk, node: fx.Node) -> Layout:
    """Any operation that torch tags as pointwise, or forgot to."""
    return broadcast(walk, node, node.all_input_nodes, len(sizes_of(node)))


@rule(aten.prelu.default)
def prelu(walk: Walk, node: fx.Node) -> Layout:
    """One slope for all numbers, or one for each entry of dimension 1, which then holds features."""
    layout, slopes = walk[node.args[0]], tensor_argument(node, 1)
    if slopes in walk:
        refuse(node, "takes its weights from the image")
    if sizes_of(slopes) not in ([], [1]):
        need_features(node, layout, [1], "scales")
    return layout


# Products and statistics.


@rule(aten.linear.default)
def linear(walk: Walk, node: fx.Node) -> Layout:
    """Contract the last dimension with outside weights."""
    x = node.args[0]
    if x not in walk or any(w in walk for w in node.args[1:]):
        refuse(node, "takes its weights from the image")
    need_features(node, walk[x], [len(walk[x]) - 1], "contracts")
    return (*walk[x][:-1], lay.features(sizes_of(node)[-1]))


@rule(aten.addmm.default)
def addmm(walk: Walk, node: fx.Node) -> Layout:
    """A product with an outside matrix, plus an outside bias per feature."""
    bias, x, weight = (tensor_argument(node, at) for at in range(3))
    if x not in walk or weight in walk or bias in walk or len(sizes_of(bias)) > 1:
        refuse(node, "takes its weights from the image")
    need_features(node, walk[x], [1], "contracts")
    return (walk[x][0], lay.features(sizes_of(node)[1]))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(walk: Walk, node: fx.Node) -> Layout:
    """Contract features; or the keys of an attention map with their values, on either side of it."""
    a, b = tensor_argument(node, 0), tensor_argument(node, 1)
    if b not in walk:
        return _outside_product(walk, node, a, b)
    if a not in walk:
        return _product_from_left(walk, node, a, b)
    left, right = walk[a], walk[b]
    if len(left) != len(right) or any(x and y and x != y for x, y in zip(left[:-2], right[:-2], strict=True)):
        refuse(node, "multiplies tensors that are laid out differently")
    of_map = any(lay.is_axis(x[-1]) and lay.is_axis(x[-2]) for x in (left, right)) and right[-2] == left[-1]
    if not of_map:
        need_features(node, left, [len(left) - 1], "contracts")
        need_features(node, right, [len(right) - 2], "contracts")
    stack = tuple(x or y for x, y in zip(left[:-2], right[:-2], strict=True))
    return (*stack, left[-2], right[-1])


def _outside_product(walk: Walk, node: fx.Node, a: fx.Node, b: fx.Node) -> Layout:
    sizes, layout = sizes_of(b), walk[a]
    need_features(node, layout, [len(layout) - 1], "contracts")
    result = layout[:-1] if len(sizes) == 1 else (*layout[:-1], lay.features(sizes[-1]))
    own = [layout[d - len(sizes)] for d, s in enumerate(sizes[:-2]) if s != 1] if len(sizes) <= len(layout) else None
    if own is None or any(lay.has(dim, "batch") for dim in own):
        refuse(node, "multiplies with a stack of outside matrices")
    if any(lay.has(dim, "tokens") for dim in own):  # a matrix for each row or column, as of a relative position
        if sides := tuple(side for dim in own for side in lay.sides_of(dim)):
            walk.edit(node, WholeWindows(sides))
            return result
        grid = lay.grid_of(layout)
        if not grid:
            refuse(node, "multiplies with a stack of outside matrices")
        walk.edit(node, WholeGrid(a, layout, result, grid))
    return result


def _product_from_left(walk: Walk, node: fx.Node, a: fx.Node, b: fx.Node) -> Layout:
    """Outside vectors times the features of each token, such as those of positions times queries."""
    sizes, layout = sizes_of(a), walk[b]
    stack = [layout[d - len(sizes)] for d, s in enumerate(sizes[:-2]) if s != 1] if len(sizes) <= len(layout) else None
    if len(sizes) < 2 or len(layout) < 2 or stack is None or any(lay.has(dim, "tokens", "batch") for dim in stack):
        refuse(node, "multiplies with a stack of outside matrices")
    if lay.has(layout[-2], "tokens"):
        refuse(node, "multiplies tokens with an outside matrix from the left")
    need_features(node, layout, [len(layout) - 2], "contracts")
    shared = (lay.features(size) for size in sizes_of(node)[:-2])
    return (*(own or new for own, new in zip(layout[:-2], shared, strict=True)), lay.features(sizes[-2]), layout[-1])


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim,
    aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
def reduce(walk: Walk, node: fx.Node) -> Layout:
    """A statistic over features."""
    layout = walk[node.args[0]]
    at = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    over = argument(node, at, "dim")
    over = range(len(layout)) if over is None else [over] if isinstance(over, int) else over
    dims = {dimension(node, d, len(layout)) for d in over}
    need_features(node, layout, dims, "takes a statistic")
    if len(sizes_of(node)) == len(layout):
        return tuple(() if d in dims else dim for d, dim in enumerate(layout))
    return tuple(dim for d, dim in enumerate(layout) if d not in dims)


@rule(aten.max.dim, aten.min.dim)
def extreme(walk: Walk, node: fx.Node) -> tuple[Layout, Layout]:
    """The largest or smallest over one dimension of features, and where it stands."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 1, "dim"), len(layout))
    need_features(node, layout, [dim], "takes a statistic")
    left = ((),) if argument(node, 2, "keepdim", False) else ()
    found = (*layout[:dim], *left, *layout[dim + 1 :])
    return found, found


@rule(aten.scaled_dot_product_attention.default)
def attention(walk: Walk, node: fx.Node) -> Layout:
    """The one place where tokens are mixed: over all tokens of the sequence, in one order."""
    q, k, v = node.args[:3]
    if not all(operand in walk for operand in (q, k, v)):
        refuse(node, "takes queries, keys or values from outside the block")
    query, key, val = walk[q], walk[k], walk[v]
    if not (_attends(query, key) and val[-2] == key[-2]):
        refuse(node, "does not attend over the token axis")
    if lay.has((*query[-1], *key[-1], *val[-1]), "tokens", "batch"):
        refuse(node, "has tokens or the batch among its features")
    mask = argument(node, 3, "attn_mask")
    scores = (*query[:-1], key[-2])
    if mask is not None:
        read_by_position(walk, node, mask, scores)
    return (*query[:-1], val[-1])


def _attends(query: Layout, key: Layout) -> bool:
    """Whether queries and keys are tokens of one sequence, or all of the same windows."""
    if lay.partition_of(query[-2]) is None:
        return lay.is_tokens(query[-2]) and lay.is_tokens(key[-2])
    held = [[side for dim in each[:-2] for side in lay.sides_of(dim)] for each in (query, key)]
    return query[-2] == key[-2] and held[0] == held[1]
