"""Build nodes: each new call gets its value inferred, as the analysis relies on it."""

from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import Target
from torch.utils._pytree import treespec_leaf, treespec_tuple

from idlefx.graph import inference
from idlefx.graph.notes import KEY, Note
from idlefx.graph.queries import output_of

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


def return_too(graph: fx.Graph, node: fx.Node) -> None:
    """Let a graph return `(what it returned, node)`."""
    output, codegen = output_of(graph), graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        assert info.out_spec is not None
        codegen.pytree_info = info._replace(out_spec=treespec_tuple([info.out_spec, treespec_leaf()]))
        output.args = ((*output.args[0], node),)  # type: ignore[misc]
    else:
        output.args = ((output.args[0], node),)
