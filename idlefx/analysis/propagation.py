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


def follow(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Layout]) -> Walk:
    """Follow the tokens through `nodes`, which are in graph order.

    Args:
        nodes: The region.
        known: Layouts of the nodes that the region starts from.

    Raises:
        RefusedOperation: An operation has no rule, or mixes tokens.
    """
    walk = Walk(dict(known))
    for node in nodes:
        _check_mutation(node)
        walk.layouts[node] = rule_of(node)(walk, node)
    return walk


def _check_mutation(node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or len(changed.users) > 1:
            refuse(node, "writes into a tensor that is read elsewhere; use the form without the underscore")
