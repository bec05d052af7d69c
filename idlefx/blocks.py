"""Find transformer blocks: around each attention core, the region that its residual connection closes.

No class, module or attribute name is looked at. A core's block begins at the nearest of its dominators that is
also added back behind it; further residual branches up to the next core, such as the MLP, belong to it too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from idlefx import layouts as lay
from idlefx.affine import projection
from idlefx.axes import Walk, follow
from idlefx.errors import BlockError, InputError, UnknownOperation
from idlefx.graph import (
    by_name,
    common_path,
    data_flow,
    dominator_chain,
    leaks,
    placeholders,
    post_dominator_chain,
    region,
    source_line,
    value,
)
from idlefx.layouts import Layout
from idlefx.macs import count_macs
from idlefx.prefix import class_token, prefix_positions, read_by_head
from idlefx.rebuild import Subset
from idlefx.records import Block, BlockTable

aten = torch.ops.aten

_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_PASSING = (
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar,
)  # fmt: skip


@dataclass
class _Trunk:
    """A block in the making: where it begins, its attention cores, and what follows on the residual stream."""

    entry: fx.Node
    cores: list[fx.Node]
    stream: list[fx.Node]
    merges: list[int]
    tails: list[list[Any]]


def image_input(graph: fx.Graph) -> fx.Node:
    """The input that the tokens are made of: the largest one of floating point."""
    inputs = [p for p in placeholders(graph) if (v := value(p)) is not None and v.is_floating_point()]
    if not inputs:
        raise BlockError("blocks: the model has no input of floating point, so no image to take tokens from")
    return max(inputs, key=lambda p: value(p).numel())  # type: ignore[union-attr]


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
    cores = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default and n in flow]
    if not cores:
        raise BlockError(
            "blocks: the model has no attention that idlefx recognises; it converts Vision Transformers, "
            "whose attention is scaled_dot_product_attention or softmax(q @ k) @ v"
        )
    trunks = _trunks(flow, source, cores)
    if not trunks:
        raise BlockError("blocks: no attention of the model is added back to a residual stream, so nothing can idle")
    exits = _exits(trunks)
    blocks: list[Block] = []
    known: dict[fx.Node, fx.Node] = {}
    for trunk, leave in zip(trunks, exits, strict=True):
        block = _describe(flow, trunk, leave, len(blocks), known, prefix)
        blocks.append(block)
        known[leave] = trunk.entry
    return BlockTable(tuple(_with_class_token(graph, blocks)), count_macs(graph.nodes))


def _trunks(flow: nx.DiGraph, source: fx.Node, cores: list[fx.Node]) -> list[_Trunk]:
    found: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}
    for core in cores:
        merge = _residual(flow, source, core)
        if merge is not None:
            entry, end = merge
            found.setdefault(entry, (end, []))[1].append(core)
    entries = sorted(found, key=list(flow).index)
    return [_trunk(flow, entry, *found[entry], set(entries), set(cores)) for entry in entries]


def _residual(flow: nx.DiGraph, source: fx.Node, core: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Where a core's residual connection begins and where it is added back."""
    dominators = set(dominator_chain(flow, source, core))
    for merge in post_dominator_chain(flow, core):
        if merge.target in _ADDITIONS:
            for operand in merge.all_input_nodes:
                origin = _origin(operand, dominators)
                if origin is not None and value(origin).shape == value(merge).shape:  # type: ignore[union-attr]
                    return origin, merge
    return None


def _origin(node: fx.Node, wanted: set[fx.Node]) -> fx.Node | None:
    """The first of `wanted` on the way back through operations that leave the residual stream what it is."""
    while node not in wanted:
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target not in _PASSING or len(inputs) != 1:
            return None
        node = inputs[0]
    return node


