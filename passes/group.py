"""Group tokens that are alike at the start of every stage whose idle tokens follow.

1. The block that opens a stage gets the positions of its workers (B, W), for every token the place of its worker among
   them (B, N), the positions of the workers and then of the others (B, N), and for each of the others the place of its
   worker (B, I); notes tell them.
2. Likeness is taken on what the block's attention projects; what the class token attends to is less likely to idle.
3. Nothing reads the groups yet, so nothing changes.
"""

import operator

from torch import fx

from idlefx.analysis.blocks import open_blocks
from idlefx.graph.notes import Role
from idlefx.records import Plan
from idlefx.rewriting.likeness import class_logits, normalised_input
from idlefx.rewriting.selector_head import Head
from idlefx.runtime import following, nearest

ROLES: tuple[Role, ...] = ("index", "place", "order", "leaders")  # of what `group_tokens` returns


def form_groups(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the groups of the plan's stages."""
    graph = module.graph
    steps = [step for step, *_ in plan.stages]
    blocks = [plan.blocks[step.block] for step in steps]
    for step, block, opened in zip(steps, blocks, open_blocks(graph, blocks), strict=True):
        with graph.inserting_before(opened.exit):
            head = Head(graph, block, opened)
            evidence = (normalised_input(head), class_logits(head))
            told = (*evidence, block.prefix, step.kept, nearest.anchors(step.tokens, step.kept))
            groups = head.add(following.group_tokens, *told, name="groups", role="choice")
            for place, role in enumerate(ROLES):
                head.add(operator.getitem, groups, place, name=role, role=role)
    return module
