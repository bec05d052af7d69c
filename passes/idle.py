"""Let tokens idle: run each planned block on the chosen tokens and write them back over the others.

1. The chosen tokens are taken from the residual stream: `idle_<block>_gather`.
2. The block is copied onto them. What it reads by token position is taken at the same positions, and every size
   that counts tokens is written anew, both as `axes` proved them.
3. The result is put back into the stream: `idle_<block>_scatter` stands for the block's exit everywhere.
4. Leading prefix tokens lead among the worked tokens too, so the next block's head reads its class token there and need
   not wait for the others to be put back.
5. The dense blocks are removed, once all are rewritten: until then the positions of the others look unread.
"""

import torch
from torch import fx

from idlefx import ops
from idlefx.blocks import Opened, open_block
from idlefx.graph import Call, by_name, remove_dead
from idlefx.rebuild import Rebuilder, Subset, emit
from idlefx.records import Block, Plan, Step

aten = torch.ops.aten


def idle_tokens(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite the blocks of the plan; their heads must be there (`select`)."""
    # From the last to the first, so that a block's entry is still the node that the table names.
    for step in reversed([step for step in plan if step.idles]):
        block = plan.blocks[step.block]
        opened = open_block(module.graph, block)
        with module.graph.inserting_before(opened.exit):
            worked, scatter = _work(module.graph, block, opened, step)
        opened.exit.replace_all_uses_with(scatter)
        _read_worked(scatter, worked, block)
    remove_dead(module.graph)
    return module


def _work(graph: fx.Graph, block: Block, opened: Opened, step: Step) -> tuple[fx.Node, fx.Node]:
    name, entry, like = f"idle_{block.index}_", opened.entry, opened.exit
    index = by_name(graph)[f"{name}index"]
    dims = (block.token_dim, block.batch_dim)
    gathered = emit(graph, ops.take_tokens, entry, index, *dims, name=f"{name}gather", like=like)
    chosen = Subset(index, block.prefix, block.image_positions, step.kept)
    worked = Rebuilder(graph, opened.walk, chosen, {entry: gathered}, name)(opened.exit)
    place = emit(graph, ops.places_of, by_name(graph)[f"{name}order"], name=f"{name}place", like=like)
    scatter = emit(graph, ops.put_tokens, entry, index, worked, *dims, place, name=f"{name}scatter", like=like)
    return worked, scatter


def _read_worked(scatter: fx.Node, worked: fx.Node, block: Block) -> None:
    """Let who reads leading prefix tokens of the stream read them among the worked tokens."""
    leading = next((i for i, p in enumerate(block.prefix) if i != p), len(block.prefix))
    readers: list[Call] = [user for user in scatter.users if user.target is aten.slice.Tensor]
    for user in readers:
        _, dim, start, stop = user.args
        if dim == block.token_dim and 0 <= start < stop <= leading and _kind(worked)[1] == _kind(scatter)[1]:
            with user.graph.inserting_before(user):
                user.replace_all_uses_with(_cut_out(worked, user))


def _cut_out(node: Call, like: Call) -> fx.Node:
    """The part of a node that another cuts out; of a sum the sum of the parts, as the whole is then read only once."""

    def cut(part: fx.Node) -> fx.Node:
        return emit(like.graph, like.target, part, *like.args[1:], name=like.name, like=like)

    operands = [n for n in node.args if isinstance(n, fx.Node) and _kind(n) == _kind(node)]
    if node.target is not aten.add.Tensor or len(operands) != 2 or node.kwargs:
        return cut(node)
    return emit(like.graph, node.target, *(cut(n) for n in operands), name=like.name, like=like)


def _kind(node: fx.Node) -> tuple[str, torch.dtype]:
    value = node.meta["val"]
    return str(tuple(value.shape)), value.dtype
