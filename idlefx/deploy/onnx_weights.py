"""Products of weights with each other, made when a file is written: not every runtime does so when it loads one."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

Argument = fx.Node | None


def multiplied(user: fx.Node, keys: Argument, weight: Argument, bias: Argument) -> tuple[Argument, Argument, Argument]:
    """A linear layer that holds a product with the weight of keys behind it.

    Args:
        user: The node that needs them; what is made is put in front of it, and into its module.
        keys: (D, C), the weight of the keys.
        weight: (D, C), of queries.
        bias: (D), or None.

    Returns:
        `keysᵀ · weight` (C, C), `bias · keys` (C) and None; or weight, bias and keys as they were given, where it is
        not weights alone that decide them.
    """
    graph = user.graph
    module: Any = graph.owning_module
    try:
        with torch.no_grad():
            w, b, k = (_plain(part) for part in (weight, bias, keys))
            products = {"weight": k.t() @ w, "bias": None if b is None else b @ k}
    except LookupError:
        return weight, bias, keys
    made: dict[str, Argument] = dict.fromkeys(products)
    for name, product in products.items():
        if product is not None:
            stored = f"{user.name}_{name}"
            module.register_buffer(stored, product)
            with graph.inserting_before(user):
                made[name] = graph.get_attr(stored)
    return made["weight"], made["bias"], None


def _plain(part: Argument) -> Any:
    """What a node holds, if weights alone decide it.

    Raises:
        LookupError: An input decides it, or it is no plain tensor.
    """
    value = _made_of_weights(part)
    if part is not None and type(value) not in (Tensor, nn.Parameter):
        raise LookupError(part)
    return value


def _made_of_weights(node: Any) -> Any:
    """What an argument is; see `_plain`."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    if node.op != "call_function":
        raise LookupError(node.name)
    args, kwargs = map_arg((node.args, node.kwargs), _made_of_weights)
    assert callable(node.target)
    return node.target(*args, **kwargs)
