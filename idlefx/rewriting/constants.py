"""Tensors of zeros or ones that a model makes `like` one of its image's: they hold nothing of the image."""

from typing import Any

import torch
from torch import fx

from idlefx.graph.queries import image_data, tensor_argument, value

aten = torch.ops.aten

_CONSTANTS = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)


def free_constants(graph: fx.Graph) -> None:
    """Let constants take type and device from a parameter, with which they move on as they would with the image.

    One stays as it is where the image is written into it later, or where no parameter is of its type and device.

    Args:
        graph: An ATen graph with recorded values.
    """
    models: dict[fx.Node, fx.Node] = {}
    data = image_data(graph)
    for node in graph.nodes:
        if node.target in _CONSTANTS:
            model = tensor_argument(node, 0)
            state = _state_like(model, node)
            if model in data and state is not None:
                models[node] = model
                node.args = (state, *node.args[1:])
    while True:
        data = image_data(graph)
        written = [node for node in models if _is_written_from(node, data)]
        if not written:
            return
        for node in written:  # which makes it the image's again, so what it is written into is too
            node.args = (models.pop(node), *node.args[1:])


def _state_like(model: fx.Node, before: fx.Node) -> fx.Node | None:
    like = model.meta["val"]
    for state in before.graph.find_nodes(op="get_attr"):
        held = value(state)
        if held is not None and (held.dtype, held.device) == (like.dtype, like.device) and state < before:
            return state
    return None


def _is_written_from(node: fx.Node, data: set[fx.Node]) -> bool:
    """Whether something of the image is written into a new tensor, by itself or through a view of it."""
    names, stack = {node}, [node]
    while stack:
        for user in set(stack.pop().users) - names:
            schema: Any = getattr(user.target, "_schema", None)
            shares = schema is None or any(argument.alias_info for argument in schema.arguments)
            writes = schema is None or schema.is_mutable
            if shares and writes and any(i in data for i in user.all_input_nodes):
                return True
            if shares:
                names.add(user)
                stack.append(user)
    return False
