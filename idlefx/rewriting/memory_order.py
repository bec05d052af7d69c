"""Outputs in the order in memory that they had: who reads what was contiguous may take a view of it.

Tokens that are taken out and put back leave a block in an order of their own, where the stream has channels first.
"""

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from idlefx.graph.build import add_call
from idlefx.graph.queries import output_of, value

aten = torch.ops.aten


def contiguous_outputs(graph: fx.Graph) -> tuple[bool, ...]:
    """Of each output whether it is a tensor that is contiguous."""
    return tuple(isinstance(leaf, fx.Node) and _is_contiguous(leaf) for leaf in _outputs(graph))


def keep_contiguous(graph: fx.Graph, before: tuple[bool, ...]) -> None:
    """Make those outputs contiguous again that were so before; the graph may have got more at the end."""
    output = output_of(graph)
    for leaf, was in zip(_outputs(graph), before, strict=False):
        if was and not (_is_contiguous(leaf) and _is_sure(leaf)):
            with graph.inserting_before(output):
                result = add_call(graph, aten.contiguous.default, leaf, name="contiguous", like=leaf)
            output.replace_input_with(leaf, result)


def _outputs(graph: fx.Graph) -> list[Any]:
    return tree_leaves(output_of(graph).args)


def _is_sure(node: fx.Node) -> bool:
    """Whether memory is laid out as the trace says: of maps (B, C, H, W), convolutions decide it when they run."""
    tensor = value(node)
    return tensor is None or tensor.ndim != 4


def _is_contiguous(node: fx.Node) -> bool:
    tensor = value(node)
    return tensor is not None and tensor.is_contiguous()
