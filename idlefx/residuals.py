"""Find where blocks begin and end, from how residual connections close around attention cores.

A block begins at the nearest dominator of its attention that is also added back behind it. Further residual
branches up to the next attention, such as the MLP, belong to the block before it; unless the last attention has
fewer of them behind it than the others, as where each block has its MLP first.
"""

from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from idlefx.anchors import Core
from idlefx.graph import Call, dominator_chain, leaks, post_dominator_chain, region, shape_of

aten = torch.ops.aten

_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_PASSING = (
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar,
)  # fmt: skip


@dataclass(frozen=True)
class Trunk:
    """A block in outline: where it begins and ends, and its attention cores."""

    entry: fx.Node
    exit: fx.Node
    cores: list[Core]


@dataclass
class _Reach:
    """What follows an attention on the residual stream, up to the next one.

    Attributes:
        entry: Where its residual connection begins.
        cores: The attentions that share this entry.
        stream: The nodes that everything passes from the first sum on.
        sums: Which of them close a residual connection.
        tails: What stands between each sum and the beginning of the next branch.
    """

    entry: fx.Node
    cores: list[Core]
    stream: list[fx.Node]
    sums: list[int]
    tails: list[list[Any]]


def find_trunks(flow: nx.DiGraph, source: fx.Node, cores: list[Core]) -> list[Trunk]:
    """The blocks around attention cores whose output is added back, in execution order.

    Args:
        flow: Data flow from the image.
        source: The image.
        cores: All attention; that of a pooling head, which is added to nothing, gives no block.
    """
    found: dict[fx.Node, tuple[fx.Node, list[Core]]] = {}
    for core in cores:
        closed = _closed(flow, source, core)
        if closed is not None:
            entry, end = closed
            found.setdefault(entry, (end, []))[1].append(core)
    entries = sorted(found, key=list(flow).index)
    outs = {core.out for core in cores}
    reaches = [_reach(flow, entry, *found[entry], set(entries), outs) for entry in entries]
    tail = _common_tail(reaches)
    leading = _leading(flow, source, reaches)
    exits = [_exit(reach, leading if i + 1 < len(reaches) else 0, tail) for i, reach in enumerate(reaches)]
    starts = [reach.entry for reach in reaches]
    if leading:
        starts = [_before(flow, source, starts[0], leading, len(tail)) or starts[0], *exits[:-1]]
    return [Trunk(a, b, reach.cores) for a, b, reach in zip(starts, exits, reaches, strict=True)]


def _closed(flow: nx.DiGraph, source: fx.Node, core: Core) -> tuple[fx.Node, fx.Node] | None:
    """Where a core's residual connection begins and where it is added back."""
    dominators = set(dominator_chain(flow, source, core.out))
    for node in post_dominator_chain(flow, core.out):
        if node.target in _ADDITIONS:
            for operand in node.all_input_nodes:
                origin = _origin(operand, dominators)
                if origin is not None and shape_of(origin) == shape_of(node):
                    return origin, node
    return None


def _origin(node: Call, wanted: set[fx.Node]) -> fx.Node | None:
    """The first of `wanted` on the way back through operations that leave the residual stream what it is."""
    while node not in wanted:
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target not in _PASSING or len(inputs) != 1:
            return None
        node = inputs[0]
    return node


def _reach(
    flow: nx.DiGraph, entry: fx.Node, end: fx.Node, cores: list[Core], entries: set[fx.Node], outs: set[fx.Node]
) -> _Reach:
    stream = [end]
    for node in post_dominator_chain(flow, end):
        if stream[-1] in entries or node in outs:
            break
        stream.append(node)
    while len(stream) > 1 and leaks(region(flow, entry, stream[0]), stream[0]):
        stream.pop(0)  # x + attention + MLP, both of one norm: the first sum is not the whole block
    sums, tails = [0], []
    for at, node in enumerate(stream):
        if at and node.target in _ADDITIONS and shape_of(node) == shape_of(entry):
            starts = [_origin(operand, set(stream[:at])) for operand in node.all_input_nodes]
            start = next((stream.index(s) for s in starts if s is not None and stream.index(s) >= sums[-1]), None)
            if start is not None and sum(i in flow for i in node.all_input_nodes) > 1:
                tails.append([n.target for n in stream[sums[-1] + 1 : start + 1]])
                sums.append(at)
    last = next((at for at, node in enumerate(stream) if node in entries), None)
    if last is not None:
        tails.append([n.target for n in stream[sums[-1] + 1 : last + 1]])
    return _Reach(entry, cores, stream, sums, tails)


def _common_tail(reaches: list[_Reach]) -> list[Any]:
    """What follows every sum all through the model, as the norm of post-norm models does; not what follows one.

    Nor a further sum: a position embedding that is added in front of every block is not of the block before.
    """
    tails = [tail for reach in reaches for tail in reach.tails]
    common = tails[0] if tails else []
    for tail in tails[1:]:
        same = [a == b for a, b in zip(common, tail, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    sums = [at for at, target in enumerate(common) if target in _ADDITIONS]
    return common[: sums[0]] if sums else common


def _exit(reach: _Reach, leading: int, tail: list[Any]) -> fx.Node:
    last = reach.sums[-1 - leading]
    following = [n.target for n in reach.stream[last + 1 : last + 1 + len(tail)]]
    return reach.stream[last + len(tail)] if following == tail else reach.stream[last]


def _leading(flow: nx.DiGraph, source: fx.Node, reaches: list[_Reach]) -> int:
    """How many residual branches of a block stand before its attention."""
    counts = {len(reach.sums) for reach in reaches[:-1]}
    missing = counts.pop() - len(reaches[-1].sums) if len(counts) == 1 else 0
    tail = len(_common_tail(reaches))
    return missing if missing > 0 and _before(flow, source, reaches[0].entry, missing, tail) is not None else 0


def _before(flow: nx.DiGraph, source: fx.Node, entry: fx.Node, branches: int, tail: int) -> fx.Node | None:
    """Where the residual branches right before `entry` begin."""
    node = entry
    for _ in range(branches):
        chain = [node, *dominator_chain(flow, source, node)]
        if len(chain) <= tail or chain[tail].target not in _ADDITIONS:
            return None
        starts = [_origin(operand, set(chain[tail + 1 :])) for operand in chain[tail].all_input_nodes]
        start = next((s for s in starts if s is not None and shape_of(s) == shape_of(entry)), None)
        if start is None:
            return None
        node = start
    return node
