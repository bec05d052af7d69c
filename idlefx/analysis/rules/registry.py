"""The rules by which the token axis is followed, by operation.

A rule takes a node whose inputs are understood and says how its output is laid out, and what must change when only
some of the tokens are there: operands read by position, sizes, slice bounds. What has no rule is refused, and so is
everything that would mix tokens outside attention.

To support another operation, add it to a rule or write one: `@rule(aten.my_op.default)` over a function from
`(walk, node)` to a layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from idlefx.analysis.refusal import refuse
from idlefx.analysis.walk import Walk

Rule = Callable[[Walk, fx.Node], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations, or for all that torch gives a tag."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def rule_of(node: fx.Node) -> Rule:
    """The rule for a node's operation.

    Raises:
        RefusedOperation: There is none.
    """
    if node.target not in RULES and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return RULES[torch.Tag.pointwise]
    if node.target not in RULES:
        refuse(node, "has no rule: it is not known whether it mixes tokens")
    return RULES[node.target]
