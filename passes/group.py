"""Group tokens that are alike at the start of every stage whose idle tokens follow.

1. The block that opens a stage gets the positions of its workers (B, W), for every token the place of its worker among
   them (B, N), the positions of the workers and then of the others (B, N), and for each of the others the place of its
   worker (B, I); notes tell them.
2. Likeness is taken on what the block's attention projects; what the class token attends to is less likely to idle.
3. Where attention is over windows, or over segments of a sequence, each of these is grouped as if it were an image; of
   windows, positions of workers among all tokens, window by window, and places among these are told too.
4. Nothing reads the groups yet, so nothing changes. Groups that join others need what these become: `follow` forms
   them.
"""

from torch import fx

from idlefx.analysis.blocks import open_blocks
from idlefx.records import Plan
from idlefx.rewriting.heads import head_of
from idlefx.rewriting.likeness import add_groups


def form_groups(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the groups of the plan's stages."""
    graph = module.graph
    steps = [first[0] for first, *_ in plan.chains]
    blocks = [plan.blocks[step.block] for step in steps]
    for step, block, opened in zip(steps, blocks, open_blocks(graph, blocks), strict=True):
        with graph.inserting_before(opened.exit):
            add_groups(head_of(graph, block, opened, step), step)
    return module
