"""Build nodes: each new call gets its value inferred, as the analysis relies on it."""

from typing import Any

from torch import fx
from torch.fx.node import Target

from idlefx.graph import inference
from idlefx.graph.notes import KEY, Note

_OWN = ("val", "tensor_meta", inference.KEY, KEY)  # what the origin of a node does not tell of it


def add_call(
    graph: fx.Graph,
    target: Target,
    *args: Any,
    name: str,
    like: fx.Node,
    note: Note | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Insert a call at the graph's insertion point.

    Args:
        graph: The graph.
        target: What is called.
        *args: Its arguments.
        name: What the node is called, for people; a number is added where the name is taken.
        like: The node whose line and module the new one is said to come from.
        note: What later passes are to know of it.
        **kwargs: Keyword arguments of the call.

    Returns:
        The node, its value inferred.
    """
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta = {key: fact for key, fact in like.meta.items() if key not in _OWN}
    if note is not None:
        node.meta[KEY] = note
    inference.record(node)
    return node
