"""Group residual branches into blocks.

A block begins where the branch of its attention starts. Further branches up to the next attention, such as the MLP,
belong to the block before them; unless the last attention has fewer of them behind it than the others, as where each
block has its MLP first. The head's and the stem's branches are told from a block's by what stands between them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice, takewhile
from typing import TypeVar

import networkx as nx
import torch
from torch import fx
from torch.fx.node import Target

from idlefx.analysis.attention import Core
from idlefx.analysis.movement import MOVES
from idlefx.analysis.residuals import Branch, attention_branch, branches_along, starts_before, stream_behind
from idlefx.graph.queries import common_path, region, value
from idlefx.graph.sizes import shape_of

aten = torch.ops.aten

_MOST_IN_FRONT = 3  # residual branches that a block may have before its attention
StartsBefore = Callable[[fx.Node], Iterator[fx.Node]]
T = TypeVar("T")


@dataclass(frozen=True)
class Trunk:
    """A block in outline: where it begins and ends, and its attention cores."""

    entry: fx.Node
    exit: fx.Node
    cores: tuple[Core, ...]


@dataclass(frozen=True)
class Stretch:
    """The residual stream from where an attention's branch starts to where that of the next attention does.

    Attributes:
        cores: The attentions that share the first branch.
        branches: That branch and those behind it.
        stream: The nodes that everything passes from the first sum on.
    """

    cores: tuple[Core, ...]
    branches: tuple[Branch, ...]
    stream: list[fx.Node]

    @property
    def start(self) -> fx.Node:
        """Where the attention's branch starts."""
        return self.branches[0].start

    @property
    def tails(self) -> list[list[Target]]:
        """The operations between its branches."""
        return [[node.target for node in branch.tail] for branch in self.branches if branch.tail is not None]

    def first(self, count: int) -> "Stretch":
        """The stretch with its first branches only; what stands between them and the others is no tail of theirs."""
        if count >= len(self.branches):
            return self
        *own, last = self.branches[:count]
        return replace(self, branches=(*own, replace(last, tail=None)))


def find_trunks(flow: nx.DiGraph, source: fx.Node, cores: Sequence[Core]) -> list[Trunk]:
    """The blocks around attention cores whose output is added back, in execution order.

    Args:
        flow: Data flow from the image.
        source: The image.
        cores: All attention; that of a pooling head, which is added to nothing, gives no block.
    """
    stretches = _stretches(flow, source, cores)
    if not stretches:
        return []
    stretches = _without_strangers(stretches)
    norm = _common_tail(flow, stretches)
    before = partial(starts_before, flow, source, tail=len(norm))
    stretches = _without_those_of_the_next(stretches, before)
    exits = [_exit(stretch, norm) for stretch in stretches]
    entries = _entries(stretches, exits, before, list(flow))
    blocks = zip(entries, exits, stretches, strict=True)
    return [Trunk(entry, _as_entered(flow, stretch, entry, leave), stretch.cores) for entry, leave, stretch in blocks]


def _stretches(flow: nx.DiGraph, source: fx.Node, cores: Sequence[Core]) -> list[Stretch]:
    """The residual stream, cut where the branches of attention start; empty if no attention is added back."""
    branches: dict[fx.Node, Branch] = {}
    sharing: dict[fx.Node, list[Core]] = {}
    outs = {core.out for core in cores}
    for core in cores:
        branch = attention_branch(flow, source, core, outs)
        if branch is not None:
            branches.setdefault(branch.start, branch)
            sharing.setdefault(branch.start, []).append(core)
    starts = [node for node in flow if node in branches]
    stretches = []
    for start, following in zip(starts, [*starts[1:], None], strict=False):
        stream = stream_behind(flow, branches[start], following, outs)
        stretches.append(Stretch(tuple(sharing[start]), branches_along(flow, start, stream, following), stream))
    return stretches


