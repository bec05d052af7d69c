"""Bring what a block computes into the order of dimensions that scores are defined in, as graph nodes."""

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Factor, Layout
from idlefx.graph.sizes import number
from idlefx.records import Block
from idlefx.rewriting.sequences import Add, out_of_row, sequences_of

aten = torch.ops.aten


def tokens_first(add: Add, stream: fx.Node, block: Block, *, few: bool = False) -> fx.Node:
    """Something laid out as the stream of a block, as (B, N, C); or as that of few tokens."""
    stream = (out_of_row if few else sequences_of)(add, stream, block)
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
    if not any(f.role == "batch" for f in factors):
        factors.insert(0, Factor(1, "batch"))
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
