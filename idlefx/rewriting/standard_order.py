"""Bring what a block computes into the order of dimensions that scores are defined in, as graph nodes.

A stream of tokens on a grid has these in one dimension before some of them are taken, and after they are put back. Few
tokens of a grid stand in one row of it. Where windows of an image are stacked in the batch, (k * B, n, C), all of its
tokens are (B, k * n, C), and few of them (B, n, C).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Layout
from idlefx.graph.sizes import number
from idlefx.records import Block

aten = torch.ops.aten
Add = Callable[..., fx.Node]  # inserts a call, with `name=`, and with `role=` where that is told


def in_one_dimension(add: Add, stream: fx.Node, block: Block, **told: Any) -> fx.Node:
    """A stream with all tokens of a block in one dimension."""
    if block.shares_batch:
        return add(aten.reshape.default, stream, [-1, block.tokens, block.width], name="joined", **told)
    return out_of_row(add, stream, block, **told)


def on_grid(add: Add, tokens: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Undo `in_one_dimension`."""
    if block.shares_batch:
        return add(aten.reshape.default, tokens, [-1, block.grid[-1], block.width], name="stacked", **told)
    if not block.grid:
        return tokens
    return add(aten.unflatten.int, tokens, block.token_dim, list(block.grid), name="on_grid", **told)


def in_row(add: Add, tokens: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Few tokens in one dimension, as a stream of the block."""
    for _ in () if block.shares_batch else block.grid[1:]:
        tokens = add(aten.unsqueeze.default, tokens, block.token_dim, name="row", **told)
    return tokens


def out_of_row(add: Add, stream: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Undo `in_row`."""
    if block.shares_batch or not block.grid:
        return stream
    sides = (block.token_dims[0], block.token_dims[-1])
    return add(aten.flatten.using_ints, stream, *sides, name="flat", **told)


def tokens_first(add: Add, stream: fx.Node, block: Block, *, few: bool = False) -> fx.Node:
    """Something laid out as the stream of a block, as (B, N, C); or as that of few tokens."""
    stream = (out_of_row if few else in_one_dimension)(add, stream, block)
    token_dim, batch_dim = block.flat_dims
    order = [batch_dim, token_dim, 3 - batch_dim - token_dim]
    return stream if order == [0, 1, 2] else add(aten.permute.default, stream, order, name="x")


def flattened(add: Add, node: fx.Node, layout: Layout) -> fx.Node:
    """Features of tokens with the rows and columns of a grid, if there is one, in one dimension."""
    dims = [d for d, dim in enumerate(layout) if lay.has(dim, "tokens")]
    return node if len(dims) == 1 else add(aten.flatten.using_ints, node, dims[0], dims[-1], name="flat")


def heads_first(add: Add, node: fx.Node, layout: Layout) -> fx.Node:
    """Queries or keys of any layout, as (B, H, N, D)."""
    factors = [f for dim in layout for f in dim]
    last, roles = len(factors) - 1, ("batch", "", "tokens")
    order = [*sorted(range(last), key=lambda i: roles.index(factors[i].role)), last]
    if order != list(range(len(factors))) or len(factors) != len(layout):
        sizes = node.meta["val"].shape
        count = next(number(sizes[d]) for d, dim in enumerate(layout) if lay.is_tokens(dim))
        shape = [-1 if f.role == "batch" else count if f.role == "tokens" else f.size for f in factors]
        node = add(aten.reshape.default, node, shape, name="factors")
        node = add(aten.permute.default, node, order, name="ordered")
    rank = len(factors)
    if rank == 3:
        return add(aten.unsqueeze.default, node, 1, name="one_head")
    return add(aten.flatten.using_ints, node, 1, rank - 3, name="heads") if rank > 4 else node
