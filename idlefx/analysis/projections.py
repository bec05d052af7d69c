"""Find queries and keys that are plain views of one linear layer's output.

Where both are, the mean logit of one query on all tokens is a dot product with one vector: the keys of all
tokens need never be computed.
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Rearrange
from idlefx.analysis.layouts import Layout
from idlefx.analysis.standing import in_stream_order
from idlefx.analysis.walk import Walk
from idlefx.graph.queries import argument
from idlefx.graph.sizes import FREE_BATCH, SMALL_BATCH, number, shape_of

aten = torch.ops.aten

VIEWS = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, operator.getitem,
}  # fmt: skip
_LAYERS = (aten.linear.default, aten.conv2d.default)
# The numbers are not laid out in memory as the features were, so that a view may need to be a copy.
_FREE = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


@dataclass(frozen=True)
class Projection:
    """Features that are rows of one linear layer, in the order of heads and head features.

    Attributes:
        linear: The linear node; its input holds (batch, tokens, features) in any order with features last, the tokens
            in one dimension or in the rows and columns of a grid. Or a convolution of one patch, over (B, C, H, W).
        start: First row.
        groups: How many runs of rows there are.
        stride: Rows from one run to the next.
        width: Rows of a run.
        factor: What the features were multiplied with since.
    """

    linear: fx.Node
    start: int
    groups: int
    stride: int
    width: int
    factor: float = 1.0

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """What `ops.take_rows` wants to know."""
        return self.start, self.groups, self.stride, self.width

    @property
    def convolves(self) -> bool:
        """Whether the layer is a convolution, which has the features in front of the tokens."""
        return self.linear.target is aten.conv2d.default

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the layer, in order."""
        return self.rows[:2] == (0, 1) and self.width == shape_of(self.linear)[1 if self.convolves else -1]


def projection(walk: Walk, node: fx.Node, *, up_to_scale: bool = False) -> Projection | None:
    """The linear layer that `node` is a view of, found by sending row numbers through the views.

    Args:
        walk: Layouts of the block.
        node: Queries or keys with a token axis of their own.
        up_to_scale: Look through products with a positive number, which order the logits as before; their product
            is the `factor`.
    """
    if isinstance(node.meta["val"], (list, tuple)):
        return None
    path: list[fx.Node] = []
    current: fx.Node = node
    factor = 1.0
    while current.target in VIEWS or (up_to_scale and _is_scaling(current)):
        if not _is_scaling(current):
            path.append(current)
        else:
            by = argument(current, 1)
            factor *= by if current.target is aten.mul.Tensor else 1 / by
        current = current.all_input_nodes[0]
    if current.target not in _LAYERS or current not in walk or node not in walk:
        return None
    features = _features_dim(current, lay.flat(walk[current]))
    same = walk.windows is not None or _same_tokens(walk[current], walk[node])  # in whatever order
    if features is None or not same or not all(stream_source(walk, i) for i in current.all_input_nodes if i in walk):
        return None
    images = math.prod(f.size for dim in walk[node] for f in dim if f.role == "batch")
    if walk.has_batch and images % FREE_BATCH:
        return None  # the batch is fixed
    batch = SMALL_BATCH * images // FREE_BATCH if walk.has_batch else 1
    shape = shape_of(current, SMALL_BATCH)
    numbers: Any = torch.arange(shape[features]).view(-1, *(1,) * (-1 - features)).expand(shape)
    for step in reversed(path):
        args, kwargs = _with_numbers(step, numbers)
        view: Any = step.target
        numbers = _FREE.get(view, view)(*args, **kwargs)
    rows = _pattern(current, _by_token(numbers, walk[node], batch))
    return rows and replace(rows, factor=factor)


def stream_source(walk: Walk, node: fx.Node) -> fx.Node | None:
    """Where the tokens of a node stand in the stream's own order: itself, or what was moved to make it."""
    edits = [edit for edit in walk.edits.get(node, []) if isinstance(edit, Rearrange)]
    source = edits[0].source if edits else node
    return None if any(f.partition for dim in in_stream_order(walk[source], walk.grid) for f in dim) else source


def _with_numbers(step: fx.Node, numbers: Any) -> tuple[Any, Any]:
    """A view's arguments, its tensor replaced by the numbers and every free size by that of the small batch."""
    tensor = step.all_input_nodes[0]
    return map_arg((step.args, step.kwargs), lambda n: numbers if n is tensor else number(n, SMALL_BATCH))


def _is_scaling(node: fx.Node) -> bool:
    factor = node.args[1] if len(node.args) > 1 else None
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(factor, (int, float)) and factor > 0


def _features_dim(layer: fx.Node, layout: Layout) -> int | None:
    """Where a layer has its features, counted from the last dimension; None if its batch or tokens have no own axis."""
    roles = [dim[0].role if len(dim) == 1 else "?" for dim in layout]
    if layer.target is aten.linear.default:
        if any(f.partition for dim in layout for f in dim):
            alone = not layout[-1][0].role and all(f.role for dim in layout[:-1] for f in dim)
            return -1 if alone else None
        return -1 if roles in (["batch", "tokens", ""], ["tokens", "batch", ""], ["tokens", ""]) else None
    return -3 if roles == ["batch", "", "tokens"] and argument(layer, 6, "groups", 1) == 1 else None


def _same_tokens(a: Layout, b: Layout) -> bool:
    """Whether two layouts hold the same tokens."""
    held = [[f for dim in lay.flat(layout) for f in dim if f.role == "tokens"] for layout in (a, b)]
    return held[0] == held[1]


def _by_token(tensor: torch.Tensor, layout: Layout, batch: int) -> torch.Tensor:
    """Bring a tensor of any layout to (batch, tokens, features)."""
    factors = [f for dim in layout for f in dim]
    shape = [batch if f.role == "batch" else f.size for f in factors]
    order = sorted(range(len(factors)), key=lambda i: ("batch", "tokens", "").index(factors[i].role))
    tokens = math.prod(f.size for f in factors if f.role == "tokens")
    return tensor.reshape(shape).permute(order).reshape(batch, tokens, -1)


def _pattern(linear: fx.Node, rows: torch.Tensor) -> Projection | None:
    first = rows[0, 0]
    if not bool((rows == first).all()):
        return None
    breaks = ((first[1:] - first[:-1]) != 1).nonzero().flatten() + 1
    width = int(breaks[0]) if len(breaks) else len(first)
    if len(first) % width:
        return None
    starts = first.view(-1, width)[:, 0]
    groups = len(starts)
    stride = int(starts[1] - starts[0]) if groups > 1 else width
    regular = starts[0] + torch.arange(groups)[:, None] * stride + torch.arange(width)
    if not torch.equal(regular.flatten(), first):
        return None
    return Projection(linear, int(starts[0]), groups, stride, width)
