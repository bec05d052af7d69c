"""Which tokens are prefix tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.propagation import follow
from idlefx.analysis.refusal import RefusedOperation
from idlefx.errors import InputError
from idlefx.graph.memory import Memory, written
from idlefx.graph.queries import argument, dominator_chain, region, tensor_argument, value
from idlefx.graph.sizes import FREE_BATCH, plain_shape, shape_of
from idlefx.options import plain_prefix

aten = torch.ops.aten
_ROWWISE = (aten.layer_norm.default, aten.rms_norm.default, aten.linear.default, aten.dropout.default,
            aten.contiguous.default, aten.clone.default, aten.detach.default, aten.to.dtype,
            aten._to_copy.default)  # fmt: skip


def named_positions(prefix: int | Sequence[int], tokens: int, grid: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The positions of the prefix tokens that a user names, ascending.

    Args:
        prefix: How many leading ones, or their positions.
        tokens: How many tokens there are.
        grid: Sizes of the grid that they stand on, if they do.

    Raises:
        InputError: They do not fit.
    """
    plain = plain_prefix(prefix)
    positions = tuple(sorted(set(plain if isinstance(plain, tuple) else range(plain or 0))))
    if not all(0 <= p < tokens for p in positions) or len(positions) >= tokens:
        raise InputError(f"blocks: prefix={prefix} does not fit {tokens} tokens; give their number or their positions")
    if positions and grid:
        raise InputError(
            f"blocks: prefix={prefix}, but the tokens stand on a grid of {' × '.join(map(str, grid))}, all of them "
            "patches of the image; leave prefix= away"
        )
    return positions


def prefix_positions(flow: nx.DiGraph, stream: fx.Node, dim: int, blocks: Mapping[fx.Node, fx.Node]) -> tuple[int, ...]:
    """The positions along `dim` of the residual stream that no image flows into.

    Args:
        flow: The data flow from the image.
        stream: Where a block begins.
        dim: The token dimension there.
        blocks: Exits of earlier blocks and their entries: a block mixes tokens but does not move them.
    """
    return tuple(i for i, from_image in enumerate(_from_image(flow, stream, dim, blocks)) if not from_image)


def _from_image(flow: nx.DiGraph, node: fx.Node, dim: int, blocks: Mapping[fx.Node, fx.Node]) -> list[bool]:
    tensor = value(node)
    assert tensor is not None
    dim %= tensor.ndim
    count = plain_shape(tensor)[dim]
    if node not in flow:
        return [False] * count
    if _is_written_from(flow, node):
        return [True] * count
    if node in blocks:
        return _from_image(flow, blocks[node], dim, blocks)
    target, args = node.target, list[Any](node.args)
    if target is aten.cat.default and (args[1] if len(args) > 1 else 0) % tensor.ndim == dim:
        return [from_image for piece in args[0] for from_image in _from_image(flow, piece, dim, blocks)]
    if target is aten.cat.default:
        pieces = [_from_image(flow, piece, dim, blocks) for piece in args[0]]
        return [any(column) for column in zip(*pieces, strict=True)]
    if target is aten.transpose.int:
        order = list(range(tensor.ndim))
        a, b = args[1:3]
        order[a], order[b] = order[b], order[a]
        return _from_image(flow, args[0], order[dim], blocks)
    if target is aten.permute.default:
        return _from_image(flow, args[0], args[1][dim], blocks)
    if target is aten.slice.Tensor:
        from_image, cut = _from_image(flow, args[0], dim, blocks), slice(*(argument(node, i, "") for i in (2, 3, 4)))
        return from_image[cut] if argument(node, 1, "dim", 0) % tensor.ndim == dim else from_image
    if target is aten.select.int:
        return _from_image(flow, args[0], dim + (args[1] % (tensor.ndim + 1) <= dim), blocks)
    if target is aten.unsqueeze.default:
        return _from_unsqueezed(flow, node, dim, blocks)
    if target in (aten.repeat.default, aten.expand.default):
        at = dim - tensor.ndim + len(shape_of(args[0]))
        from_image = _from_image(flow, args[0], at, blocks) if at >= 0 else [True]
        return from_image * (count // len(from_image))
    before = _before_rowwise(flow, node, dim) if sum(i in flow for i in node.all_input_nodes) > 1 else None
    if before is not None:
        return _from_image(flow, before, dim, blocks)
    if target in _ROWWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        operands = [_operand(flow, i, tensor.ndim, dim, count, blocks) for i in node.all_input_nodes if i in flow]
        return [any(column) for column in zip(*operands, strict=True)]
    return [True] * count


def _from_unsqueezed(flow: nx.DiGraph, node: fx.Node, dim: int, blocks: Mapping[fx.Node, fx.Node]) -> list[bool]:
    """A dimension of size one that was inserted holds the token that was picked, if one was."""
    operand, at = tensor_argument(node, 0), argument(node, 1) % len(shape_of(node))
    if at != dim:
        return _from_image(flow, operand, dim - (at < dim), blocks)
    while operand in flow and operand.target in (*_ROWWISE, aten.slice.Tensor):
        operand = tensor_argument(operand, 0)
    if operand not in flow or operand.target is not aten.select.int:
        return [operand in flow]
    picked, axis, place = list[Any](operand.args)
    return [_from_image(flow, picked, axis, blocks)[place]]


def _is_written_from(flow: nx.DiGraph, node: fx.Node) -> bool:
    """Whether something of the image is written into a tensor in place, through a view or another name."""
    if "memory" not in flow.graph:
        flow.graph["memory"] = Memory(node.graph)
    memory: Memory = flow.graph["memory"]

    def is_itself(i: fx.Node, target: fx.Node) -> bool:  # `x[:, 0] += y` writes the sum, and then writes it once more
        return i is target or (bool(written(i)) and memory.share(i, target))

    return any(
        i in flow and not any(is_itself(i, target) for target in written(write))
        for write in memory.writes_into([node])
        if write is not node
        for i in write.all_input_nodes
    )


def _before_rowwise(flow: nx.DiGraph, node: fx.Node, dim: int) -> fx.Node | None:
    """Where a region in front of `node` begins that works on each token by itself, such as an MLP and its sum."""
    source = next(n for n in flow if flow.in_degree(n) == 0)
    shape = shape_of(node)
    start = next(
        (n for n in dominator_chain(flow, source, node) if value(n) is not None and shape_of(n) == shape), None
    )
    if start is None or FREE_BATCH not in shape or len(shape) != 3:
        return None
    nodes = region(flow, start, node)
    mixing = (aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default)
    layout = lay.stream(shape, [dim], shape.index(FREE_BATCH))
    try:
        walk = follow(nodes, {start: layout})
    except RefusedOperation:
        return None
    return start if walk[node] == layout and not any(n.target in mixing for n in nodes) else None


def _operand(
    flow: nx.DiGraph, node: fx.Node, rank: int, dim: int, count: int, blocks: Mapping[fx.Node, fx.Node]
) -> list[bool]:
    tensor = value(node)
    if tensor is None:
        return [False] * count
    at = dim - rank + tensor.ndim
    if at < 0 or plain_shape(tensor)[at] != count:
        return [True] * count
    return _from_image(flow, node, at, blocks)
