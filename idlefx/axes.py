"""Follow the token axis through a region of a graph, operation by operation.

Each rule takes a node whose inputs are understood and says how its output is laid out, and what must change
when only some of the tokens are there: operands read by position, sizes, slice bounds. What has no rule is
refused, and so is everything that would mix tokens outside attention.

To support another operation, add it to a rule or write one: `@rule(aten.my_op.default)` over a function from
`(walk, node)` to a layout.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from idlefx import layouts as lay
from idlefx.graph import Call
from idlefx.layouts import Layout
from idlefx.walk import (
    Cut,
    Resize,
    Walk,
    argument,
    broadcast,
    dimension,
    need_features,
    read_by_position,
    refuse,
    sizes_of,
)

aten = torch.ops.aten

Rule = Callable[[Walk, Call], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def follow(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Layout]) -> Walk:
    """Follow the tokens through `nodes`, which are in graph order.

    Args:
        nodes: The region.
        known: Layouts of the nodes that the region starts from.

    Raises:
        UnknownOperation: An operation has no rule, or mixes tokens.
    """
    walk = Walk(dict(known))
    for node in nodes:
        _check_mutation(node)
        walk.layouts[node] = rule_of(node)(walk, node)
    return walk


def rule_of(node: Call) -> Rule:
    """The rule for a node's operation.

    Raises:
        UnknownOperation: There is none.
    """
    if node.target not in RULES and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    if node.target not in RULES:
        refuse(node, "has no rule: it is not known whether it mixes tokens")
    return RULES[node.target]


def _check_mutation(node: Call) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or len(changed.users) > 1:
            refuse(node, "writes into a tensor that is read elsewhere; use the form without the underscore")


# One tensor in, the same layout out.


@rule(
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.bernoulli_.float, aten.zeros_like.default, aten.ones_like.default, aten.dropout_.default,
)  # fmt: skip
def same(walk: Walk, node: Call) -> Layout:
    """Nothing moves."""
    first = node.args[0]
    return walk[first] if first in walk else tuple(lay.features(s) for s in sizes_of(node))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def normalize(walk: Walk, node: Call) -> Layout:
    """Statistics over the trailing dimensions."""
    layout = walk[node.args[0]]
    rank = len(layout)
    need_features(node, layout, range(rank - len(node.args[1]), rank), "normalises")
    return layout


@rule(aten.batch_norm.default)
def batch_norm(walk: Walk, node: Call) -> Layout:
    """Recorded statistics are a scale per feature; those of train mode are taken over the tokens."""
    layout = walk[node.args[0]]
    if node.args[5]:
        refuse(node, "takes statistics over the tokens")
    need_features(node, layout, [1], "scales")
    return layout


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(walk: Walk, node: Call) -> Layout:
    """Over features; or over the keys of an attention map, which has queries on another token axis."""
    layout = walk[node.args[0]]
    dim = dimension(node, node.args[1], len(layout))
    if not (lay.is_tokens(layout[dim]) and sum(lay.is_tokens(d) for d in layout) == 2):
        need_features(node, layout, [dim], "takes a softmax")
    return layout


# Several tensors, broadcast.


def pointwise(walk: Walk, node: Call) -> Layout:
    """Any operation that torch tags as pointwise."""
    return broadcast(walk, node, node.all_input_nodes, len(sizes_of(node)))


# Products and statistics.


@rule(aten.linear.default)
def linear(walk: Walk, node: Call) -> Layout:
    """Contract the last dimension with outside weights."""
    x = node.args[0]
    if x not in walk or any(w in walk for w in node.args[1:]):
        refuse(node, "takes its weights from the image")
    need_features(node, walk[x], [len(walk[x]) - 1], "contracts")
    return (*walk[x][:-1], lay.features(sizes_of(node)[-1]))


@rule(aten.addmm.default)
def addmm(walk: Walk, node: Call) -> Layout:
    """A product with an outside matrix, plus an outside bias per feature."""
    bias, x, weight = node.args[:3]
    if x not in walk or weight in walk or bias in walk or len(sizes_of(bias)) > 1:
        refuse(node, "takes its weights from the image")
    need_features(node, walk[x], [1], "contracts")
    return (walk[x][0], lay.features(sizes_of(node)[1]))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(walk: Walk, node: Call) -> Layout:
    """Contract features; or the keys of an attention map with their values."""
    a, b = node.args[:2]
    if b not in walk:
        return _outside_product(walk, node, a, b)
    if a not in walk:
        refuse(node, "multiplies tokens with an outside matrix from the left")
    left, right = walk[a], walk[b]
    if len(left) != len(right) or any(x and y and x != y for x, y in zip(left[:-2], right[:-2], strict=True)):
        refuse(node, "multiplies tensors that are laid out differently")
    is_map = lay.is_tokens(left[-1]) and lay.is_tokens(left[-2]) and right[-2] == left[-1]
    if not is_map:
        need_features(node, left, [len(left) - 1], "contracts")
        need_features(node, right, [len(right) - 2], "contracts")
    stack = tuple(x or y for x, y in zip(left[:-2], right[:-2], strict=True))
    return (*stack, left[-2], right[-1])


def _outside_product(walk: Walk, node: Call, a: Call, b: Call) -> Layout:
    given, layout = sizes_of(b), walk[a]
    need_features(node, layout, [len(layout) - 1], "contracts")
    if len(given) > len(layout) or any(
        s != 1 and lay.has(layout[d - len(given)], "tokens", "batch") for d, s in enumerate(given[:-2])
    ):
        refuse(node, "multiplies with a stack of outside matrices")
    return layout[:-1] if len(given) == 1 else (*layout[:-1], lay.features(given[-1]))


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim,
    aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
def reduce(walk: Walk, node: Call) -> Layout:
    """A statistic over features."""
    layout = walk[node.args[0]]
    at = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    given = argument(node, at, "dim")
    wanted = range(len(layout)) if given is None else [given] if isinstance(given, int) else given
    dims = {dimension(node, d, len(layout)) for d in wanted}
    need_features(node, layout, dims, "takes a statistic")
    if len(sizes_of(node)) == len(layout):
        return tuple(() if d in dims else dim for d, dim in enumerate(layout))
    return tuple(dim for d, dim in enumerate(layout) if d not in dims)


@rule(aten.scaled_dot_product_attention.default)
def attention(walk: Walk, node: Call) -> Layout:
    """The one place where tokens are mixed: over all tokens of the sequence, in one order."""
    q, k, v = node.args[:3]
    if not all(operand in walk for operand in (q, k, v)):
        refuse(node, "takes queries, keys or values from outside the block")
    query, key, val = walk[q], walk[k], walk[v]
    if not (lay.is_tokens(query[-2]) and lay.is_tokens(key[-2]) and val[-2] == key[-2]):
        refuse(node, "does not attend over the token axis")
    if lay.has((*query[-1], *key[-1], *val[-1]), "tokens", "batch"):
        refuse(node, "has tokens or the batch among its features")
    mask = argument(node, 3, "attn_mask")
    scores = (*query[:-1], key[-2])
    if mask in walk:
        broadcast(walk, node, [mask], len(scores))
    elif mask is not None:
        read_by_position(walk, node, mask, scores)
    return (*query[:-1], val[-1])


# Dimensions split, merged and moved.


@rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(walk: Walk, node: Call) -> Layout:
    """Split and merge dimensions; the token axis stays whole."""
    return _regrouped(walk, node, 1, 0)


@rule(aten.unflatten.int)
def unflatten(walk: Walk, node: Call) -> Layout:
    """Split one dimension."""
    return _regrouped(walk, node, 2, dimension(node, node.args[1], len(walk[node.args[0]])))


def _regrouped(walk: Walk, node: Call, arg: int, first: int) -> Layout:
    found = lay.regroup(walk[node.args[0]], sizes_of(node))
    if found is None:
        refuse(node, "breaks up the token axis (windows or a grid of patches)")
    for entry, given in enumerate(node.args[arg]):
        if lay.has(found[first + entry], "tokens") and given != -1:
            walk.edit(node, Resize(arg, entry, found[first + entry]))
    return found


@rule(aten.flatten.using_ints, aten.squeeze.default)
def flatten(walk: Walk, node: Call) -> Layout:
    """Merge dimensions; no size is written down."""
    found = lay.regroup(walk[node.args[0]], sizes_of(node))
    return found if found is not None else refuse(node, "breaks up the token axis")


@rule(aten.expand_as.default)
def expand_as(walk: Walk, node: Call) -> Layout:
    """Repeat dimensions of size one until the shape is that of another tensor."""
    return broadcast(walk, node, node.args[:2], len(sizes_of(node)))


@rule(aten.conv1d.default)
def convolution(walk: Walk, node: Call) -> Layout:
    """One token at a time if the kernel covers one; else it mixes neighbours."""
    layout, weight = walk[node.args[0]], node.args[1]
    if sizes_of(weight)[2] != 1 or sizes_of(node)[2] != lay.size(layout[2]):
        refuse(node, "convolves over neighbouring tokens")
    need_features(node, layout, [1], "contracts")
    return (layout[0], lay.features(sizes_of(node)[1]), layout[2])


@rule(aten.conv2d.default, aten.conv2d.padding)
def convolution_2d(walk: Walk, node: Call) -> Layout:
    """A grid of patches, whose neighbours are mixed."""
    return refuse(node, "convolves over neighbouring tokens")


@rule(aten.expand.default)
def expand(walk: Walk, node: Call) -> Layout:
    """Repeat dimensions of size one."""
    layout, wanted = walk[node.args[0]], sizes_of(node)
    new = len(wanted) - len(layout)
    result = []
    for d, size in enumerate(wanted):
        before = layout[d - new] if d >= new else ()
        result.append(before if before and lay.size(before) == size else lay.features(size))
        if lay.has(result[-1], "tokens") and node.args[1][d] != -1:
            walk.edit(node, Resize(1, d, result[-1]))
    return tuple(result)


@rule(aten.permute.default)
def permute(walk: Walk, node: Call) -> Layout:
    """Reorder dimensions."""
    layout = walk[node.args[0]]
    return tuple(layout[d] for d in node.args[1])


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(walk: Walk, node: Call) -> Layout:
    """Swap two dimensions."""
    layout = list(walk[node.args[0]])
    a, b = node.args[1:3]
    layout[a], layout[b] = layout[b], layout[a]
    return tuple(layout)


@rule(aten.t.default, aten.numpy_T.default)
def reverse(walk: Walk, node: Call) -> Layout:
    """All dimensions the other way round."""
    return tuple(reversed(walk[node.args[0]]))


@rule(aten.movedim.int)
def movedim(walk: Walk, node: Call) -> Layout:
    """Move one dimension."""
    layout = list(walk[node.args[0]])
    source, target = (dimension(node, d, len(layout)) for d in node.args[1:3])
    layout.insert(target, layout.pop(source))
    return tuple(layout)


@rule(aten.unsqueeze.default)
def unsqueeze(walk: Walk, node: Call) -> Layout:
    """Insert a dimension of size one."""
    layout = walk[node.args[0]]
    at = dimension(node, node.args[1], len(layout) + 1)
    return (*layout[:at], (), *layout[at:])


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(walk: Walk, node: Call) -> Layout:
    """Remove dimensions of size one."""
    layout, given = walk[node.args[0]], node.args[1]
    dims = {dimension(node, d, len(layout)) for d in ([given] if isinstance(given, int) else given)}
    return tuple(dim for d, dim in enumerate(layout) if d not in dims or lay.size(dim) > 1)


# Parts taken and put together.


@rule(aten.unbind.int)
def unbind(walk: Walk, node: Call) -> tuple[Layout, ...]:
    """Take features apart, such as query, key and value."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 1, "dim", 0), len(layout))
    need_features(node, layout, [dim], "takes tensors apart")
    return tuple((*layout[:dim], *layout[dim + 1 :]) for _ in node.meta["val"])


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(walk: Walk, node: Call) -> tuple[Layout, ...]:
    """Cut features into pieces; tokens too, where the sizes are written down."""
    layout = walk[node.args[0]]
    dim = dimension(node, argument(node, 2, "dim", 0), len(layout))
    pieces = [lay.sizes(piece)[dim] for piece in node.meta["val"]]
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
def getitem(walk: Walk, node: Call) -> Layout:
    """One of several results."""
    found: Layout = walk.layouts[node.args[0]][node.args[1]]
    return found


