"""Build nodes: each new call gets its value inferred, as the analysis relies on it."""

from collections.abc import Callable
from typing import Any

from torch import fx

from idlefx.graph.queries import example_value


def add_call(
    graph: fx.Graph, target: Callable[..., Any], *args: Any, name: str, like: fx.Node, **kwargs: Any
) -> fx.Node:
    """Insert a call at the graph's insertion point, its value inferred and its origin taken from `like`."""
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "idlefx")}
    node.meta["val"] = example_value(node)
    return node
