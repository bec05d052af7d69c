"""Find where blocks begin and end, from how residual connections close around attention cores.

A block begins at the nearest dominator of its attention that is also added back behind it. Further residual
branches up to the next attention, such as the MLP, belong to the block before it; unless the last attention has
fewer of them behind it than the others, as where each block has its MLP first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import fx

from idlefx.analysis.attention import Core
from idlefx.graph.queries import Call, dominator_chain, leaks, post_dominator_chain, region, value
from idlefx.graph.sizes import shape_of

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
    tails: list[list[fx.Node]]

    @property
    def pattern(self) -> tuple[list[Any], ...]:
        """The operations of the tails."""
        return tuple([node.target for node in tail] for tail in self.tails)


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
    reaches = [
        _reach(flow, entry, *found[entry], following, outs)
        for entry, following in zip(entries, [*entries[1:], None], strict=True)
    ]
    _drop_strangers(reaches)
    tail = _common_tail(flow, reaches)
    before = partial(_before, flow, source, tail=len(tail))
    _give_back(reaches, before)
    exits = [_exit(reach, tail) for reach in reaches]
    starts = _starts(entries, exits, before, list(flow))
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


def _joins(flow: nx.DiGraph, node: fx.Node) -> bool:
    """Whether a node adds two things that come from the image, as the end of a residual connection does."""
    return node.target in _ADDITIONS and sum(i in flow for i in node.all_input_nodes) > 1


def _origin(node: Call, wanted: set[fx.Node]) -> fx.Node | None:
    """The first of `wanted` on the way back through operations that leave the residual stream what it is."""
    while node not in wanted:
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target not in _PASSING or len(inputs) != 1:
            return None
        node = inputs[0]
    return node


def _reach(
    flow: nx.DiGraph, entry: fx.Node, end: fx.Node, cores: list[Core], following: fx.Node | None, outs: set[fx.Node]
) -> _Reach:
    order = list(flow)
    limit = order.index(following) if following is not None else len(order)
    stream = [end]
    for node in post_dominator_chain(flow, end):
        if order.index(node) > limit or node in outs:
            break
        stream.append(node)
    while len(stream) > 1 and leaks(region(flow, entry, stream[0]), stream[0]):
        stream.pop(0)  # x + attention + MLP, both of one norm: the first sum is not the whole block
    sums, tails = [0], []
    for at, node in enumerate(stream):
        if at and _joins(flow, node) and shape_of(node) == shape_of(entry):
            starts = [_origin(operand, set(stream[:at])) for operand in node.all_input_nodes]
            start = next((stream.index(s) for s in starts if s is not None and stream.index(s) >= sums[-1]), None)
            if start is not None:
                tails.append(stream[sums[-1] + 1 : start + 1])
                sums.append(at)
    if stream[-1] is following:
        tails.append(stream[sums[-1] + 1 :])
    return _Reach(entry, cores, stream, sums, tails)


def _drop_strangers(reaches: list[_Reach]) -> None:
    """Leave out residual branches that follow a block but are none of it: those of a head, or between two stages.

    They stand behind other operations than the branches of most blocks do, or the last block alone has them.
    """
    patterns = [reach.pattern for reach in reaches[:-1] if reach.tails] or [reaches[0].pattern[:1]]
    common = max(patterns, key=patterns.count)
    most = max((len(reach.sums) for reach in reaches[:-1]), default=len(reaches[0].sums))
    for reach in reaches:
        usual = [*common, *common[-1:] * len(reach.tails)]
        same = [tail == other for tail, other in zip(reach.pattern, usual, strict=False)]
        own = 1 + (same.index(False) if False in same else len(same))
        own = min(own, most) if reach is reaches[-1] else own
        reach.sums, reach.tails = reach.sums[:own], reach.tails[:own]


def _common_tail(flow: nx.DiGraph, reaches: list[_Reach]) -> list[Any]:
    """What follows every sum all through the model, as the norm of post-norm models does; not what follows one.

    Nor what joins the stream with another, nor a position embedding that is added in front of every block.
    """
    tails = [
        [node.target for node in _of_block(flow, reach.stream[at], tail)]
        for reach in reaches
        for at, tail in zip(reach.sums, reach.tails, strict=False)
    ]
    common = tails[0] if tails else []
    for tail in tails[1:]:
        same = [a == b for a, b in zip(common, tail, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return common


def _of_block(flow: nx.DiGraph, start: fx.Node, tail: list[fx.Node]) -> list[fx.Node]:
    """The part of a tail that may be a norm or a scaling: it reads the sum and, from outside, vectors of features."""
    for at, node in enumerate(tail):
        own = set(region(flow, start, node))
        outside = [i for i in node.all_input_nodes if i not in own and i is not start and value(i) is not None]
        if any(i in flow or sum(size != 1 for size in shape_of(i)) > 1 for i in outside):
            return tail[:at]
    return tail


def _exit(reach: _Reach, tail: list[Any]) -> fx.Node:
    last = reach.sums[-1]
    following = [n.target for n in reach.stream[last + 1 : last + 1 + len(tail)]]
    return reach.stream[last + len(tail)] if following == tail else reach.stream[last]


def _give_back(reaches: list[_Reach], before: Callable[[fx.Node, int], fx.Node | None]) -> None:
    """Where the last attention has fewer branches behind it and the first has them in front, so have all."""
    counts = {len(reach.sums) for reach in reaches[:-1]}
    own = len(reaches[-1].sums)
    missing = counts.pop() - own if len(counts) == 1 else 0
    if missing > 0 and before(reaches[0].entry, missing) is not None:
        for reach in reaches:
            reach.sums, reach.tails = reach.sums[:own], reach.tails[:own]


def _starts(
    entries: list[fx.Node],
    exits: list[fx.Node],
    before: Callable[[fx.Node, int], fx.Node | None],
    order: list[fx.Node],
) -> list[fx.Node]:
    """Where the blocks begin: at residual branches that stand before every attention and belong to no other block."""
    starts = entries
    for branches in (1, 2, 3):
        earlier = [before(entry, branches) for entry in entries]
        free = [a is not None and order.index(a) >= order.index(b) for a, b in zip(earlier[1:], exits, strict=False)]
        if earlier[0] is None or not free or not all(free):
            break
        starts = [node for node in earlier if node is not None]
    return starts


def _before(flow: nx.DiGraph, source: fx.Node, entry: fx.Node, branches: int, tail: int) -> fx.Node | None:
    """Where the residual branches right before `entry` begin."""
    node = entry
    for _ in range(branches):
        chain = [node, *dominator_chain(flow, source, node)]
        if len(chain) <= tail or not _joins(flow, chain[tail]):
            return None
        starts = [_origin(operand, set(chain[tail + 1 :])) for operand in chain[tail].all_input_nodes]
        start = next((s for s in starts if s is not None and shape_of(s) == shape_of(entry)), None)
        if start is None:
            return None
        node = start
    return node