@rule(aten.select.int)
def select(walk: Walk, node: Call) -> Layout:
    """Pick one entry; of tokens, one whose place is known."""
    layout = walk[node.args[0]]
    dim = dimension(node, node.args[1], len(layout))
    if lay.is_tokens(layout[dim]):
        tokens = layout[dim][0]
        walk.edit(node, Cut(2, node.args[2] % tokens.size, tokens.runs))
    else:
        need_features(node, layout, [dim], "picks an entry")
    return (*layout[:dim], *layout[dim + 1 :])


@rule(aten.slice.Tensor)
def cut(walk: Walk, node: Call) -> Layout:
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
def cat(walk: Walk, node: Call) -> Layout:
    """Join along features, or join runs of tokens."""
    pieces = node.args[0]
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


@rule(aten.stack.default)
def stack(walk: Walk, node: Call) -> Layout:
    """Put tensors of one layout side by side."""
    pieces = node.args[0]
    if not all(p in walk for p in pieces) or len({walk[p] for p in pieces}) > 1:
        refuse(node, "stacks tensors that are laid out differently")
    layout = walk[pieces[0]]
    dim = dimension(node, argument(node, 1, "dim", 0), len(layout) + 1)
    return (*layout[:dim], lay.features(len(pieces)), *layout[dim:])


