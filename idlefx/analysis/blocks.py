"""Find transformer blocks: around each attention core, the region that its residual connections close.

No class, module or attribute name is looked at: `trunks` finds where blocks begin and end, `token_axis` where their
tokens stand, `propagation` follows them through the block, `prefix_tokens` tells which tokens are not of the image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core, find_cores
from idlefx.analysis.class_token import with_class_token
from idlefx.analysis.image_input import image_input
from idlefx.analysis.key_axis import key_axis
from idlefx.analysis.macs import count_macs
from idlefx.analysis.prefix_tokens import named_positions, prefix_positions
from idlefx.analysis.projections import projection
from idlefx.analysis.refusal import RefusedOperation
from idlefx.analysis.subset import Subset, segments_of
from idlefx.analysis.token_axis import Axes, attends_over_batch, find_axes, follow_block
from idlefx.analysis.trunks import Trunk, find_trunks
from idlefx.analysis.walk import Walk
from idlefx.errors import BlockError
from idlefx.graph.queries import (
    by_name,
    common_path,
    data_flow,
    dominator_chain,
    region,
    source_line,
)
from idlefx.graph.sizes import shape_of
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
    if all(attends_over_batch(core) for core in cores):
        raise BlockError(
            "blocks: all attention of the model is over a sequence whose length follows dimension 0 of the input, so "
            "the tokens of all images are packed into one; idlefx takes dimension 0 for the batch, so give the model "
            "one for images, as in (B, C, H, W), or fix their sizes by giving their lengths as numpy arrays "
            f"(at {source_line(cores[0].out)})"
        )
    trunks = find_trunks(flow, source, cores)
    if not trunks:
        raise BlockError("blocks: no attention of the model is added back to a residual stream, so nothing can idle")
    blocks: list[Block] = []
    known: dict[fx.Node, fx.Node] = {}
    for trunk in trunks:
        blocks.append(_block_of(flow, trunk, len(blocks), known, prefix))
        known[trunk.exit] = trunk.entry
    return BlockTable(tuple(with_class_token(graph, blocks, prefix is not None)), count_macs(graph.nodes))


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
        own = tuple(core for core in cores if core.out.name in block.cores)
        try:
            layout = lay.stream(shape_of(entry), block.token_dims, block.batch_dim, block.grid)
            walk = follow_block(nodes, entry, layout, own)
        except RefusedOperation as refusal:
            raise BlockError(f"blocks: block {block.index} ({block.path}) cannot be opened: {refusal}") from refusal
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
        axes, walk = find_axes(trunk, nodes)
    except RefusedOperation as refusal:
        return replace(block, refusal=str(refusal))
    tokens = math.prod(axes.grid or (stream[axes.tokens[0]],))
    windows = walk.windows
    sequences = 1
    if axes.batch is not None and not walk.shares_batch:
        sequences = _sequences(stream[axes.batch], image_input(trunk.entry.graph))
    layout = walk[trunk.cores[0].query]
    block = replace(
        block,
        tokens=tokens,
        token_dim=axes.tokens[0],
        batch_dim=axes.batch,
        grid=axes.grid,
        over_image=not (walk.apart or walk.shares_batch) and sequences == 1,
        sequences=sequences,
        windows=(windows.count, windows.size) if windows else (),
        segments=walk.segments,
        partition=windows.digest if windows else "",
        prefix=_prefix(flow, trunk, axes, walk, known, prefix),
        width=next(size for d, size in enumerate(stream) if d not in (*axes.tokens, axes.batch)),
        heads=lay.heads(layout),
        affine=all(_is_affine(walk, core) for core in trunk.cores),
    )
    whole_only = _cannot_be_cut(walk, block, "tokens") if windows else ""
    return replace(
        block,
        refusal=_cannot_be_cut(walk, block),
        rest_only=_cannot_follow(walk, trunk.cores, whole_only),
        whole_only=whole_only,
    )


def _sequences(entries: int, images: fx.Node) -> int:
    """How many of so many entries of the batch belong to one image."""
    each, rest = divmod(entries, shape_of(images)[0])
    return each if each and not rest else 1


def _prefix(
    flow: nx.DiGraph, trunk: Trunk, axes: Axes, walk: Walk, known: dict[fx.Node, fx.Node], prefix: Any
) -> tuple[int, ...]:
    """The positions of the prefix tokens, found or named; of windows that are stacked in the batch, those of each."""
    innermost = axes.tokens[-1]
    windows, size = axes.grid if walk.shares_batch else (1, shape_of(trunk.entry)[innermost])
    grid = () if walk.shares_batch else axes.grid
    if prefix is not None:
        positions = named_positions(prefix, math.prod(grid or (size,)), grid)
    else:
        positions = () if grid or walk.windows else prefix_positions(flow, trunk.entry, innermost, known)
    return tuple(window * size + position for window in range(windows) for position in positions)


def _cannot_follow(walk: Walk, cores: Iterable[Core], whole_only: str) -> str:
    """Why no key can stand for several tokens; empty if it can."""
    if whole_only:
        return f"only whole windows can idle there, which rest: {whole_only}"
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


def _cannot_be_cut(walk: Walk, block: Block, unit: str = "windows") -> str:
    """Why the block cannot run on some of its tokens, found by trying every edit without making it."""
    if block.image_tokens < 2:
        return "it has no image tokens to choose from"
    if walk.windows and block.prefix:
        return "its attention is over windows, of which none holds prefix tokens; leave prefix= away"
    if block.segments and block.prefix:
        return "its attention is over segments of the sequence, which keep no prefix tokens; prefix=0 lets all idle"
    if unit == "tokens" and walk.windows and walk.windows.partition.is_padded:
        return "its windows are padded, and hold different numbers of tokens"
    segments = segments_of(block.segments, [1] * len(block.segments))
    kept = len(segments) or 1
    subset = Subset(None, block.prefix, block.image_positions, kept, walk.windows, unit, segments=segments)
    try:
        for node, edits in walk.edits.items():
            for edit in edits:
                subset.check(node, edit)
    except RefusedOperation as refusal:
        return str(refusal)
    return ""
