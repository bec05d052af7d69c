"""Let tokens idle: run each planned block on the chosen tokens and write them back over the others.

1. The chosen tokens are taken from the residual stream; where they stand on a grid, it is flattened first, where
   windows are stacked in the batch, they are joined, and where it has no batch, it gets one.
2. The block is copied onto them. What it reads by token position is taken at the same positions, and every size
   that counts tokens is written anew, both as `propagation` proved them.
3. Where attention is over windows, the tokens are taken window by window, and what makes windows of them is a reshape.
   Where the stream itself stands in windows, this is the first thing and its way back the last.
4. The result is put back into the stream: what does so stands for the block's exit everywhere.
5. The dense blocks are removed, once all are rewritten: until then the positions of the others look unread.
"""

from typing import Any

from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.blocks import Opened, open_blocks
from idlefx.analysis.edits import Rearrange
from idlefx.analysis.subset import Subset, segments_of
from idlefx.graph.build import add_call
from idlefx.graph.notes import Made, Role, only_made_for
from idlefx.graph.queries import remove_dead
from idlefx.graph.sizes import shape_of
from idlefx.records import Block, Plan, Step
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.rewriting.sequences import out_of_row, row_of, sequences_of, stream_of
from idlefx.rewriting.told_layouts import rearranging
from idlefx.runtime import gather_scatter, windows


def idle_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite the blocks of the plan; their heads must be there (`select`)."""
    steps = [step for step in plan if step.idles]
    blocks = [plan.blocks[step.block] for step in steps]
    opened_blocks = open_blocks(module.graph, blocks)
    # From the last to the first, so that a block's entry is still the node that the table names.
    for step, block, opened in reversed(list(zip(steps, blocks, opened_blocks, strict=True))):
        with module.graph.inserting_before(opened.exit):
            scatter = _work(module.graph, block, opened, step)
        opened.exit.replace_all_uses_with(scatter)
    remove_dead(module.graph)
    return module


def _work(graph: fx.Graph, block: Block, opened: Opened, step: Step) -> fx.Node:
    begins, entry, like = f"idle_{block.index}_", opened.entry, opened.exit
    index, place = only_made_for(graph, block.index, "index"), only_made_for(graph, block.index, "place")
    dims = block.flat_dims

    def add(target: Any, *args: Any, role: Role, name: str = "") -> fx.Node:
        told = Made(block.index, role)
        return add_call(graph, target, *args, name=begins + (name or role), like=like, note=told)

    tokens = sequences_of(add, entry, block, role="gather")
    over = opened.walk.windows
    padded = over is not None and over.partition.is_padded
    take: Any = windows.take_padded if padded else gather_scatter.take_tokens
    put: Any = windows.put_padded if padded else gather_scatter.put_tokens
    gathered = row_of(add, add(take, tokens, index, *dims, role="gather"), block, role="gather")
    chosen = only_made_for(graph, block.index, "chosen") if step.unit else None
    segments = segments_of(block.segments, step.kept_by_segment)
    working = Subset(index, block.prefix, block.image_positions, step.kept, over, step.unit, chosen, segments)
    before, walk = lay.stream(shape_of(entry), block.token_dims, block.batch_dim, block.grid), opened.walk
    if walk.apart:
        told = rearranging(working, Rearrange(entry, before, walk[entry]), gathered)
        gathered = add(windows.rearrange, *told, role="work")
    worked = Rebuilder(graph, walk, working, {entry: gathered}, begins, Made(block.index, "work"))(opened.exit)
    if walk.apart:
        told = rearranging(working, Rearrange(opened.exit, walk[opened.exit], before), worked)
        worked = add(windows.rearrange, *told, role="work")
    worked = out_of_row(add, worked, block, role="work")
    return stream_of(add, add(put, tokens, index, worked, *dims, place, role="scatter"), block, role="work")
