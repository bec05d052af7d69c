"""Give every idling block a selector head: scores of all tokens, and the positions of those that work.

1. A step that idles gets scores of all tokens (B, N), and of these its "index" (B, P + K), the positions of the tokens
   that work, and its "place" (B, N), where each token stands, first those that work; notes on the nodes tell them.
2. If the plan lets no token return, the choice is made among the tokens that worked in the idling block before.
3. Where attention is over windows, it is windows that are chosen, or tokens in each, and so positions of tokens; where
   it is over segments of the sequence, tokens in each.
4. Nothing reads the positions yet, so nothing changes.
"""

from torch import fx

from idlefx.analysis.blocks import open_blocks
from idlefx.records import Plan
from idlefx.rewriting.heads import head_of


def select_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the selector heads of the plan."""
    graph = module.graph
    before: fx.Node | None = None
    steps = [step for step in plan if step.idles]
    blocks = [plan.blocks[step.block] for step in steps]
    for step, block, opened in zip(steps, blocks, open_blocks(graph, blocks), strict=True):
        with graph.inserting_before(opened.exit):
            index = head_of(graph, block, opened, step).choose(step, before)
        before = None if plan.reselect else index
    return module
