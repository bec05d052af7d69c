"""Bring the stream of a block into a batch of sequences and back, as graph nodes.

The sides of a grid are flattened into one dimension; few tokens of a grid stand in one row of it. Where windows of an
image are stacked in the batch, (k * B, n, C), all of its tokens are (B, k * n, C), and few of them (B, n, C). A stream
without a batch, (N, C), gets one in front.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from idlefx.records import Block

aten = torch.ops.aten
Add = Callable[..., fx.Node]  # inserts a call, with `name=`, and with `role=` where that is told


def sequences_of(add: Add, stream: fx.Node, block: Block, **told: Any) -> fx.Node:
    """All tokens of a stream in one dimension.

    Args:
        add: Inserts calls.
        stream: Laid out as the block's.
        block: The block.
        **told: What `add` is told further.
    """
    if block.shares_batch:
        return add(aten.reshape.default, stream, [-1, block.tokens, block.width], name="joined", **told)
    return out_of_row(add, stream, block, **told)


def stream_of(add: Add, tokens: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Undo `sequences_of`."""
    if block.shares_batch:
        return add(aten.reshape.default, tokens, [-1, block.grid[-1], block.width], name="stacked", **told)
    if block.grid:
        tokens = add(aten.unflatten.int, tokens, block.token_dim, list(block.grid), name="on_grid", **told)
    return _without_batch(add, tokens, block, told)


def row_of(add: Add, tokens: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Few tokens in one dimension, as a stream of the block."""
    for _ in () if block.shares_batch else block.grid[1:]:
        tokens = add(aten.unsqueeze.default, tokens, block.token_dim, name="row", **told)
    return _without_batch(add, tokens, block, told)


def out_of_row(add: Add, stream: fx.Node, block: Block, **told: Any) -> fx.Node:
    """Undo `row_of`."""
    if block.batch_dim is None:
        return add(aten.unsqueeze.default, stream, 0, name="batch", **told)
    if block.shares_batch or not block.grid:
        return stream
    sides = (block.token_dims[0], block.token_dims[-1])
    return add(aten.flatten.using_ints, stream, *sides, name="flat", **told)


def _without_batch(add: Add, stream: fx.Node, block: Block, told: dict[str, Any]) -> fx.Node:
    return stream if block.batch_dim is not None else add(aten.squeeze.dim, stream, 0, name="one", **told)
