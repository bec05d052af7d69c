"""Find transformer blocks: around each attention core, the region that its residual connections close.

No class, module or attribute name is looked at: `trunks` finds where blocks begin and end, `propagation` follows the
tokens through them, `prefix_tokens` tells which tokens are not of the image.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core, find_cores
from idlefx.analysis.image_input import image_input
from idlefx.analysis.key_axis import key_axis
from idlefx.analysis.macs import count_macs
from idlefx.analysis.prefix_tokens import class_token, named_positions, prefix_positions, read_by_head
from idlefx.analysis.projections import projection
from idlefx.analysis.propagation import follow
from idlefx.analysis.refusal import RefusedOperation, refuse
from idlefx.analysis.subset import Subset
from idlefx.analysis.trunks import Trunk, find_trunks
from idlefx.analysis.walk import Walk
from idlefx.errors import BlockError
from idlefx.graph.queries import (
    by_name,
    common_path,
    data_flow,
    dominator_chain,
    leaks,
    region,
    source_line,
)
from idlefx.graph.sizes import follows_batch, shape_of
from idlefx.records import Block, BlockTable


def find_blocks(module: fx.GraphModule, prefix: int | Sequence[int] | None = None) -> BlockTable:
    """The table of all blocks, those that cannot idle with the reason why.

    Args:
        module: A captured model whose attention is normalised.
        prefix: How many leading tokens, or which positions, are prefix tokens; found if None.

    Raises:
        BlockError: There is no attention, or none that is added back to a residual stream.
    """
    graph = module.graph
    source = image_input(graph)
    flow = data_flow(graph, source)
    cores = [core for core in find_cores(graph) if core.out in flow]
    if not cores:
        raise BlockError(
            "blocks: the model has no attention that idlefx recognises; it converts Vision Transformers, "
            "whose attention is scaled_dot_product_attention or softmax(q @ k) @ v"
        )
    if all(_attends_over_batch(core) for core in cores):
        raise BlockError(
            "blocks: all attention of the model is over a sequence whose length follows dimension 0 of the input, so "
            "the tokens of all images are packed into one; idlefx takes dimension 0 for the batch, so give the model "
            f"one for images, as in (B, C, H, W) (at {source_line(cores[0].out)})"
        )
    trunks = find_trunks(flow, source, cores)
    if not trunks:
        raise BlockError("blocks: no attention of the model is added back to a residual stream, so nothing can idle")
    blocks: list[Block] = []
    known: dict[fx.Node, fx.Node] = {}
    for trunk in trunks:
        blocks.append(_block_of(flow, trunk, len(blocks), known, prefix))
        known[trunk.exit] = trunk.entry
    return BlockTable(tuple(_with_class_token(graph, blocks, prefix is not None)), count_macs(graph.nodes))


@dataclass(frozen=True)
class Opened:
    """A block as nodes of a graph, followed and ready to be rebuilt."""

    entry: fx.Node
    exit: fx.Node
    cores: tuple[Core, ...]
    nodes: list[fx.Node]
    walk: Walk
    flow: nx.DiGraph

    def dominators(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the block that everything reaching `node` passes, from the nearest."""
        return [n for n in dominator_chain(self.flow, image_input(node.graph), node) if n in self.walk]


def open_blocks(graph: fx.Graph, blocks: Iterable[Block]) -> list[Opened]:
    """Find the nodes of blocks of the table and follow the tokens through them.

    Raises:
        BlockError: The tokens cannot be followed, as a block is one that cannot idle.
    """
    names, cores, flow = by_name(graph), find_cores(graph), data_flow(graph, image_input(graph))
    opened: list[Opened] = []
    for block in blocks:
        entry, leave = names[block.entry], names[block.exit]
        nodes = region(flow, entry, leave)
        try:
            walk = follow(nodes, {entry: lay.stream(shape_of(entry), block.token_dim, block.batch_dim)})
        except RefusedOperation as refusal:
            raise BlockError(f"blocks: block {block.index} ({block.path}) cannot be opened: {refusal}") from refusal
        own = tuple(core for core in cores if core.out.name in block.cores)
        opened.append(Opened(entry, leave, own, nodes, walk, flow))
    return opened


def _block_of(flow: nx.DiGraph, trunk: Trunk, index: int, known: dict[fx.Node, fx.Node], prefix: Any) -> Block:
    nodes = region(flow, trunk.entry, trunk.exit)
    stream, query = (shape_of(node) for node in (trunk.entry, trunk.cores[0].query))
    spelled = sorted({core.name for core in trunk.cores})
    block = Block(
        index=index,
        path=common_path(nodes),
        entry=trunk.entry.name,
        exit=trunk.exit.name,
        cores=tuple(core.out.name for core in trunk.cores),
        width=stream[-1],
        heads=query[1] if len(query) == 4 else 1,
        head_width=query[-1],
        attention=(f"{len(trunk.cores)} x " if len(trunk.cores) > 1 else "") + "/".join(spelled),
        macs=count_macs(nodes),
        parameters=_parameters(flow, nodes),
    )
    try:
        token_dim, batch_dim, walk = _find_axes(trunk, nodes)
    except RefusedOperation as refusal:
        return replace(block, refusal=str(refusal))
    tokens = stream[token_dim]
    if prefix is not None:
        positions = named_positions(prefix, tokens)
    else:
        positions = prefix_positions(flow, trunk.entry, token_dim, known)
    layout = walk[trunk.cores[0].query]
    block = replace(
        block,
        tokens=tokens,
        token_dim=token_dim,
        batch_dim=batch_dim,
        prefix=positions,
        width=next(size for d, size in enumerate(stream) if d not in (token_dim, batch_dim)),
        heads=lay.heads(layout),
        affine=all(_is_affine(walk, core) for core in trunk.cores),
    )
    return replace(block, refusal=_cannot_be_cut(walk, block), rest_only=_cannot_follow(walk, trunk.cores))


