"""Bring the tokens of a stage to where its groups are made of them, and back, as graph nodes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.blocks import Opened
from idlefx.analysis.edits import Rearrange
from idlefx.analysis.key_axis import KeyAxis
from idlefx.analysis.layouts import Layout
from idlefx.analysis.subset import Subset, segments_of
from idlefx.analysis.walk import Walk
from idlefx.graph.notes import Role, only_made_for
from idlefx.graph.sizes import shape_of
from idlefx.records import Block, Step
from idlefx.rewriting.sequences import out_of_row, row_of, sequences_of, stream_of
from idlefx.rewriting.told_layouts import products, rearranging
from idlefx.runtime import following, windows

aten = torch.ops.aten
Add = Callable[..., fx.Node]  # inserts a call, with `name=` and `role=`


class StageTokens:
    """Tokens of a sequence, or of a grid whose sides are flattened; those that work stand in one row of it.

    Args:
        graph: The graph, in which it is told already who follows whom.
        add: Inserts calls.
        block: The block that opens the stage.
        step: What it does; where groups join, their means are the tokens.

    Attributes:
        roles: Those of the nodes that tell who follows whom: the workers, places, order and leaders.
    """

    roles: tuple[Role, ...] = ("index", "place", "order", "leaders")

    def __init__(self, graph: fx.Graph, add: Add, block: Block, step: Step) -> None:
        self.add, self.block, self.kept, self.few = add, block, step.kept, step.joins
        self.segments = segments_of(block.segments, step.kept_by_segment)
        self.groups = [only_made_for(graph, block.index, role) for role in self.roles]

    @property
    def dims(self) -> tuple[int, int]:
        """Token and batch dimension of what groups are made of."""
        return self.block.flat_dims

    def apart(self, stream: fx.Node) -> fx.Node:
        """All tokens, as groups are made of them."""
        return (out_of_row if self.few else sequences_of)(self.add, stream, self.block, role="gather")

    def from_row(self, stream: fx.Node) -> fx.Node:
        """A stream of those that work, as the means of groups."""
        return out_of_row(self.add, stream, self.block, role="work")

    def in_row(self, means: fx.Node) -> fx.Node:
        """The means of groups, as a stream of those that work."""
        return row_of(self.add, means, self.block, role="gather")

    def whole(self, tokens: fx.Node) -> fx.Node:
        """All tokens, as their stream."""
        return stream_of(self.add, tokens, self.block, role="work")

    def subset(self, positions: fx.Node, walk: Walk) -> Subset:
        """Those that work, at these positions, for one block of the stage."""
        del walk
        return Subset(positions, self.block.prefix, self.block.image_positions, self.kept, segments=self.segments)

    def term(self, axis: KeyAxis, walk: Walk) -> tuple[Any, ...]:
        """What makes the term that is added to the logits of a key, and what that is told besides sizes and queries."""
        told = (following.size_term, axis.rank, axis.dim, axis.batch_dim, axis.copies)
        if not axis.segment:
            return told
        first, last = (self.subset(self.groups[0], walk).count(axis.logits, ((0, end),)) for end in axis.segment)
        return *told, (first, last)


class WindowTokens(StageTokens):
    """Tokens of windows, each of them as if it were an image; those that work stand window by window in the row."""

    roles = ("chosen", "chosen place", "order", "leaders")

    def __init__(self, graph: fx.Graph, add: Add, block: Block, step: Step) -> None:
        super().__init__(graph, add, block, step)
        self.where, self.slots = (only_made_for(graph, block.index, role) for role in ("where", "slots"))
        batch_dim, token_dim = block.flat_dims[::-1]
        self._order = [batch_dim, token_dim, 3 - batch_dim - token_dim]

    @property
    def dims(self) -> tuple[int, int]:
        """Those of (B * windows, slots, C)."""
        return 1, 0

    def apart(self, stream: fx.Node) -> fx.Node:
        """All tokens (B * windows, slots, C)."""
        tokens = self._permuted(super().apart(stream), self._order, "gather")
        return self.add(windows.in_windows, tokens, self.where, name="in_windows", role="gather")

    def from_row(self, stream: fx.Node) -> fx.Node:
        """A stream of those that work, as the means of groups (B * windows, K, C)."""
        tokens = self._permuted(super().from_row(stream), self._order, "work")
        count = self.block.windows[0]
        parts = self.add(aten.unflatten.int, tokens, 1, [count, self.kept // count], name="parts", role="work")
        return self.add(aten.flatten.using_ints, parts, 0, 1, name="parts", role="work")

    def in_row(self, means: fx.Node) -> fx.Node:
        """The means of groups, as a stream of B images with windows * K tokens."""
        parts = self.add(aten.unflatten.int, means, 0, [-1, self.block.windows[0]], name="parts", role="gather")
        tokens = self.add(aten.flatten.using_ints, parts, 1, 2, name="tokens", role="gather")
        return super().in_row(self._permuted(tokens, self._back, "gather"))

    def whole(self, tokens: fx.Node) -> fx.Node:
        """All tokens, in the order of their stream."""
        tokens = self.add(windows.in_stream, tokens, self.slots, name="in_stream", role="work")
        return super().whole(self._permuted(tokens, self._back, "work"))

    def subset(self, positions: fx.Node, walk: Walk) -> Subset:
        """Those that work, and their slots, in windows that are the same in all blocks of the stage."""
        told = (self.kept, walk.windows, "tokens", self.groups[0])
        return Subset(positions, self.block.prefix, self.block.image_positions, *told)

    def term(self, axis: KeyAxis, walk: Walk) -> tuple[Any, ...]:
        """The same, told where the windows stand in the logits."""
        own = walk.windows
        assert own is not None
        sides = self.subset(self.groups[0], walk).sides(own.partition)
        return windows.size_term, products(axis.layout, own.order), tuple(sides[side] for side in own.order)

    @property
    def _back(self) -> list[int]:
        return [self._order.index(d) for d in range(3)]

    def _permuted(self, tokens: fx.Node, order: list[int], role: Role) -> fx.Node:
        if order == [0, 1, 2]:
            return tokens
        return self.add(aten.permute.default, tokens, order, name="permuted", role=role)


class ApartTokens(WindowTokens):
    """Tokens of a stream that itself stands in windows: those that work stand in windows too."""

    def __init__(self, graph: fx.Graph, add: Add, block: Block, step: Step, dense: Opened) -> None:
        super().__init__(graph, add, block, step)
        self._positions, self._dense = only_made_for(graph, block.index, "index"), dense

    def from_row(self, stream: fx.Node) -> fx.Node:
        """A stream of those that work, as the means of groups (B * windows, K, C)."""
        in_windows, row = self._layouts
        return super().from_row(self._rearranged(stream, in_windows, row, "work"))

    def in_row(self, means: fx.Node) -> fx.Node:
        """The means of groups, as a stream that stands in windows."""
        in_windows, row = self._layouts
        return self._rearranged(super().in_row(means), row, in_windows, "gather")

    @property
    def _layouts(self) -> tuple[Layout, Layout]:
        entry = self._dense.entry
        row = lay.stream(shape_of(entry), self.block.token_dims, self.block.batch_dim, self.block.grid)
        return self._dense.walk[entry], row

    def _rearranged(self, tokens: fx.Node, before: Layout, after: Layout, role: Role) -> fx.Node:
        workers = self.subset(self._positions, self._dense.walk)
        told = rearranging(workers, Rearrange(self._dense.entry, before, after), tokens)
        return self.add(windows.rearrange, *told, name="rearranged", role=role)


def stage_tokens(graph: fx.Graph, add: Add, block: Block, step: Step, dense: Opened) -> StageTokens:
    """How the tokens of a stage stand, which a block opens.

    Args:
        graph: The graph, in which it is told already who follows whom.
        add: Inserts calls.
        block: The block.
        step: What it does.
        dense: The same block, as nodes.
    """
    if not step.unit:
        return StageTokens(graph, add, block, step)
    if dense.walk.apart:
        return ApartTokens(graph, add, block, step, dense)
    return WindowTokens(graph, add, block, step)