def _trunk(
    flow: nx.DiGraph, entry: fx.Node, merge: fx.Node, cores: list[fx.Node], entries: set[fx.Node], all_cores: set[fx.Node]
) -> _Trunk:
    stream = [merge]
    for node in post_dominator_chain(flow, merge):
        if stream[-1] in entries or node in all_cores:
            break
        stream.append(node)
    while len(stream) > 1 and leaks(region(flow, entry, stream[0]), stream[0]):
        stream.pop(0)  # x + attention + MLP, both of one norm: the first sum is not the whole block
    shape = value(entry).shape  # type: ignore[union-attr]
    merges, tails, begins = [0], [], dict.fromkeys(stream[:1], 0)
    for at, node in enumerate(stream):
        begins.setdefault(node, at)
        if at and node.target in _ADDITIONS and value(node).shape == shape:  # type: ignore[union-attr]
            starts = [_origin(o, set(stream[:at])) for o in node.all_input_nodes]
            start = next((s for s in starts if s is not None and stream.index(s) >= merges[-1]), None)
            if start is not None and len([i for i in node.all_input_nodes if i in flow]) > 1:
                tails.append([n.target for n in stream[merges[-1] + 1 : stream.index(start) + 1]])
                merges.append(at)
    last = next((at for at, node in enumerate(stream) if node in entries), None)
    if last is not None:
        tails.append([n.target for n in stream[merges[-1] + 1 : last + 1]])
    return _Trunk(entry, cores, stream, merges, tails)


