"""Follow the token axis through a region of a graph, operation by operation.

Each rule takes a node whose inputs are understood and says how its output is laid out, and what must change
when only some of the tokens are there: operands read by position, sizes, slice bounds. What has no rule is
refused, and so is everything that would mix tokens outside attention.

To support another operation, add it to a rule or write one: `@rule(aten.my_op.default)` over a function from
`(walk, node)` to a layout.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from idlefx import layouts as lay
from idlefx.errors import UnknownOperation
from idlefx.graph import source_line, value
from idlefx.layouts import Dim, Layout, Runs

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """An operand from outside the region that is read by token position: take the working tokens' part.

    Attributes:
        operand: The outside node.
        dims: Pairs of an output dimension and the runs of tokens along it.
        rank: Rank of the output that the operand is broadcast to.
        batch_dim: Where the output's batch stands.
    """

    operand: fx.Node
    dims: tuple[tuple[int, Runs], ...]
    rank: int
    batch_dim: int


@dataclass(frozen=True)
class Resize:
    """A size given as a literal: argument `arg`, entry `entry`, is the size of `dim`."""

    arg: int
    entry: int
    dim: Dim


@dataclass(frozen=True)
class Cut:
    """Bounds on the token axis: argument `arg` is a place along an axis made of `runs`."""

    arg: int
    place: int
    runs: Runs


Edit = Read | Resize | Cut


@dataclass
class Walk:
    """The state of following one region: layouts found, and edits needed, by node."""

    layouts: dict[fx.Node, Any]
    edits: dict[fx.Node, list[Edit]] = field(default_factory=dict)

    def __getitem__(self, node: Any) -> Layout:
        layout: Layout = self.layouts[node]
        return layout

    def __contains__(self, node: Any) -> bool:
        return node in self.layouts

    def edit(self, node: fx.Node, *edits: Edit) -> None:
        """Note what must change at a node."""
        self.edits.setdefault(node, []).extend(edits)


Rule = Callable[[Walk, fx.Node], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """Refuse a node, naming the operation and the user's line."""
    raise UnknownOperation(f"{node.target} {reason} (at {source_line(node)})")


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
        found = RULES.get(node.target)
        if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found = pointwise
        if found is None:
            refuse(node, "has no rule: it is not known whether it mixes tokens")
        walk.layouts[node] = found(walk, node)
    return walk


