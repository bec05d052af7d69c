"""Follow the token axis through a region of a graph, operation by operation, by the rules for each."""

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.layouts import Layout
from idlefx.analysis.movement import layout_of
from idlefx.analysis.partition import NOBODY, Windows
from idlefx.analysis.refusal import refuse, refuse_movement
from idlefx.analysis.rules import (
    compute,  # noqa: F401  so that their rules are known
    neighbours,  # noqa: F401  so that their rules are known
    reshape,  # noqa: F401  so that their rules are known
    split_join,  # noqa: F401  so that their rules are known
)
from idlefx.analysis.rules.registry import rule_of
from idlefx.analysis.walk import Walk
from idlefx.graph.memory import Memory, has_effect, written


def follow(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Layout], *, moves: bool = False) -> Walk:
    """Follow the tokens through `nodes`, which are in graph order.

    Args:
        nodes: The region.
        known: Layouts of the nodes that the region starts from.
        moves: Also through what moves them, such as a partition into windows.

    Raises:
        RefusedOperation: An operation has no rule, or mixes tokens.
    """
    partition = next((f.partition for layout in known.values() for dim in layout for f in dim if f.partition), None)
    grid = next(map(lay.grid_of, known.values()), ()) if partition is None else partition.sides
    has_batch = any(lay.has(dim, "batch") for layout in known.values() for dim in layout)
    shares_batch = any(map(lay.shares_batch, known.values()))
    walk = Walk(dict(known), grid=grid, apart=partition is not None, shares_batch=shares_batch, has_batch=has_batch)
    region = list(nodes)
    for node in region:
        walk.layouts[node] = layout_of(walk, node) if moves else rule_of(node)(walk, node)
    _check_writes(region, known)
    return walk


def follow_windows(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Layout], cores: Sequence[Core]) -> Walk:
    """Follow the tokens through a region that moves them, and find the windows that its attention is over.

    Args:
        nodes: The region.
        known: Layouts of the nodes that the region starts from.
        cores: Its attention.

    Raises:
        RefusedOperation: As `follow`; or the attention is over several kinds of windows, or windows without a token.
    """
    walk = follow(nodes, known, moves=True)
    for core in cores:
        keys = core.key_layout(walk[core.key])[-2]
        partition = lay.partition_of(keys)
        windows = None if partition is None else Windows(partition, lay.sides_of(keys))
        if core is not cores[0] and windows != walk.windows:
            refuse_movement(core.out, "attends over other windows than another attention of the block")
        if windows is not None and not (windows.tokens != NOBODY).any(1).all():
            refuse_movement(core.out, "attends over a window that holds padding alone")
        walk.windows = windows
    return walk


def _check_writes(region: list[fx.Node], known: Iterable[fx.Node]) -> None:
    """Refuse what writes into memory that the region reads: its copy reads all of it later, at the region's end."""
    if not region or not any(has_effect(node) for node in region[0].graph.nodes):
        return
    memory, inside = Memory(region[0].graph), set(region)
    first, last = min(memory.order[node] for node in (*known, *region)), memory.order[region[-1]]
    of_region = set(memory.writes_into(region))
    for write in (w for w in memory.writes if first < memory.order[w] <= last):
        before = {i for node in region if memory.order[node] < memory.order[write] for i in node.all_input_nodes}
        harmless = write not in of_region and write not in memory.writes_into(before)
        if not harmless and not _writes_its_own(memory, write, inside):
            refuse(write, "writes into a tensor that is read elsewhere; use the form without the underscore")


def _writes_its_own(memory: Memory, write: fx.Node, region: set[fx.Node]) -> bool:
    """Whether what is written was made in the region for this, and is read through the result alone."""
    for target in written(write):
        others = [node for node in memory.sharing(target) if node not in (target, write)]
        before = [node for node in others if memory.order[node] < memory.order[write]]
        if write not in region or target not in region or before or len(target.users) > 1:
            return False
    return True