def _exits(trunks: list[_Trunk]) -> list[fx.Node]:
    """Where each block ends: behind its last sum, and behind the norm that follows every sum in post-norm models.

    What stands between a sum and the next branch all through the model belongs to the block; what stands there
    only once, such as the final norm, does not.
    """
    tails = [tail for trunk in trunks for tail in trunk.tails]
    common = tails[0] if tails else []
    for tail in tails[1:]:
        same = [a == b for a, b in zip(common, tail, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    exits = []
    for trunk in trunks:
        last = trunk.merges[-1]
        following = [n.target for n in trunk.stream[last + 1 : last + 1 + len(common)]]
        exits.append(trunk.stream[last + len(common)] if following == common else trunk.stream[last])
    return exits


def entry_layout(stream: fx.Node, token_dim: int, batch_dim: int) -> Layout:
    """The layout of the residual stream (tokens, batch and features, in any order)."""
    sizes = lay.sizes(value(stream))  # type: ignore[arg-type]
    return tuple(
        lay.tokens(size) if d == token_dim else (lay.Factor(size, "batch"),) if d == batch_dim else lay.features(size)
        for d, size in enumerate(sizes)
    )


@dataclass(frozen=True)
class Opened:
    """A block as nodes of a graph, followed and ready to be rebuilt."""

    entry: fx.Node
    exit: fx.Node
    cores: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    walk: Walk
    flow: nx.DiGraph

    def dominators(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the block that everything reaching `node` passes, from the nearest."""
        return [n for n in dominator_chain(self.flow, image_input(node.graph), node) if n in self.walk]


def open_block(graph: fx.Graph, block: Block) -> Opened:
    """Find the nodes of a block of the table and follow the tokens through them."""
    names = by_name(graph)
    entry, leave = names[block.entry], names[block.exit]
    flow = data_flow(graph, image_input(graph))
    nodes = region(flow, entry, leave)
    walk = follow(nodes, {entry: entry_layout(entry, block.token_dim, block.batch_dim)})
    return Opened(entry, leave, tuple(names[c] for c in block.cores), nodes, walk, flow)


def _describe(
    flow: nx.DiGraph, trunk: _Trunk, leave: fx.Node, index: int, known: dict[fx.Node, fx.Node], prefix: Any
) -> Block:
    nodes = region(flow, trunk.entry, leave)
    query = value(trunk.cores[0].args[0])  # type: ignore[arg-type]
    assert query is not None
    cores = tuple(core.name for core in trunk.cores)
    spelled = {core.meta.get("idlefx", {}).get("attention", "sdpa") for core in trunk.cores}
    block = Block(
        index=index, path=common_path(nodes), entry=trunk.entry.name, exit=leave.name, cores=cores, tokens=0,
        token_dim=1, batch_dim=0, prefix=(), class_token=None, width=lay.sizes(value(trunk.entry))[-1],  # type: ignore[arg-type]
        heads=lay.sizes(query)[1] if query.ndim == 4 else 1, head_width=lay.sizes(query)[-1],
        attention=(f"{len(cores)} x " if len(cores) > 1 else "") + "/".join(sorted(spelled)), macs=count_macs(nodes),
        parameters=_parameters(flow, nodes),
    )  # fmt: skip
    try:
        token_dim, batch_dim, walk = _find_axes(trunk, leave, nodes)
    except UnknownOperation as refusal:
        return replace(block, refusal=str(refusal))
    tokens = lay.sizes(value(trunk.entry))[token_dim]  # type: ignore[arg-type]
    positions = _given(prefix, tokens) if prefix is not None else prefix_positions(flow, trunk.entry, token_dim, known)
    width = next(s for d, s in enumerate(lay.sizes(value(trunk.entry))) if d not in (token_dim, batch_dim))  # type: ignore
    affine = all(projection(walk, operand) for core in trunk.cores for operand in core.args[:2])  # type: ignore
    layout = walk[trunk.cores[0].args[0]]
    heads = lay.size(tuple(f for dim in layout[:-1] for f in dim if not f.role))
    block = replace(
        block, tokens=tokens, token_dim=token_dim, batch_dim=batch_dim, prefix=positions, width=width, heads=heads,
        affine=affine,
    )  # fmt: skip
    return replace(block, refusal=_cannot_be_cut(walk, block))


def _parameters(flow: nx.DiGraph, nodes: list[fx.Node]) -> int:
    """Entries of all parameters that the nodes read, directly or through something computed from parameters."""
    seen, stack = set[fx.Node](), list(nodes)
    while stack:
        new = {i for i in stack.pop().all_input_nodes if i not in flow and i.op != "placeholder"} - seen
        seen |= new
        stack += new
    root = nodes[0].graph.owning_module
    found = {str(n.target) for n in seen if n.op == "get_attr"}
    return sum(p.numel() for name, p in root.named_parameters() if name in found) if root is not None else 0


def _given(prefix: int | Sequence[int], tokens: int) -> tuple[int, ...]:
    positions = tuple(range(prefix)) if isinstance(prefix, int) else tuple(sorted(set(prefix)))
    if not all(0 <= p < tokens for p in positions) or len(positions) >= tokens:
        raise InputError(f"blocks: prefix={prefix} does not fit {tokens} tokens; give their number or their positions")
    return positions


def _find_axes(trunk: _Trunk, leave: fx.Node, nodes: list[fx.Node]) -> tuple[int, int, Walk]:
    """Which dimension holds the tokens: the one that every core attends over and that comes out where it went in."""
    shape = value(trunk.entry).shape  # type: ignore[union-attr]
    if len(shape) != 3:
        raise UnknownOperation(
            f"the residual stream has {len(shape)} dimensions instead of batch, tokens and features "
            f"(at {source_line(trunk.entry)})"
        )
    if leaking := leaks(nodes, leave):
        raise UnknownOperation(
            f"`{leaking[0].name}` inside the block is read outside of it (at {source_line(leaking[0])})"
        )
    symbolic = [d for d, s in enumerate(shape) if isinstance(s, torch.SymInt)]
    refusals = []
    for batch_dim in symbolic or [0, 1]:
        for token_dim in [d for d in range(2) if d != batch_dim] + [2]:
            layout = entry_layout(trunk.entry, token_dim, batch_dim)
            try:
                walk = follow(nodes, {trunk.entry: layout})
            except UnknownOperation as refusal:
                refusals.append(refusal)
                continue
            if walk[leave] == layout:
                return token_dim, batch_dim, walk
    raise refusals[0] if refusals else UnknownOperation("the tokens leave the block in another order")


def _cannot_be_cut(walk: Walk, block: Block) -> str:
    """Why the block cannot run on some of its tokens, found by trying every edit without making it."""
    if block.image_tokens < 2:
        return "it has no image tokens to choose from"
    subset = Subset(None, block.prefix, block.image_positions, 1)  # type: ignore[arg-type]
    try:
        for node, edits in walk.edits.items():
            for edit in edits:
                subset.check(node, edit)
    except UnknownOperation as refusal:
        return str(refusal)
    return ""


def _with_class_token(graph: fx.Graph, blocks: list[Block]) -> Iterable[Block]:
    """Add which prefix token the head reads, as far as the token sequence stays the same up to the head."""
    last = next((b for b in reversed(blocks) if b.tokens), None)
    if last is None:
        return blocks
    leave = by_name(graph)[last.exit]
    nodes = list(graph.nodes)
    after = nodes[nodes.index(leave) + 1 :]
    reads = read_by_head(after, leave, entry_layout(leave, last.token_dim, last.batch_dim))
    token = class_token(last.prefix, reads)
    return [replace(b, class_token=token if token in b.prefix else None) for b in blocks]
