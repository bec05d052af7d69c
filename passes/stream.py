"""Give the model a second output: the residual stream after its last block.

1. The output becomes `(output, stream)`, where the stream is (B, N, C); (B, H, W, C) on a grid, (1, N, C) where it has
   no batch, and (B, windows, n, C) where attention joins windows that are stacked in the batch.
2. Later passes put all tokens back where the stream is read, so none of them need know of it.
3. Without blocks nothing changes.
"""

import torch
from torch import fx

from idlefx.graph.build import add_call, return_too
from idlefx.graph.queries import by_name, output_of
from idlefx.records import Plan

aten = torch.ops.aten


def return_stream(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return what leaves the last block of the table, whose tokens are known; that block must still be dense."""
    graph = module.graph
    if not plan.blocks:
        return module
    last = plan.blocks[-1]
    stream = by_name(graph)[last.exit]
    leading = dict.fromkeys(dim for dim in (last.batch_dim, *last.token_dims) if dim is not None)
    order = [*leading, *(dim for dim in range(stream.meta["val"].ndim) if dim not in leading)]
    with graph.inserting_before(output_of(graph)):
        if order != sorted(order):
            stream = add_call(graph, aten.permute.default, stream, order, name="stream", like=stream)
        if last.batch_dim is None:
            stream = add_call(graph, aten.unsqueeze.default, stream, 0, name="stream", like=stream)
        if last.shares_batch:
            sides = (last.batch_dim, [-1, last.grid[0]])
            stream = add_call(graph, aten.unflatten.int, stream, *sides, name="stream", like=stream)
    return_too(graph, stream)
    return module
