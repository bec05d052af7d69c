"""Which of a block's prefix tokens is the class token."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import RefusedOperation
from idlefx.analysis.rules.registry import rule_of
from idlefx.analysis.walk import Walk
from idlefx.graph.queries import argument, by_name
from idlefx.graph.sizes import shape_of
from idlefx.records import Block

aten = torch.ops.aten


def with_class_token(graph: fx.Graph, blocks: list[Block], prefix_given: bool) -> Iterable[Block]:
    """Add which prefix token is the class token; of several in a block the one that the head reads.

    Of blocks with as many tokens, such as those of a stage or of one of two branches, the last is followed.
    """
    alone = [_of_one_window(block) for block in blocks]
    last = {block.tokens: block for block in alone if block.tokens}
    reads = {tokens: _read_behind(graph, block) for tokens, block in last.items()}
    final = next((block for block in reversed(alone) if block.tokens), None)
    if final is None:
        return blocks
    for tokens, block in last.items():
        strange = [min(one) for one in reads[tokens] if len(one) == 1 and not one <= set(block.prefix)]
        if strange and not prefix_given:
            reason = (
                f"the head reads token {strange[0]} alone, but images flow into it before the first block, so it may "
                "be no prefix token; say which tokens are, with prefix="
            )
            blocks = [
                replace(block, refusal=reason)
                if one.tokens == tokens and not one.refusal and strange[0] not in one.prefix
                else block
                for block, one in zip(blocks, alone, strict=True)
            ]
    of_head = class_token(final.prefix, reads[final.tokens])
    return [replace(b, class_token=_class_token_of(b, of_head)) for b in blocks]


def _read_behind(graph: fx.Graph, block: Block) -> list[set[int]]:
    """Sets of positions that what follows a block reads together."""
    leave, nodes = by_name(graph)[block.exit], list(graph.nodes)
    after = nodes[nodes.index(leave) + 1 :]
    return read_by_head(after, leave, lay.stream(shape_of(leave), block.token_dims, block.batch_dim, block.grid))


def _class_token_of(block: Block, of_head: int | None) -> int | None:
    """That of one block; windows that are joined have brought one each, of which none is the image's."""
    if block.shares_batch:
        return None
    token = class_token(block.prefix, []) if len(block.prefix) == 1 else of_head
    return token if token in block.prefix else None


def _of_one_window(block: Block) -> Block:
    """A block over windows that are stacked in the batch, as if each were an image: so the head may read them."""
    if not block.shares_batch:
        return block
    size = block.grid[-1]
    inside = tuple(position for position in block.prefix if position < size)
    return replace(block, tokens=size, token_dim=block.token_dims[-1], grid=(), prefix=inside)


def read_by_head(after: Iterable[fx.Node], stream: fx.Node, layout: Layout) -> list[set[int]]:
    """Sets of token positions that what follows the last block reads together.

    Args:
        after: The nodes after the last block, in graph order.
        stream: The exit of the last block.
        layout: Its layout.
    """
    walk = Walk({stream: layout}, has_batch=any(lay.has(dim, "batch") for dim in layout))
    reads: list[set[int]] = []
    for node in after:
        own = [i for i in node.all_input_nodes if i in walk]
        if not own:
            continue
        try:
            walk.layouts[node] = rule_of(node)(walk, node)
            if node.target is aten.select.int and node in walk.edits:
                axis = walk[own[0]][argument(node, 1)][0]
                place = argument(node, 2) % axis.size
                reads.append(_positions(lay.cut(axis.runs, place, place + 1)))
        except RefusedOperation:
            layouts = [walk[i] for i in own if not isinstance(i.meta["val"], (list, tuple))]
            reads += [_positions(f.runs) for one in layouts for dim in one for f in dim if f.role == "tokens"]
    return reads


def _positions(runs: lay.Runs) -> set[int]:
    return {p for start, stop in runs for p in range(start, stop)}


def class_token(prefix: tuple[int, ...], reads: list[set[int]]) -> int | None:
    """The first prefix token that the head reads on its own; none of several where it reads image tokens only.

    Where the head reads the whole sequence, nothing tells the prefix tokens apart: the first one it is. A single prefix
    token it is even unread: models for dense tasks keep the class token that they were trained with.
    """
    if len(prefix) == 1:
        return prefix[0]
    alone = [positions for positions in reads if positions and positions <= set(prefix)]
    if alone:
        return min(min(positions) for positions in alone)
    whole = any(set(prefix) & positions for positions in reads)
    return prefix[0] if prefix and (whole or not reads) else None
