"""Give every idling block a selector head: scores of all tokens, and the positions of those that work.

1. A step that idles gets `idle_<block>_scores` (B, N), `idle_<block>_order` (B, N), in which those that work come
   first, and `idle_<block>_index` (B, P + K), which is that first part.
2. If the plan lets no token return, the choice is made among the tokens that worked in the idling block before.
3. Nothing reads the positions yet, so nothing changes.
"""

import torch
from torch import fx

from idlefx import ops
from idlefx.blocks import open_block
from idlefx.heads import Head
from idlefx.rebuild import emit
from idlefx.records import Plan

aten = torch.ops.aten


def select_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the selector heads of the plan."""
    graph = module.graph
    before: fx.Node | None = None
    for step in plan:
        if step.idles:
            block = plan.blocks[step.block]
            opened = open_block(graph, block)
            name = f"idle_{block.index}_index"
            with graph.inserting_before(opened.exit):
                scores = Head(graph, block, opened).build(step)
                choice = (scores, block.prefix, step.kept, *([] if before is None else [before]))
                order = emit(graph, ops.order_tokens, *choice, name=f"idle_{block.index}_order", like=opened.exit)
                working = (order, 1, 0, len(block.prefix) + step.kept)
                index = emit(graph, aten.narrow.default, *working, name=name, like=opened.exit)
            before = None if plan.reselect else index
    return module