def _cannot_follow(walk: Walk, cores: Iterable[Core]) -> str:
    """Why no key can stand for several tokens; empty if it can."""
    try:
        for core in cores:
            key_axis(walk, core)
    except RefusedOperation as refusal:
        return str(refusal)
    return ""


def _is_affine(walk: Walk, core: Core) -> bool:
    same = lay.heads(walk[core.query]) == lay.heads(core.key_layout(walk[core.key]))  # no keys shared among heads
    return same and all(projection(walk, node, up_to_scale=True) for node in (core.query, core.key))


def _parameters(flow: nx.DiGraph, nodes: list[fx.Node]) -> int:
    """Entries of all parameters that the nodes read, directly or through something computed from parameters."""
    seen, stack = set[fx.Node](), list(nodes)
    while stack:
        new = {i for i in stack.pop().all_input_nodes if i not in flow and i.op != "placeholder"} - seen
        seen |= new
        stack += new
    root = nodes[0].graph.owning_module
    read = {str(n.target) for n in seen if n.op == "get_attr"}
    return sum(p.numel() for name, p in root.named_parameters() if name in read) if root is not None else 0


def _attends_over_batch(core: Core) -> bool:
    return follows_batch(core.query.meta["val"].shape[-2])


def _find_axes(trunk: Trunk, nodes: list[fx.Node]) -> tuple[int, int, Walk]:
    """Which dimension holds the tokens: the one that every core attends over and that comes out where it went in."""
    shape = trunk.entry.meta["val"].shape
    if len(shape) != 3:
        raise RefusedOperation(
            f"the residual stream has {len(shape)} dimensions instead of batch, tokens and features "
            f"(at {source_line(trunk.entry)})"
        )
    if leaking := leaks(nodes, trunk.exit):
        returned = any(user.op == "output" for user in leaking[0].users)
        reader = "returned by the model, as an attention map may be" if returned else "read outside of it"
        raise RefusedOperation(f"`{leaking[0].name}` inside the block is {reader} (at {source_line(leaking[0])})")
    for core in trunk.cores:
        if _attends_over_batch(core):
            refuse(core.out, "attends over the batch")
    symbolic = [d for d, size in enumerate(shape) if follows_batch(size)]
    refusals: list[tuple[int, RefusedOperation]] = []
    for batch_dim in symbolic or [0, 1]:
        for token_dim in [d for d in range(2) if d != batch_dim] + [2]:
            layout = lay.stream(shape_of(trunk.entry), token_dim, batch_dim)
            try:
                walk = follow(nodes, {trunk.entry: layout})
            except RefusedOperation as refusal:
                refusals.append((token_dim, refusal))
                continue
            if walk[trunk.exit] == layout:
                return token_dim, batch_dim, walk
            refusals.append((token_dim, RefusedOperation("the tokens leave the block in another order", trunk.exit)))
    # A dimension that does not hold the tokens is refused early: of the one that went furthest is said what matters.
    # The last one is that of the features in most models, and may go far where a norm is spelled out.
    order = {node: place for place, node in enumerate(nodes)}
    _, furthest = max(refusals, key=lambda tried: (tried[0] < 2, order.get(tried[1].node, -1)))  # type: ignore[arg-type]
    raise furthest


def _cannot_be_cut(walk: Walk, block: Block) -> str:
    """Why the block cannot run on some of its tokens, found by trying every edit without making it."""
    if block.image_tokens < 2:
        return "it has no image tokens to choose from"
    subset = Subset(None, block.prefix, block.image_positions, 1)
    try:
        for node, edits in walk.edits.items():
            for edit in edits:
                subset.check(node, edit)
    except RefusedOperation as refusal:
        return str(refusal)
    return ""


def _with_class_token(graph: fx.Graph, blocks: list[Block], prefix_given: bool) -> Iterable[Block]:
    """Add which prefix token is the class token; of several in a block the one that the head reads."""
    last = next((b for b in reversed(blocks) if b.tokens), None)
    if last is None:
        return blocks
    leave = by_name(graph)[last.exit]
    nodes = list(graph.nodes)
    after = nodes[nodes.index(leave) + 1 :]
    reads = read_by_head(after, leave, lay.stream(shape_of(leave), last.token_dim, last.batch_dim))
    strange = [min(one) for one in reads if len(one) == 1 and not one <= set(last.prefix)]
    if strange and not prefix_given:
        reason = (
            f"the head reads token {strange[0]} alone, but images flow into it before the first block, so it may be "
            "no prefix token; say which tokens are, with prefix="
        )
        return [b if b.refusal or b.tokens != last.tokens else replace(b, refusal=reason) for b in blocks]
    token = class_token(last.prefix, reads)
    tokens = [class_token(b.prefix, []) if len(b.prefix) == 1 else token for b in blocks]
    return [replace(b, class_token=t if t in b.prefix else None) for b, t in zip(blocks, tokens, strict=True)]
