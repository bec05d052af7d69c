"""Give every idling block a selector head: scores of all tokens, and the positions of those that work.

1. A step that idles gets `idle_<block>_scores` (B, N) and `idle_<block>_index` (B, P + K).
2. Nothing reads the positions yet, so nothing changes.
"""

from torch import fx

from idlefx import ops
from idlefx.blocks import open_block
from idlefx.heads import Head
from idlefx.rebuild import emit
from idlefx.records import Plan


def select_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the selector heads of the plan."""
    graph = module.graph
    for step in plan:
        if step.idles:
            block = plan.blocks[step.block]
            opened = open_block(graph, block)
            name = f"idle_{block.index}_index"
            with graph.inserting_before(opened.exit):
                scores = Head(graph, block, opened).build(step)
                emit(graph, ops.choose_tokens, scores, block.prefix, step.kept, name=name, like=opened.exit)
    return module
