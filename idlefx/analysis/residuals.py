"""Find residual branches: what is computed beside the residual stream and then added back to it.

    pre-norm:   x --+--------------------- (+) --+--------------- (+) --> the next block's x
                    '-- norm, attention ----'    '-- norm, MLP ----'

    post-norm:  x --+--------------- (+) -- norm --+--------- (+) -- norm --> the next block's x
                    '-- attention ----'            '-- MLP ----'

The upper line is the residual stream: whatever comes from the image passes it. At a fork `+` a branch starts, a sum
`(+)` closes it, and what stands between that sum and the next fork is the branch's tail: nothing in a pre-norm model,
a norm in a post-norm one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from idlefx.analysis.attention import Core
from idlefx.analysis.movement import MOVES, moved
from idlefx.graph.queries import dominator_chain, leaks, post_dominator_chain, region, value
from idlefx.graph.sizes import SMALL_BATCH, shape_of

aten = torch.ops.aten

_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_PASSING = (
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar,
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        start: The node of the stream that it starts from.
        sum: Where it is added back.
        tail: The nodes of the stream behind the sum, up to and with the start of the next branch; None where no
            branch follows.
    """

    start: fx.Node
    sum: fx.Node
    tail: tuple[fx.Node, ...] | None = None


def attention_branch(flow: nx.DiGraph, source: fx.Node, core: Core, outs: set[fx.Node]) -> Branch | None:
    """The residual branch that an attention stands in, if its result is added back to anything.

    It starts at the nearest dominator of the attention that is also an addend behind it, or of its keys, where the
    queries come from elsewhere; or, where a stage begins and the stream itself is projected or pooled on its way to the
    sum, where the two part.

    Args:
        flow: Data flow from the image.
        source: The image.
        core: The attention.
        outs: Results of all attention.
    """
    for reached in (core.out, core.key):
        dominators = set(dominator_chain(flow, source, reached)) if reached in flow else set()
        for node in post_dominator_chain(flow, core.out):
            if node.target in _ADDITIONS:
                start = _addend_among(dominators, node, shape_of(node))
                if start is not None:
                    return Branch(start, node)
    return _changed_stream(flow, source, core, outs)


def _changed_stream(flow: nx.DiGraph, source: fx.Node, core: Core, outs: set[fx.Node]) -> Branch | None:
    """The outermost sum of an attention with what came another way, up to the next attention.

    Queries that are added to their own attention make a sum further inside, which is no residual connection. A sum of
    one token, such as a class token that attends to all, leaves the stream of tokens.
    """
    dominators = set(dominator_chain(flow, source, core.out))
    branch = None
    for node in post_dominator_chain(flow, core.out):
        fork = next(dominator_chain(flow, source, node), None) if _joins(flow, node) else None
        if fork not in dominators or value(fork) is None:
            continue
        if len(shape_of(fork)) != len(shape_of(node)) or 1 in shape_of(node)[1:]:
            continue
        if outs.intersection(region(flow, fork, node)) == {core.out}:
            branch = Branch(fork, node)
    return branch


def stream_behind(flow: nx.DiGraph, branch: Branch, following: fx.Node | None, outs: set[fx.Node]) -> list[fx.Node]:
    """The residual stream from the sum of an attention's branch up to the next attention.

    Args:
        flow: Data flow from the image.
        branch: The branch of an attention.
        following: Where the branch of the next attention starts, the last node that may be in the stream.
        outs: Results of all attention, also of such as is added to nothing: none is in the stream.

    Returns:
        Nodes that everything passes, from the first sum on that is all that the branch's inside leads to.
    """
    order = {node: position for position, node in enumerate(flow)}
    stream = [branch.sum]
    for node in post_dominator_chain(flow, branch.sum):
        if node in outs or (following is not None and order[node] > order[following]):
            break
        stream.append(node)
    # x + attention + MLP, both of one norm: the first sum is not the whole block.
    closing = (at for at, node in enumerate(stream) if not leaks(region(flow, branch.start, node), node))
    return stream[next(closing, len(stream) - 1) :]


