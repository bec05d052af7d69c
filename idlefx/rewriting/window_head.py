"""Choose the windows that work, or the tokens that work in each window.

1. A window is scored by the mean over its tokens; a token in its window by the mean query of that window. For the
   latter each window stands for an image, (B * windows, slots, …) in place of (B, N, …).
2. Scores of all tokens are those of any other block: nearly free where queries and keys are affine in what stands in
   the stream's own order before it is moved.
"""

import operator
from functools import cached_property

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.blocks import Opened
from idlefx.analysis.partition import Windows
from idlefx.analysis.projections import Projection
from idlefx.graph.notes import Role
from idlefx.records import Block, Step
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.rewriting.selector_head import Head
from idlefx.rewriting.told_layouts import products
from idlefx.runtime import ops, windows

aten = torch.ops.aten


class WindowHead(Head):
    """The selector head of a block whose attention is over windows.

    Args:
        graph: The graph.
        block: The block.
        opened: The same, as nodes.
        unit: What idles, whole "windows" or "tokens" in each.
    """

    def __init__(self, graph: fx.Graph, block: Block, opened: Opened, unit: str) -> None:
        super().__init__(graph, block, opened)
        assert opened.walk.windows is not None
        self.windows: Windows = opened.walk.windows
        self.unit = unit

    def choose(self, step: Step, among: fx.Node | None) -> fx.Node:
        """Insert the choice: what works, the positions of its tokens, and the place of every token among them."""
        assert among is None, "a plan lets all windows be chosen anew"
        by_window, (count, size) = self.unit == "windows", (self.windows.count, self.windows.size)
        scores = self.build(step)
        if by_window:
            scores = self.add(windows.window_scores, scores, self._where, name="window_scores")
        kept = step.kept // (size if by_window else count)
        return self.tell(self.add(ops.choose_tokens, scores, (), kept, name="choice", role="choice"))

    def tell(self, choice: fx.Node, *further: Role) -> fx.Node:
        """Insert what a choice of windows, or of slots in each, consists of, and what that means for tokens."""
        chosen, place, *_ = self._told(choice, "chosen", "chosen place", *further)
        positions_of = windows.of_whole_windows if self.unit == "windows" else windows.of_each_window
        positions = self.add(positions_of, chosen, place, self._where, self._slots, name="positions", role="choice")
        return super().tell(positions)

    @property
    def parts(self) -> int:
        """The windows, where tokens are chosen in each."""
        return 1 if self.unit == "windows" else self.windows.count

    @property
    def score_count(self) -> int:
        """How many tokens are scored together."""
        return self.block.tokens if self.unit == "windows" else self.windows.size

    @cached_property
    def _tables(self) -> fx.Node:
        shape = (self.windows.count, self.windows.size)
        told = (*self.windows.runs, shape, self.block.tokens)
        return self.add(windows.tables, self.stream, *told, name="tables")

    @cached_property
    def _where(self) -> fx.Node:
        """The token in each slot (windows, slots)."""
        return self.add(operator.getitem, self._tables, 0, name="where", role="where")

    @cached_property
    def _slots(self) -> fx.Node:
        """The slot of each token (N,)."""
        return self.add(operator.getitem, self._tables, 1, name="slots", role="slots")

    def tokens_first(self, stream: fx.Node) -> fx.Node:
        """Something laid out as the stream, as (B, N, C), or as (B * windows, slots, C)."""
        return self.in_parts(super().tokens_first(stream))

    def in_parts(self, tokens: fx.Node) -> fx.Node:
        """Tokens (B, N, C), or (B * windows, slots, C)."""
        if self.unit == "windows":
            return tokens
        return self.add(windows.in_windows, tokens, self._where, name="in_windows")

    def _all_tokens(self, rows: Projection) -> fx.Node:
        given = rows.linear.all_input_nodes[0]
        if given not in self._arranged:
            tokens = super()._all_tokens(rows)
            if super()._token_dim(rows) == 0:
                tokens = self.add(aten.transpose.int, tokens, 0, 1, name="tokens")
            self._arranged[given] = self.in_parts(tokens)
        return self._arranged[given]

    @cached_property
    def _arranged(self) -> dict[fx.Node, fx.Node]:
        return {}

    def _token_dim(self, rows: Projection) -> int:
        return 1

    def heads_of(self, core: Core, rebuild: Rebuilder, *, keys: bool) -> fx.Node:
        """Queries or keys of one core, (B, H, N, D) or (B * windows, H, slots, D)."""
        node = core.key if keys else core.query
        layout, own = self.walk[node], self.windows
        sizes = tuple(own.partition.sides[side] for side in own.order)
        told = (self.stream, self.block.batch_dim, products(layout, own.order), sizes)
        each = self.add(windows.all_in_order, rebuild(node), *told, name="in_order")
        features = sum(not f.role for dim in layout for f in dim)
        if features == 1:
            each = self.add(aten.unsqueeze.default, each, 2, name="one_head")
        elif features > 2:
            each = self.add(aten.flatten.using_ints, each, 2, features, name="heads")
        if self.unit == "windows":
            each = self.add(aten.index_select.default, each, 1, self._slots, name="in_stream")
        else:
            each = self.add(aten.unflatten.int, each, 1, [own.count, own.size], name="in_windows")
            each = self.add(aten.flatten.using_ints, each, 0, 1, name="in_windows")
        each = self.add(aten.transpose.int, each, 1, 2, name="heads")
        groups = lay.heads(self.walk[core.query]) // lay.heads(core.key_layout(self.walk[core.key]))
        if keys and groups > 1:
            each = self.add(aten.repeat_interleave.self_int, each, groups, 1, name="grouped")
        return each