def _without_strangers(stretches: list[Stretch]) -> list[Stretch]:
    """Leave out residual branches that follow a block but are none of it: those of a head, or between two stages.

    They stand behind other operations than the branches of most blocks do, or the last block alone has them.
    """
    *others, last = stretches
    patterns = [stretch.tails for stretch in others if stretch.tails] or [stretches[0].tails[:1]]
    usual = max(patterns, key=patterns.count)
    most = max((len(stretch.branches) for stretch in others), default=len(last.branches))
    own = []
    for stretch in stretches:
        expected = usual + usual[-1:] * len(stretch.tails)
        own.append(stretch.first(1 + len(_common_start(stretch.tails, expected))))
    return [*own[:-1], own[-1].first(most)]


def _common_tail(flow: nx.DiGraph, stretches: list[Stretch]) -> list[Target]:
    """What follows every sum all through the model, as the norm of post-norm models does; not what follows one.

    Nor what joins the stream with another, nor a position embedding that is added in front of every block.
    """
    tails = [
        [node.target for node in _of_block(flow, branch.sum, branch.tail)]
        for stretch in stretches
        for branch in stretch.branches
        if branch.tail is not None
    ]
    return reduce(_common_start, tails) if tails else []


def _of_block(flow: nx.DiGraph, start: fx.Node, tail: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """The part of a tail that may be a norm or a scaling: it reads the sum and, from outside, vectors of features."""
    for at, node in enumerate(tail):
        own = {start, *region(flow, start, node)}
        outside = [i for i in node.all_input_nodes if i not in own and value(i) is not None]
        if any(i in flow or sum(size != 1 for size in shape_of(i)) > 1 for i in outside):
            return tail[:at]
    return tail


def _without_those_of_the_next(stretches: list[Stretch], before: StartsBefore) -> list[Stretch]:
    """Where the last attention has fewer branches behind it and the first has them in front, so have all."""
    *others, last = stretches
    counts = {len(stretch.branches) for stretch in others}
    missing = counts.pop() - len(last.branches) if len(counts) == 1 else 0
    if missing > 0 and len(list(islice(before(stretches[0].start), missing))) == missing:
        return [stretch.first(len(last.branches)) for stretch in stretches]
    return stretches


def _exit(stretch: Stretch, norm: list[Target]) -> fx.Node:
    """Where a block ends: at its last sum, or at the norm behind it."""
    closed = stretch.stream.index(stretch.branches[-1].sum)
    following = [node.target for node in stretch.stream[closed + 1 : closed + 1 + len(norm)]]
    return stretch.stream[closed + len(norm) if following == norm else closed]


def _as_entered(flow: nx.DiGraph, stretch: Stretch, entry: fx.Node, leave: fx.Node) -> fx.Node:
    """A block's exit, or where the stream has the shape of its entry again, if it was flattened inside the block.

    A norm on the way is the block's own if the module that did the rest of the block did it too.
    """
    path, wanted = common_path(region(flow, entry, leave)), shape_of(entry)
    for node in stretch.stream[stretch.stream.index(leave) :]:
        own = node.target in MOVES or (node.target is aten.layer_norm.default and common_path([node]).startswith(path))
        if node is not leave and not own:
            break
        if shape_of(node) == wanted:
            return node
    return leave


def _entries(
    stretches: list[Stretch], exits: list[fx.Node], before: StartsBefore, order: list[fx.Node]
) -> list[fx.Node]:
    """Where the blocks begin: at residual branches that stand before every attention and belong to no other block."""
    entries = [stretch.start for stretch in stretches]
    if len(stretches) == 1:
        return entries  # nothing tells its own branches from those of the stem
    in_front = [islice(before(entry), _MOST_IN_FRONT) for entry in entries]
    for earlier in zip(*in_front, strict=False):  # ends where one of the blocks has no further branch
        if any(order.index(entry) < order.index(leave) for entry, leave in zip(earlier[1:], exits, strict=False)):
            break
        entries = list(earlier)
    return entries


def _common_start(a: list[T], b: list[T]) -> list[T]:
    """The entries that two lists begin with alike."""
    return [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]
