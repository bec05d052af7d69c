"""Build selector heads as graph nodes.

1. Where queries and keys are affine in the normalised input, the mean logit of one query on all tokens is a dot
   product of each token with `W_kᵀ q / H`, up to a constant: neither keys nor values of all tokens are computed.
2. Elsewhere the evidence that the score asks for is computed on all tokens, and no more than that: keys without
   values, and the class query from the class token alone.
"""

from typing import Any

import torch
from torch import fx

from idlefx import layouts as lay
from idlefx import ops
from idlefx.affine import Projection, projection
from idlefx.blocks import Opened
from idlefx.errors import PlanError
from idlefx.graph import region
from idlefx.layouts import Layout
from idlefx.rebuild import Rebuilder, Subset, emit
from idlefx.records import Block, Step
from idlefx.selectors import find_selector

aten = torch.ops.aten


class Head:
    """The selector head of one block, built at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, block: Block, opened: Opened) -> None:
        self.graph, self.block, self.opened, self.walk = graph, block, opened, opened.walk
        self.name = f"idle_{block.index}_"
        self.all_tokens = Rebuilder(graph, self.walk, None, {opened.entry: opened.entry}, f"{self.name}score_")

    def build(self, step: Step) -> fx.Node:
        """The scores (B, N) of a step."""
        if step.form == "affine":
            return self._affine(step.selector)
        chosen = find_selector(step.selector)
        given = {name: self._evidence(name, step.selector) for name in chosen.evidence}
        try:
            scores = self._emit(chosen.function, name="scores", **given)
        except Exception as error:
            raise PlanError(
                f"select: selector {step.selector!r} failed in block {self.block.index} ({self.block.path}): "
                f"{type(error).__name__}: {error}"
            ) from error
        shape = list(getattr(scores.meta["val"], "shape", ()))
        if len(shape) != 2 or shape[1] != self.block.tokens:
            raise PlanError(
                f"select: selector {step.selector!r} returned {shape or type(scores.meta['val']).__name__} in block "
                f"{self.block.index}; it must return one score for each token, (B, {self.block.tokens})"
            )
        return scores

    def _emit(self, target: Any, *args: Any, name: str, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, *args, name=self.name + name, like=self.opened.exit, **kwargs)

    def _evidence(self, name: str, selector: str) -> Any:
        if name == "x":
            order = (self.block.batch_dim, self.block.token_dim)
            rest = next(d for d in range(3) if d not in order)
            x = self.opened.entry
            return x if (*order, rest) == (0, 1, 2) else self._emit(aten.permute.default, x, [*order, rest], name="x")
        if name == "query":
            return self._query(selector)
        if name in ("q", "k"):
            return self._heads(self.all_tokens, keys=name == "k")
        return {"prefix": self.block.prefix, "block": self.block.index}[name]

    def _query(self, selector: str) -> fx.Node:
        position, entry = self.block.class_token, self.opened.entry
        if position is None or selector == "mean":
            return self._emit(
                ops.mean_tokens, self._heads(self.all_tokens, keys=False), self.block.prefix, 2, name="query"
            )
        if self._is_nested():
            everyone = self._heads(self.all_tokens, keys=False)
            return self._emit(aten.slice.Tensor, everyone, 2, position, position + 1, name="query")
        dims = (self.block.token_dim, self.block.batch_dim)
        token = self._emit(aten.slice.Tensor, entry, dims[0], position, position + 1, name="class_token")
        index = self._emit(ops.fixed_tokens, entry, (position,), dims[1], name="class_index")
        alone = Subset(index, (position,), (), 0)
        return self._heads(Rebuilder(self.graph, self.walk, alone, {entry: token}, f"{self.name}class_"), keys=False)

    def _is_nested(self) -> bool:
        """Whether an attention stands in front of another's query, which then needs all tokens and not its own."""
        outs = {core.out for core in self.opened.cores}
        before = (region(self.opened.flow, self.opened.entry, core.query) for core in self.opened.cores)
        return any(not outs.isdisjoint(nodes) for nodes in before)

    def _heads(self, rebuild: Rebuilder, *, keys: bool) -> fx.Node:
        """Queries or keys of all attention cores, (B, H, N, D)."""
        found = []
        for core in self.opened.cores:
            node, layout = (
                (core.key, core.key_layout(self.walk[core.key])) if keys else (core.query, self.walk[core.query])
            )
            self._narrow(node, rebuild)
            heads = rebuild(node)
            if keys and core.transposed:
                heads = self._emit(aten.transpose.int, heads, -2, -1, name="keys")
            heads = self._standard(heads, layout)
            each = lay.heads(self.walk[core.query]) // lay.heads(layout)
            if each > 1:  # grouped queries: a key serves several heads
                heads = self._emit(aten.repeat_interleave.self_int, heads, each, 1, name="grouped")
            found.append(heads)
        return found[0] if len(found) == 1 else self._emit(aten.cat.default, found, 1, name="heads")

    def _narrow(self, node: fx.Node, rebuild: Rebuilder) -> None:
        """Let the rebuilt node come out of its own rows of a fused layer, so that the others are not computed."""
        for view in [node, *self.opened.dominators(node)]:
            if view in rebuild.mapping:
                return
            rows = projection(self.walk, view) if view in self.walk else None
            if rows is not None:
                if not rows.is_whole and all(len(dim) == 1 for dim in self.walk[view]):
                    rebuild.mapping[view] = self._rows_of(rebuild, rows, self.walk[view])
                return

    def _rows_of(self, rebuild: Rebuilder, rows: Projection, layout: Layout) -> fx.Node:
        given, weight, bias = self._weights(rows)
        out = self._emit(aten.linear.default, rebuild(given), weight, bias, name="rows")
        features = [dim[0].size for dim in layout if not dim[0].role]
        out = self._emit(aten.unflatten.int, out, 2, features, name="split")
        roles = [dim[0].role for dim in self.walk[rows.linear][:2]]
        order, next_feature = [], 2
        for dim in layout:
            order.append(roles.index(dim[0].role) if dim[0].role else next_feature)
            next_feature += not dim[0].role
        return self._emit(aten.permute.default, out, order, name="ordered")

    def _weights(self, rows: Projection) -> tuple[fx.Node, Any, Any]:
        given, weight, bias = (*rows.linear.args, None)[:3]
        assert isinstance(given, fx.Node)
        if not rows.is_whole:
            weight = self._emit(ops.take_rows, weight, *rows.rows, name="weight")
            bias = bias and self._emit(ops.take_rows, bias, *rows.rows, name="bias")
        return given, weight, bias

    def _standard(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Bring queries or keys to (B, H, N, D)."""
        factors = [f for dim in layout for f in dim]
        last = len(factors) - 1
        roles = ("batch", "", "tokens")
        order = [*sorted(range(last), key=lambda i: roles.index(factors[i].role)), last]
        if order != list(range(len(factors))) or len(factors) != len(layout):
            val = node.meta["val"]
            count = next(lay.number(val.shape[d]) for d, dim in enumerate(layout) if lay.is_tokens(dim))
            shape = [-1 if f.role == "batch" else count if f.role == "tokens" else f.size for f in factors]
            node = self._emit(aten.reshape.default, node, shape, name="factors")
            node = self._emit(aten.permute.default, node, order, name="ordered")
        rank = len(factors)
        if rank == 3:
            return self._emit(aten.unsqueeze.default, node, 1, name="one_head")
        return self._emit(aten.flatten.using_ints, node, 1, rank - 3, name="heads") if rank > 4 else node

    def _affine(self, selector: str) -> fx.Node:
        total = None
        heads = sum(lay.heads(self.walk[core.query]) for core in self.opened.cores)
        for core in self.opened.cores:
            query, key = (projection(self.walk, node, up_to_scale=True) for node in (core.query, core.key))
            assert query is not None and key is not None
            given, weight, bias = self._weights(query)
            one = self._one_token(self.all_tokens(given), self._token_dim(query), selector)
            one = self._emit(aten.linear.default, one, weight, bias, name="query")
            given, weight, _ = self._weights(key)
            tokens = self.all_tokens(given)
            if self._token_dim(key) == 0:
                tokens = self._emit(aten.transpose.int, tokens, 0, 1, name="tokens")
            scaled = self._emit(aten.div.Tensor, one, heads, name="scaled")
            direction = self._emit(aten.matmul.default, scaled, weight, name="direction")
            column = self._emit(aten.unsqueeze.default, direction, 2, name="column")
            dots = self._emit(aten.matmul.default, tokens, column, name="dots")
            total = dots if total is None else self._emit(aten.add.Tensor, total, dots, name="sum")
        return self._emit(aten.squeeze.dim, total, 2, name="scores")

    def _token_dim(self, rows: Projection) -> int:
        return [dim[0].role for dim in self.walk[rows.linear]].index("tokens")

    def _one_token(self, tokens: fx.Node, dim: int, selector: str) -> fx.Node:
        if selector == "class":
            return self._emit(aten.select.int, tokens, dim, self.block.class_token, name="class_token")
        mean = self._emit(ops.mean_tokens, tokens, self.block.prefix, dim, name="mean")
        return self._emit(aten.squeeze.dim, mean, dim, name="mean_token")
