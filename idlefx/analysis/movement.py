"""Follow tokens through what moves them without mixing them: roll, pad, split a side, permute, cut padding off.

Where the rules cannot say where tokens stand, each number of a tensor is told by image, token and feature, and sent
through the operation itself. What comes out says where the tokens stand now: a `Partition`.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from idlefx.analysis.edits import Rearrange
from idlefx.analysis.layouts import Layout
from idlefx.analysis.partition import NOBODY
from idlefx.analysis.refusal import RefusedOperation, refuse
from idlefx.analysis.rules.registry import rule_of
from idlefx.analysis.standing import factors_of, in_stream_order, stands_once, token_count, token_sides
from idlefx.analysis.token_numbers import Reading, numbers
from idlefx.analysis.walk import Walk
from idlefx.graph.queries import argument, value
from idlefx.graph.sizes import FREE_BATCH, SMALL_BATCH, number

aten = torch.ops.aten

MOVES: set[Any] = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.swapaxes.default, aten.mT.default, aten.movedim.int, aten.contiguous.default, aten.clone.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.unsqueeze.default, aten.roll.default, aten.pad.default, aten.constant_pad_nd.default, aten.slice.Tensor,
}  # fmt: skip
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
# Numbers are not laid out in memory as the tokens were, so that a view may need to be a copy.
_FREE: dict[Any, Any] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def layout_of(walk: Walk, node: fx.Node) -> Any:
    """What the rule of a node says; and where it refuses to follow tokens that only move, what their numbers say.

    A chain of movement is noted as one: an edit at each of its nodes says what stands at its start.

    Raises:
        RefusedOperation: An operation has no rule, mixes tokens, or repeats or loses one.
    """
    operand = node.args[0] if node.target in MOVES else None
    if not isinstance(operand, fx.Node) or operand not in walk or value(operand) is None:
        return rule_of(node)(walk, node)
    before, ruled = walk[operand], True
    try:
        layout = rule_of(node)(walk, node)
    except RefusedOperation:
        layout, ruled = _moved(node, before), False
    named = layout if walk.apart else in_stream_order(layout, walk.grid)
    moves = any(f.partition is not None for each in (layout, before) for dim in each for f in dim)
    source = _start(walk, operand) if moves else operand
    as_ruled = ruled and source is operand and named == layout
    if not as_ruled and stands_once(named) and stands_once(walk[source]):
        walk.edits[node] = [Rearrange(source, walk[source], named)]
    return named


def _start(walk: Walk, node: fx.Node) -> fx.Node:
    """Where the chain of movement begins that leads to a node, the features being one dimension all along."""
    while node.target in MOVES:
        operand = node.args[0]
        if not isinstance(operand, fx.Node) or operand not in walk or not stands_once(walk[operand]):
            break
        features = [[f.size for f in factors_of(walk[each], "")] for each in (operand, node)]
        if features[0] != features[1] or len(features[0]) > 1:
            break
        node = operand
    return node


def _moved(node: fx.Node, before: Layout) -> Layout:
    """The layout after movement, read off the numbers that are sent through it.

    Raises:
        RefusedOperation: They cannot be sent, or come out as no tokens of one image each.
    """
    sides = token_sides(before)
    if sides is None or not stands_once(before):
        refuse(node, "moves a part of the tokens, or tokens beside one another")
    if node.target in _PADS and not _pads_zeros(node):
        refuse(node, "pads the tokens with something other than zeros")
    (images,) = factors_of(before, "batch")
    batch = SMALL_BATCH * images.size // FREE_BATCH if images.size % FREE_BATCH == 0 else images.size
    features = math.prod(f.size for f in factors_of(before, ""))
    try:
        result = moved(node, numbers(before, sides, batch))
    except RuntimeError:  # a size that was written down for another batch
        refuse(node, "moves the tokens in a way that is not the same for every batch")
    return Reading(node, images, batch, token_count(sides), features).layout(result)


def moved(node: fx.Node, told: Tensor) -> Tensor:
    """What a node that moves numbers makes of these, with a small batch; padding is `NOBODY`.

    Raises:
        RuntimeError: They are of another size than it moves.
    """
    operand = node.args[0]
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: told if n is operand else number(n, SMALL_BATCH))
    target: Any = _FREE.get(node.target, node.target)
    result: Tensor = (
        torch.constant_pad_nd(told, list(args[1]), NOBODY) if node.target in _PADS else target(*args, **kwargs)
    )
    return result


def _pads_zeros(node: fx.Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return not argument(node, 2, "value", 0)
    return argument(node, 2, "mode", "constant") == "constant" and not argument(node, 3, "value", 0)
