"""Give every idling block a selector head: scores of all tokens, and the positions of those that work.

1. A step that idles gets `idle_<block>_scores` (B, N) and `idle_<block>_index` (B, P + K).
2. If the plan lets no token return, the choice is made among the tokens that worked in the idling block before.
3. Nothing reads the positions yet, so nothing changes.
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
    before: fx.Node | None = None
    for step in plan:
        if step.idles:
            block = plan.blocks[step.block]
            opened = open_block(graph, block)
            name = f"idle_{block.index}_index"
            with graph.inserting_before(opened.exit):
                scores = Head(graph, block, opened).build(step)
                choice = (scores, block.prefix, step.kept, *([] if before is None else [before]))
                index = emit(graph, ops.choose_tokens, *choice, name=name, like=opened.exit)
            before = None if plan.reselect else index
    return module
