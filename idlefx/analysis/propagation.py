"""Follow the token axis through a region of a graph, operation by operation, by the rules for each."""

from collections.abc import Iterable, Mapping

from torch import fx

from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import refuse
from idlefx.analysis.rules import (
    compute,  # noqa: F401  so that their rules are known
    reshape,  # noqa: F401  so that their rules are known
    split_join,  # noqa: F401  so that their rules are known
)
from idlefx.analysis.rules.registry import rule_of
from idlefx.analysis.walk import Walk
from idlefx.graph.memory import Memory, has_effect, written


def follow(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Layout]) -> Walk:
    """Follow the tokens through `nodes`, which are in graph order.

    Args:
        nodes: The region.
        known: Layouts of the nodes that the region starts from.

    Raises:
        RefusedOperation: An operation has no rule, or mixes tokens.
    """
    walk = Walk(dict(known))
    region = list(nodes)
    for node in region:
        walk.layouts[node] = rule_of(node)(walk, node)
    _check_writes(region, known)
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
