"""Write every recognised attention as `scaled_dot_product_attention`.

1. A spelling that `attention` matches becomes one call; its result keeps its node, and so its name.
2. Keys that were transposed for the product are taken from before the transposition.
3. What is not recognised stays.
"""

import torch
from torch import fx

from idlefx.analysis.attention import Spelling, match
from idlefx.graph import notes
from idlefx.graph.build import add_call
from idlefx.graph.queries import argument, remove_dead, tensor_argument
from idlefx.records import Plan

aten = torch.ops.aten


def normalize_attention(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite hand-written attention; the plan does not matter."""
    del plan
    spellings = [spelling for node in module.graph.nodes if (spelling := match(node)) is not None]
    for spelling in spellings:
        _rewrite(module.graph, spelling)
    if spellings:
        remove_dead(module.graph)
    return module


def _rewrite(graph: fx.Graph, spelling: Spelling) -> None:
    out = spelling.out
    with graph.inserting_before(out):
        key = _untransposed(graph, spelling.key)
    out.target = aten.scaled_dot_product_attention.default
    out.args = (spelling.query, key, spelling.value, spelling.mask, spelling.dropout, False)
    out.kwargs = {"scale": spelling.scale}
    out.meta[notes.KEY] = notes.Spelled(spelling.name)


def _untransposed(graph: fx.Graph, key: fx.Node) -> fx.Node:
    rank = len(key.meta["val"].shape)
    if key.target is aten.transpose.int:
        dims = {argument(key, 1) % rank, argument(key, 2) % rank}
        if dims == {rank - 1, rank - 2}:
            return tensor_argument(key, 0)
    return add_call(graph, aten.transpose.int, key, -2, -1, name="keys", like=key)
