"""Build selector heads as graph nodes.

1. Where queries and keys are affine in the normalised input, the mean logit of one query on all tokens is a dot
   product of each token with `W_kᵀ q / H`, up to a constant: neither keys nor values of all tokens are computed.
2. Elsewhere the evidence that the score asks for is computed on all tokens, and no more than that: keys without
   values, and the class query from the class token alone.
3. What is computed on all tokens bears a note of what it stands for, so that a later pass need not compute it again.
"""

import operator
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.blocks import Opened
from idlefx.analysis.projections import Projection, projection, stream_source
from idlefx.analysis.subset import Subset
from idlefx.errors import PlanError
from idlefx.graph.build import add_call
from idlefx.graph.notes import Made, Role, made_for, note_of
from idlefx.graph.queries import region
from idlefx.planning.selectors import find_selector
from idlefx.records import Block, Step
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.rewriting.standard_order import flattened, heads_first, tokens_first
from idlefx.runtime import ops

aten = torch.ops.aten


class Head:
    """The selector head of one block, built at the graph's insertion point.

    Args:
        graph: The graph.
        block: The block.
        opened: The same, as nodes.
        stream: What enters the block, if it is not all tokens.
        subset: Which tokens these are; None for all of them.
    """

    def __init__(
        self, graph: fx.Graph, block: Block, opened: Opened, stream: fx.Node | None = None, subset: Subset | None = None
    ) -> None:
        self.graph, self.block, self.opened, self.walk = graph, block, opened, opened.walk
        self.stream, self.few = stream if stream is not None else opened.entry, subset is not None
        self.prefix = block.prefix if subset is None else block.prefix_among(subset.kept) or ()
        self.class_token = None if block.class_token is None else self.prefix[block.prefix.index(block.class_token)]
        self.name = f"idle_{block.index}_"
        note = Made(block.index, "score")
        copies = {note.stands_for: node for node, note in self._copies()}
        known = {node: copies[node.name] for node in self.walk.layouts if node.name in copies}
        mapping = {opened.entry: self.stream, **known}
        self.all_tokens = Rebuilder(graph, self.walk, subset, mapping, f"{self.name}score_", note)

    def _copies(self) -> Iterator[tuple[fx.Node, Made]]:
        """What an earlier head of this block has computed of all tokens, which need not be computed again."""
        for node in made_for(self.graph, self.block.index, "score"):
            note = note_of(node)
            if isinstance(note, Made) and note.stands_for:
                yield node, note

    def build(self, step: Step) -> fx.Node:
        """The scores (B, N) of a step."""
        if step.form == "affine":
            return self._affine(step.selector)
        chosen = find_selector(step.selector)
        given = {name: self._evidence(name, step.selector) for name in chosen.evidence}
        try:
            scores = self.add(chosen.function, name="scores", **given)
        except Exception as error:
            raise PlanError(
                f"select: selector {step.selector!r} failed in block {self.block.index} ({self.block.path}): "
                f"{type(error).__name__}: {error}"
            ) from error
        shape = list(getattr(scores.meta["val"], "shape", ()))
        if len(shape) != 2 or shape[1] != self.score_count:
            raise PlanError(
                f"select: selector {step.selector!r} returned {shape or type(scores.meta['val']).__name__} in block "
                f"{self.block.index}; it must return one score for each token, (B, {self.score_count})"
            )
        return scores

    def choose(self, step: Step, among: fx.Node | None) -> fx.Node:
        """Insert the choice of a step, among all tokens or those at positions; gives the positions of what works."""
        given = (self.build(step), self.block.prefix, step.kept, *([] if among is None else [among]))
        return self.tell(self.add(ops.choose_tokens, *given, name="choice", role="choice"))

    @property
    def score_count(self) -> int:
        """How many tokens are scored together."""
        return self.block.tokens

    def add(self, target: Any, *args: Any, name: str, role: Role = "score", **kwargs: Any) -> fx.Node:
        """Insert a call for this block."""
        note = Made(self.block.index, role)
        return add_call(self.graph, target, *args, name=self.name + name, like=self.opened.exit, note=note, **kwargs)

    @property
    def parts(self) -> int:
        """How many parts an image has in which tokens are chosen apart: itself, or windows."""
        return 1

    def in_parts(self, tokens: fx.Node) -> fx.Node:
        """Tokens (B, N, C), as if each part were an image."""
        return tokens

    def tell(self, choice: fx.Node, *further: Role) -> fx.Node:
        """Insert what a choice consists of: the positions of what works, which are returned, places, and more."""
        index, *_ = self._told(choice, "index", "place", *further)
        return index

    def _told(self, choice: fx.Node, *roles: Role) -> list[fx.Node]:
        return [self.add(operator.getitem, choice, at, name=role, role=role) for at, role in enumerate(roles)]

    def _evidence(self, name: str, selector: str) -> Any:
        if name == "x":
            return self.tokens_first(self.stream)
        if name == "query":
            return self._query(selector)
        if name in ("q", "k"):
            return self._heads(self.all_tokens, keys=name == "k")
        return {"prefix": self.prefix, "block": self.block.index}[name]

    def tokens_first(self, stream: fx.Node) -> fx.Node:
        """Something laid out as the stream, as (B, N, C)."""
        return tokens_first(self.add, stream, self.block, few=self.few)

    def _query(self, selector: str) -> fx.Node:
        if self.class_token is None or selector == "mean":
            return self.add(ops.mean_tokens, self._heads(self.all_tokens, keys=False), self.prefix, 2, name="query")
        return self._joined([self.class_query(core) for core in self.opened.cores])

    def class_query(self, core: Core) -> fx.Node:
        """The class token's query in one core (B, H, 1, D)."""
        position = self.class_token
        assert position is not None
        if not self._is_nested():
            return self.heads_of(core, self._class_token, keys=False)
        everyone = self.heads_of(core, self.all_tokens, keys=False)
        return self.add(aten.slice.Tensor, everyone, 2, position, position + 1, name="query")

    @cached_property
    def _class_token(self) -> Rebuilder:
        """Copies nodes of the block onto the class token alone."""
        place, position, stream, dim = self.class_token, self.block.class_token, self.stream, self.block.token_dim
        assert place is not None and position is not None
        role: Role = "class token"
        token = self.add(aten.slice.Tensor, stream, dim, place, place + 1, name="class_token", role=role)
        index = self.add(ops.fixed_tokens, stream, (position,), self.block.batch_dim, name="class_index", role=role)
        alone = Subset(index, (position,), (), 0)
        note = Made(self.block.index, role)
        return Rebuilder(self.graph, self.walk, alone, {self.opened.entry: token}, f"{self.name}class_", note)

    def _is_nested(self) -> bool:
        """Whether an attention stands in front of another's query, which then needs all tokens and not its own."""
        outs = {core.out for core in self.opened.cores}
        before = (region(self.opened.flow, self.opened.entry, core.query) for core in self.opened.cores)
        return any(not outs.isdisjoint(nodes) for nodes in before)

    def _heads(self, rebuild: Rebuilder, *, keys: bool) -> fx.Node:
        """Queries or keys of all attention cores, (B, H, N, D)."""
        return self._joined([self.heads_of(core, rebuild, keys=keys) for core in self.opened.cores])

    def _joined(self, heads: list[fx.Node]) -> fx.Node:
        return heads[0] if len(heads) == 1 else self.add(aten.cat.default, heads, 1, name="heads")

    def heads_of(self, core: Core, rebuild: Rebuilder, *, keys: bool) -> fx.Node:
        """Queries or keys of one core, (B, H, N, D)."""
        node, layout = (core.key, core.key_layout(self.walk[core.key])) if keys else (core.query, self.walk[core.query])
        self._narrow(node, rebuild)
        heads = rebuild(node)
        if keys and core.transposed:
            heads = self.add(aten.transpose.int, heads, -2, -1, name="keys")
        heads = heads_first(self.add, heads, layout)
        each = lay.heads(self.walk[core.query]) // lay.heads(layout)
        if each > 1:  # grouped queries: a key serves several heads
            heads = self.add(aten.repeat_interleave.self_int, heads, each, 1, name="grouped")
        return heads

    def _narrow(self, node: fx.Node, rebuild: Rebuilder) -> None:
        """Let the rebuilt node come out of its own rows of a fused layer, so that the others are not computed."""
        for view in [node, *self.opened.dominators(node)]:
            if view in rebuild.mapping:
                return
            rows = projection(self.walk, view) if view in self.walk else None
            if rows is not None:
                alone = all(len(dim) == 1 and dim[0].side is None for dim in self.walk[view])
                if alone and not rows.is_whole:
                    rebuild.mapping[view] = self._rows_of(rebuild, rows, view)
                return

    def _rows_of(self, rebuild: Rebuilder, rows: Projection, view: fx.Node) -> fx.Node:
        layout = self.walk[view]
        given, weight, bias = self.weights(rows)
        tokens = self._features_last(rows, rebuild(given))
        out = self.add(aten.linear.default, tokens, weight, bias, name="rows")
        features = [dim[0].size for dim in layout if not dim[0].role]
        out = self.add(aten.unflatten.int, out, 2, features, name="split")
        token_dim = self._token_dim(rows)
        order, next_feature, roles = [], 2, ["tokens", "batch"] if token_dim == 0 else ["batch", "tokens"]
        if not self.walk.has_batch:
            out, next_feature, roles = self.add(aten.squeeze.dim, out, 0, name="one"), 1, ["tokens"]
        for dim in layout:
            order.append(roles.index(dim[0].role) if dim[0].role else next_feature)
            next_feature += not dim[0].role
        name, note = rebuild.prefix + view.name, replace(rebuild.note, stands_for=view.name)
        return add_call(self.graph, aten.permute.default, out, order, name=name, like=self.opened.exit, note=note)

    def weights(self, rows: Projection) -> tuple[fx.Node, Any, Any]:
        """The input of a projection, its weight (width, C) and its bias, if any."""
        given, weight, bias = (*rows.linear.args, None)[:3]
        assert isinstance(given, fx.Node)
        if rows.convolves:
            weight = self.add(aten.flatten.using_ints, weight, 1, name="weight")
        if not rows.is_whole:
            weight = self.add(ops.take_rows, weight, *rows.rows, name="weight")
            bias = bias and self.add(ops.take_rows, bias, *rows.rows, name="bias")
        return given, weight, bias

    def _affine(self, selector: str) -> fx.Node:
        sums = [self.sum_over_heads(core, selector) for core in self.opened.cores]
        return self.add(ops.mean_over_heads, sums, self.head_count, name="scores")

    def sum_over_heads(self, core: Core, selector: str) -> fx.Node:
        """Logits of one query on all tokens (B, N), up to a factor and a constant, summed over the heads of a core."""
        query, key = self.projections(core)
        _, weight, bias = self.weights(query)
        one = self._one_token(query, selector)
        one = self.add(aten.linear.default, one, weight, bias, name="query", role="query")
        _, weight, _ = self.weights(key)
        direction = self.add(aten.matmul.default, one, weight, name="direction")
        return self.add(ops.score_tokens, self.tokens(key), direction, name="sums")

    def scaled(self, core: Core, queries: fx.Node, role: Role = "score") -> fx.Node:
        """Queries (B, H, n, D) times what the logits of the core are multiplied with, besides its plain scale."""
        for node in core.scalings:
            factors = [queries if operand in self.walk else operand for operand in node.args]
            queries = self.add(node.target, *factors, name="scaled", role=role)
        return queries

    @property
    def head_count(self) -> int:
        """How many heads all attention cores have together."""
        return sum(lay.heads(self.walk[core.query]) for core in self.opened.cores)

    def projections(self, core: Core) -> tuple[Projection, Projection]:
        """The linear layers of queries and keys, where both are affine."""
        query, key = (projection(self.walk, node, up_to_scale=True) for node in (core.query, core.key))
        assert query and key
        return query, key

    def tokens(self, rows: Projection) -> fx.Node:
        """What a projection is made of, for all tokens (B, N, C)."""
        tokens = self._all_tokens(rows)
        return self.add(aten.transpose.int, tokens, 0, 1, name="tokens") if self._token_dim(rows) == 0 else tokens

    def _all_tokens(self, rows: Projection) -> fx.Node:
        return self._features_last(rows, self.all_tokens(self._source(rows)))

    def _source(self, rows: Projection) -> fx.Node:
        """What a projection is made of, where the tokens stand in the stream's own order."""
        source = stream_source(self.walk, rows.linear.all_input_nodes[0])
        assert source is not None
        return source

    def _features_last(self, rows: Projection, tokens: fx.Node) -> fx.Node:
        """What a projection is made of, for any tokens: these in one dimension, and the features in the last."""
        if not self.walk.has_batch:
            return self.add(aten.unsqueeze.default, tokens, 0, name="batch")
        tokens = flattened(self.add, tokens, self.walk[self._source(rows)])
        return self.add(aten.transpose.int, tokens, 1, 2, name="tokens") if rows.convolves else tokens

    def _token_dim(self, rows: Projection) -> int:
        if not self.walk.has_batch:
            return 1
        return 0 if self.walk[self._source(rows)][0][0].role == "tokens" else 1

    def _one_token(self, rows: Projection, selector: str) -> fx.Node:
        """The class token in front of a projection, or the mean image token, (B, C)."""
        position, dim = self.class_token, self._token_dim(rows)
        if selector != "class" or position is None:
            one = self.add(ops.mean_tokens, self._all_tokens(rows), self.prefix, dim, name="mean")
        elif self._is_nested() or not self.walk.has_batch:
            one = self.add(aten.slice.Tensor, self._all_tokens(rows), dim, position, position + 1, name="one")
        else:
            one = self._class_token(rows.linear.all_input_nodes[0])
        return self.add(aten.squeeze.dim, one, dim, name="one_token")