def _check_mutation(node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or len(changed.users) > 1:
            refuse(node, "writes into a tensor that is read elsewhere; use the form without the underscore")


def _axis(node: fx.Node, dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        refuse(node, f"has a dimension {dim} that is no constant")
    return dim % rank


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _shape(node: fx.Node) -> list[int]:
    tensor = value(node)
    if tensor is None:
        refuse(node, "carries no tensor")
    return lay.sizes(tensor)


def _need_features(node: fx.Node, layout: Layout, dims: Iterable[int], does: str) -> None:
    for d in dims:
        if lay.has(layout[d], "tokens"):
            refuse(node, f"{does} over the token axis outside attention")
        if lay.has(layout[d], "batch"):
            refuse(node, f"{does} over the batch")


def _broadcast(walk: Walk, node: fx.Node, operands: Iterable[Any], rank: int) -> Layout:
    """The common layout of operands that are broadcast together, their outside parts noted as reads."""
    own = [o for o in operands if o in walk]
    result: list[Dim] = []
    for d in range(rank):
        dims = {walk[o][d - rank] for o in own if len(walk[o]) >= rank - d} - {()}
        if len(dims) > 1:
            refuse(node, "combines tokens with something that is not laid out like them")
        result.append(dims.pop() if dims else ())
    for operand in operands:
        if isinstance(operand, fx.Node) and operand not in walk and value(operand) is not None:
            _read(walk, node, operand, tuple(result))
            shape = _shape(operand)
            for d in range(rank - len(shape), rank):
                result[d] = result[d] or lay.features(shape[d - rank])
    return tuple(result)


def _read(walk: Walk, node: fx.Node, operand: fx.Node, output: Layout, skip: int | None = None) -> None:
    shape, rank = _shape(operand), len(output)
    read = []
    for d in range(max(rank - len(shape), 0), rank):
        if shape[d - rank] == 1 or not lay.has(output[d], "tokens") or d == skip:
            continue
        if not lay.is_tokens(output[d]):
            refuse(node, f"reads `{operand.name}` by position along an axis that tokens share")
        read.append((d, output[d][0].runs))
    if read:
        batch_dims = [d for d, dim in enumerate(output) if len(dim) == 1 and dim[0].role == "batch"]
        if not batch_dims:
            refuse(node, f"reads `{operand.name}` by position where the batch has no axis of its own")
        walk.edit(node, Read(operand, tuple(read), rank, batch_dims[0]))


@rule(
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.bernoulli_.float, aten.zeros_like.default, aten.ones_like.default,
)  # fmt: skip
def same(walk: Walk, node: fx.Node) -> Layout:
    """One tensor in, the same layout out."""
    first = node.args[0]
    if first not in walk:
        return tuple(lay.features(s) for s in _shape(node))
    return walk[first]


def pointwise(walk: Walk, node: fx.Node) -> Layout:
    """Any operation that torch tags as pointwise."""
    return _broadcast(walk, node, node.all_input_nodes, len(_shape(node)))


@rule(aten.linear.default)
def linear(walk: Walk, node: fx.Node) -> Layout:
    """Contract the last dimension with outside weights."""
    x = node.args[0]
    if x not in walk or any(w in walk for w in node.args[1:]):
        refuse(node, "takes its weights from the image")
    _need_features(node, walk[x], [len(walk[x]) - 1], "contracts")
    return (*walk[x][:-1], lay.features(_shape(node)[-1]))


@rule(aten.matmul.default, aten.bmm.default)
def matmul(walk: Walk, node: fx.Node) -> Layout:
    """Batched product: the contracted dimension must hold features."""
    a, b = node.args[:2]
    shape = _shape(node)
    for operand, d in ((a, -1), (b, -2)):
        if operand in walk:
            _need_features(node, walk[operand], [d], "contracts")
    if a not in walk or b not in walk:
        outside = b if a in walk else a
        own = walk[a] if a in walk else walk[b]
        if len(_shape(outside)) > 2 or len(own) < 2:
            refuse(node, "multiplies with a stack of outside matrices")
        return (*own[:-1], lay.features(shape[-1])) if a in walk else (
            *own[:-2], lay.features(shape[-2]), own[-1])  # fmt: skip
    left, right = walk[a], walk[b]
    if len(left) != len(right) or any(x and y and x != y for x, y in zip(left[:-2], right[:-2], strict=True)):
        refuse(node, "multiplies tensors that are laid out differently")
    stack = tuple(x or y for x, y in zip(left[:-2], right[:-2], strict=True))
    return (*stack, left[-2], right[-1])


@rule(aten.layer_norm.default, aten.rms_norm.default)
def normalize(walk: Walk, node: fx.Node) -> Layout:
    """Normalise the trailing dimensions."""
    layout = walk[node.args[0]]
    rank = len(layout)
    _need_features(node, layout, range(rank - len(node.args[1]), rank), "normalises")
    return layout


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(walk: Walk, node: fx.Node) -> Layout:
    """A softmax over features."""
    layout = walk[node.args[0]]
    _need_features(node, layout, [_axis(node, node.args[1], len(layout))], "takes a softmax")
    return layout


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim,
    aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
def reduce(walk: Walk, node: fx.Node) -> Layout:
    """A statistic over features."""
    layout = walk[node.args[0]]
    at = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    given = _arg(node, at, "dim")
    wanted = range(len(layout)) if given is None else [given] if isinstance(given, int) else given
    dims = {_axis(node, d, len(layout)) for d in wanted}
    _need_features(node, layout, dims, "takes a statistic")
    if len(_shape(node)) == len(layout):
        return tuple(() if d in dims else dim for d, dim in enumerate(layout))
    return tuple(dim for d, dim in enumerate(layout) if d not in dims)


@rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(walk: Walk, node: fx.Node) -> Layout:
    """Split and merge dimensions; the token axis stays whole."""
    return _regrouped(walk, node, 1, 0)


@rule(aten.flatten.using_ints, aten.squeeze.default)
def flatten(walk: Walk, node: fx.Node) -> Layout:
    """Merge dimensions; no size is written down."""
    found = lay.regroup(walk[node.args[0]], _shape(node))
    return found if found is not None else refuse(node, "breaks up the token axis")


@rule(aten.unflatten.int)
def unflatten(walk: Walk, node: fx.Node) -> Layout:
    """Split one dimension."""
    return _regrouped(walk, node, 2, _axis(node, node.args[1], len(walk[node.args[0]])))


def _regrouped(walk: Walk, node: fx.Node, arg: int, first: int) -> Layout:
    shape = _shape(node)
    found = lay.regroup(walk[node.args[0]], shape)
    if found is None:
        refuse(node, "breaks up the token axis (windows or a grid of patches)")
    for entry in range(len(node.args[arg])):
        if lay.has(found[first + entry], "tokens") and node.args[arg][entry] != -1:
            walk.edit(node, Resize(arg, entry, found[first + entry]))
    return found


@rule(aten.expand.default)
def expand(walk: Walk, node: fx.Node) -> Layout:
    """Repeat dimensions of size one."""
    layout, shape = walk[node.args[0]], _shape(node)
    new = len(shape) - len(layout)
    result = []
    for d, wanted in enumerate(shape):
        before = layout[d - new] if d >= new else ()
        result.append(before if before and lay.size(before) == wanted else lay.features(wanted))
        if lay.has(result[-1], "tokens") and node.args[1][d] != -1:
            walk.edit(node, Resize(1, d, result[-1]))
    return tuple(result)


@rule(aten.permute.default)
def permute(walk: Walk, node: fx.Node) -> Layout:
    """Reorder dimensions."""
    layout = walk[node.args[0]]
    return tuple(layout[d] for d in node.args[1])


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(walk: Walk, node: fx.Node) -> Layout:
    """Swap two dimensions."""
    layout = list(walk[node.args[0]])
    a, b = node.args[1:3]
    layout[a], layout[b] = layout[b], layout[a]
    return tuple(layout)


@rule(aten.t.default)
def t(walk: Walk, node: fx.Node) -> Layout:
    """Swap the dimensions of a matrix."""
    return tuple(reversed(walk[node.args[0]]))


@rule(aten.unsqueeze.default)
def unsqueeze(walk: Walk, node: fx.Node) -> Layout:
    """Insert a dimension of size one."""
    layout = walk[node.args[0]]
    at = _axis(node, node.args[1], len(layout) + 1)
    return (*layout[:at], (), *layout[at:])


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(walk: Walk, node: fx.Node) -> Layout:
    """Remove dimensions of size one."""
    layout, given = walk[node.args[0]], node.args[1]
    dims = {_axis(node, d, len(layout)) for d in ([given] if isinstance(given, int) else given)}
    return tuple(dim for d, dim in enumerate(layout) if d not in dims or lay.size(dim) > 1)


@rule(aten.unbind.int)
def unbind(walk: Walk, node: fx.Node) -> tuple[Layout, ...]:
    """Take features apart, such as query, key and value."""
    layout = walk[node.args[0]]
    dim = _axis(node, _arg(node, 1, "dim", 0), len(layout))
    _need_features(node, layout, [dim], "takes tensors apart")
    return tuple((*layout[:dim], *layout[dim + 1 :]) for _ in node.meta["val"])


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(walk: Walk, node: fx.Node) -> tuple[Layout, ...]:
    """Cut features into pieces."""
    layout = walk[node.args[0]]
    dim = _axis(node, _arg(node, 2, "dim", 0), len(layout))
    _need_features(node, layout, [dim], "cuts")
    pieces = [lay.sizes(piece)[dim] for piece in node.meta["val"]]
    return tuple((*layout[:dim], lay.features(piece), *layout[dim + 1 :]) for piece in pieces)


@rule(operator.getitem)
def getitem(walk: Walk, node: fx.Node) -> Layout:
    """One of several results."""
    found: Layout = walk.layouts[node.args[0]][node.args[1]]
    return found


@rule(aten.select.int)
def select(walk: Walk, node: fx.Node) -> Layout:
    """Pick one entry; of tokens, one whose place is known."""
    layout = walk[node.args[0]]
    dim = _axis(node, node.args[1], len(layout))
    rest = (*layout[:dim], *layout[dim + 1 :])
    if lay.is_tokens(layout[dim]):
        axis = layout[dim][0]
        place = node.args[2] % axis.size
        walk.edit(node, Cut(2, place, axis.runs))
        return rest
    _need_features(node, layout, [dim], "picks an entry")
    return rest


@rule(aten.slice.Tensor)
def slice_(walk: Walk, node: fx.Node) -> Layout:
    """Cut a range out of a dimension; of tokens, one whose bounds are known."""
    layout = walk[node.args[0]]
    dim = _axis(node, _arg(node, 1, "dim", 0), len(layout))
    size = lay.size(layout[dim])
    if _shape(node)[dim] == size and not (len(node.args) > 4 and node.args[4] < 0):
        return layout
    if not lay.is_tokens(layout[dim]):
        _need_features(node, layout, [dim], "cuts")
        return (*layout[:dim], lay.features(_shape(node)[dim]), *layout[dim + 1 :])
    runs = layout[dim][0].runs
    start, stop, step = _arg(node, 2, "start") or 0, _arg(node, 3, "end"), _arg(node, 4, "step", 1)
    if step != 1 or not isinstance(start, int) or not (stop is None or isinstance(stop, int)):
        refuse(node, "cuts the token axis with a step or with computed bounds")
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = size if stop is None else max(stop + size, 0) if stop < 0 else min(stop, size)
    walk.edit(node, Cut(2, start, runs), *([Cut(3, stop, runs)] if len(node.args) > 3 else []))
    return (*layout[:dim], lay.token_axis(lay.cut(runs, start, stop)), *layout[dim + 1 :])


@rule(aten.cat.default)
def cat(walk: Walk, node: fx.Node) -> Layout:
    """Join along features, or join runs of tokens."""
    pieces = node.args[0]
    own = [walk[p] for p in pieces if p in walk]
    dim = _axis(node, _arg(node, 1, "dim", 0), len(own[0]))
    others = {(*layout[:dim], *layout[dim + 1 :]) for layout in own}
    if len(others) > 1:
        refuse(node, "joins tensors that are laid out differently")
    if lay.has(own[0][dim], "tokens"):
        if len(own) < len(pieces) or not all(lay.is_tokens(layout[dim]) for layout in own):
            refuse(node, "joins tokens of this sequence with others")
        runs = lay.merge(tuple(run for layout in own for run in layout[dim][0].runs))
        return (*own[0][:dim], lay.token_axis(runs), *own[0][dim + 1 :])
    _need_features(node, own[0], [dim], "joins")
    result = (*own[0][:dim], lay.features(_shape(node)[dim]), *own[0][dim + 1 :])
    for piece in pieces:
        if piece not in walk:
            _read(walk, node, piece, result, skip=dim)
    return result


@rule(aten.stack.default)
def stack(walk: Walk, node: fx.Node) -> Layout:
    """Put tensors of one layout side by side."""
    pieces = node.args[0]
    if not all(p in walk for p in pieces) or len({walk[p] for p in pieces}) > 1:
        refuse(node, "stacks tensors that are laid out differently")
    layout = walk[pieces[0]]
    dim = _axis(node, _arg(node, 1, "dim", 0), len(layout) + 1)
    return (*layout[:dim], lay.features(len(pieces)), *layout[dim:])


@rule(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
def create(walk: Walk, node: fx.Node) -> Layout:
    """A fresh tensor, such as the coin tosses of drop path: it must not be as long as the tokens."""
    if any(lay.size(d) in _shape(node)[1:] for d in walk[node.args[0]] if lay.has(d, "tokens")):
        refuse(node, "makes a tensor that may have an entry per token")
    return tuple(lay.features(s) for s in _shape(node))


@rule(aten.glu.default)
def glu(walk: Walk, node: fx.Node) -> Layout:
    """Gate one half of the features with the other."""
    layout = walk[node.args[0]]
    dim = _axis(node, _arg(node, 1, "dim", -1), len(layout))
    _need_features(node, layout, [dim], "cuts")
    return (*layout[:dim], lay.features(_shape(node)[dim]), *layout[dim + 1 :])


@rule(aten.repeat_interleave.self_int)
def repeat(walk: Walk, node: fx.Node) -> Layout:
    """Repeat features, such as the heads of grouped queries."""
    layout = walk[node.args[0]]
    dim = _axis(node, _arg(node, 2, "dim"), len(layout))
    _need_features(node, layout, [dim], "repeats")
    return (*layout[:dim], lay.features(_shape(node)[dim]), *layout[dim + 1 :])


@rule(aten.view_as_complex.default)
def view_as_complex(walk: Walk, node: fx.Node) -> Layout:
    """Pairs of features become complex ones."""
    return walk[node.args[0]][:-1]


@rule(aten.view_as_real.default)
def view_as_real(walk: Walk, node: fx.Node) -> Layout:
    """Complex features become pairs."""
    return (*walk[node.args[0]], lay.features(2))


@rule(aten.scaled_dot_product_attention.default)
def attention(walk: Walk, node: fx.Node) -> Layout:
    """The one place where tokens are mixed: over all tokens of the sequence, in one order."""
    q, k, v = node.args[:3]
    if not all(operand in walk for operand in (q, k, v)):
        refuse(node, "takes queries, keys or values from outside the block")
    query, key, val = walk[q], walk[k], walk[v]
    if not (lay.is_tokens(query[-2]) and lay.is_tokens(key[-2]) and val[-2] == key[-2]):
        refuse(node, "does not attend over the token axis")
    if lay.has((*query[-1], *key[-1], *val[-1]), "tokens", "batch"):
        refuse(node, "has tokens or the batch among its features")
    mask = _arg(node, 3, "attn_mask")
    scores = (*query[:-1], key[-2])
    if mask in walk:
        _broadcast(walk, node, [mask], len(scores))
    elif mask is not None:
        _read(walk, node, mask, scores)
    return (*query[:-1], val[-1])