@rule(aten.glu.default)
def glu(walk: Walk, node: Call) -> Layout:
    """Gate one half of the features with the other."""
    return _resized(walk, node, argument(node, 1, "dim", -1), "gates")


@rule(aten.repeat_interleave.self_int)
def repeat(walk: Walk, node: Call) -> Layout:
    """Repeat features, such as the heads of grouped queries."""
    return _resized(walk, node, argument(node, 2, "dim"), "repeats")


def _resized(walk: Walk, node: Call, dim: Any, does: str) -> Layout:
    layout = walk[node.args[0]]
    at = dimension(node, dim, len(layout))
    need_features(node, layout, [at], does)
    return (*layout[:at], lay.features(sizes_of(node)[at]), *layout[at + 1 :])


@rule(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
def create(walk: Walk, node: Call) -> Layout:
    """A fresh tensor, such as the coin tosses of drop path: it must not be as long as the tokens."""
    if any(lay.size(d) in sizes_of(node)[1:] for d in walk[node.args[0]] if lay.has(d, "tokens")):
        refuse(node, "makes a tensor that may have an entry per token")
    return tuple(lay.features(s) for s in sizes_of(node))


@rule(aten.view_as_complex.default)
def view_as_complex(walk: Walk, node: Call) -> Layout:
    """Pairs of features become complex ones."""
    return walk[node.args[0]][:-1]


@rule(aten.view_as_real.default)
def view_as_real(walk: Walk, node: Call) -> Layout:
    """Complex features become pairs."""
    return (*walk[node.args[0]], lay.features(2))
