"""Give every idling block a selector head: scores of all tokens, and the positions of those that work.

1. A step that idles gets scores of all tokens (B, N), and of these its "index" (B, P + K), the positions of the tokens
   that work, and its "place" (B, N), where each token stands, first those that work; notes on the nodes tell them.
2. If the plan lets no token return, the choice is made among the tokens that worked in the idling block before.
3. Where attention is over windows, it is windows that are chosen, or tokens in each, and so positions of tokens.
4. Nothing reads the positions yet, so nothing changes.
"""

from torch import fx

from idlefx.analysis.blocks import open_blocks
from idlefx.records import Plan
from idlefx.rewriting.selector_head import Head
from idlefx.rewriting.window_head import WindowHead
from idlefx.runtime import ops


def select_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the selector heads of the plan."""
    graph = module.graph
    before: fx.Node | None = None
    steps = [step for step in plan if step.idles]
    blocks = [plan.blocks[step.block] for step in steps]
    for step, block, opened in zip(steps, blocks, open_blocks(graph, blocks), strict=True):
        with graph.inserting_before(opened.exit):
            if step.unit:
                WindowHead(graph, block, opened, step.unit).choose(step)
                continue
            head = Head(graph, block, opened)
            given = (head.build(step), block.prefix, step.kept, *([] if before is None else [before]))
            choice = head.add(ops.choose_tokens, *given, name="choice", role="choice")
            index = head.tell(choice)
        before = None if plan.reselect else index
    return module