def branches_along(
    flow: nx.DiGraph, start: fx.Node, stream: Sequence[fx.Node], following: fx.Node | None
) -> tuple[Branch, ...]:
    """The residual branches that are closed on a stream, in order.

    Args:
        flow: Data flow from the image.
        start: Where the first branch starts; the stream's first node closes it.
        stream: What `stream_behind` gives.
        following: Where the branch of the next attention starts.
    """
    branches, closed = [], 0  # `closed`: position of the sum of the branch that starts at `start`
    for at in range(1, len(stream)):
        if _joins(flow, stream[at]) and _is_same_stream(stream[: at + 1]):
            fork = _addend_among(set(stream[closed:at]), stream[at])
            if fork is not None:
                branches.append(Branch(start, stream[closed], tuple(stream[closed + 1 : stream.index(fork) + 1])))
                start, closed = fork, at
    tail = tuple(stream[closed + 1 :]) if stream[-1] is following else None
    return (*branches, Branch(start, stream[closed], tail))


def starts_before(flow: nx.DiGraph, source: fx.Node, node: fx.Node, tail: int) -> Iterator[fx.Node]:
    """Where the residual branches right in front of a node of the stream start, from the nearest.

    Args:
        flow: Data flow from the image.
        source: The image.
        node: Where another branch starts.
        tail: How many nodes the tail of each branch has.
    """
    while True:
        stream = [node, *dominator_chain(flow, source, node)]
        if len(stream) <= tail or not _joins(flow, stream[tail]):
            return
        start = _addend_among(set(stream[tail + 1 :]), stream[tail], shape_of(node))
        if start is None:
            return
        yield start
        node = start


def _is_same_stream(path: Sequence[fx.Node]) -> bool:
    """Whether the ends of a path have one shape, or one after rows and columns of the other are flattened."""
    first, last = shape_of(path[0]), shape_of(path[-1])
    few, many = sorted((first, last), key=len)
    flattened = [[*many[:d], many[d] * many[d + 1], *many[d + 2 :]] for d in range(len(many) - 1)]
    return first == last or (few in flattened and _keeps_order(path))


def _keeps_order(path: Sequence[fx.Node]) -> bool:
    """Whether what moves numbers along a path leaves them in order; sizes alone may agree, as of features and rows."""
    shape = shape_of(path[0], SMALL_BATCH)
    order = torch.arange(math.prod(shape)).view(shape)
    for node in path[1:]:
        if node.target in MOVES:
            try:
                order = moved(node, order)
            except RuntimeError:  # a size that was written down for another batch
                return True
        elif value(node) is None or shape_of(node, SMALL_BATCH) != list(order.shape):
            return True  # numbers are made anew, and nothing is known but sizes
    return torch.equal(order.flatten(), torch.arange(order.numel()))


def _joins(flow: nx.DiGraph, node: fx.Node) -> bool:
    """Whether a node adds two things that come from the image, as the end of a residual branch does."""
    return node.target in _ADDITIONS and sum(addend in flow for addend in node.all_input_nodes) > 1


def _addend_among(stream: set[fx.Node], addition: fx.Node, shape: list[int] | None = None) -> fx.Node | None:
    """The first of a sum's addends that is a node of the stream, and of that shape if one is given."""
    addends = (_origin(addend, stream) for addend in addition.all_input_nodes)
    return next((a for a in addends if a is not None and (shape is None or shape_of(a) == shape)), None)


def _origin(node: fx.Node, stream: set[fx.Node]) -> fx.Node | None:
    """The node of the stream that another one is, but for operations that leave the stream what it is."""
    while node not in stream:
        inputs = [operand for operand in node.args if isinstance(operand, fx.Node)]
        if node.target not in _PASSING or len(inputs) != 1:
            return None
        node = inputs[0]
    return node
