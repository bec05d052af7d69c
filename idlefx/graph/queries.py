"""Questions to an ATen graph, answered on a networkx view of its data flow.

The view holds the nodes that carry a tensor computed from one chosen input; parameters, constants and
sizes are left out, so that a dominator is a place that all image information passes through.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx

from idlefx.graph.memory import has_effect, written
from idlefx.utils.source_lines import innermost

SINK = "sink"


def value(node: fx.Node) -> torch.Tensor | None:
    """The example tensor that the trace recorded for a node, if it carries one."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def argument(node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
    """An argument of a call, given by position or by keyword; torch types it as a union of everything."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def tensor_argument(node: fx.Node, index: int) -> fx.Node:
    """An argument of a call that is another node."""
    operand = node.args[index]
    assert isinstance(operand, fx.Node), f"argument {index} of {node.format_node()} is no node"
    return operand


def run_target(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Do what a call does, with other arguments."""
    assert callable(node.target)
    return node.target(*args, **kwargs)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_of(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Nodes by their names."""
    return {node.name: node for node in graph.nodes}


def carries_tensors(node: fx.Node) -> bool:
    """Whether a node carries a tensor or several of them, and not a size."""
    val = node.meta.get("val")
    many = isinstance(val, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in val)
    return many or isinstance(val, torch.Tensor)


def is_view(node: fx.Node) -> bool:
    """Whether a call gives another view of its input's memory."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(a.alias_info for a in schema.arguments)


def image_data(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose tensors are computed from an input, and not from parameters alone."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if carries_tensors(node) and (node.op == "placeholder" or any(i in data for i in node.all_input_nodes)):
            data.add(node)
    return data


def data_flow(graph: fx.Graph, source: fx.Node) -> nx.DiGraph:
    """The flow of tensors from one input, ending in `SINK`.

    Args:
        graph: An ATen graph with recorded values.
        source: The input to start from.

    Returns:
        A digraph of `fx.Node`s in which every node is reachable from `source`.
    """
    flow = nx.DiGraph()
    flow.add_node(source)
    for node in graph.nodes:
        if node.op == "output" or carries_tensors(node):
            inputs = [i for i in node.all_input_nodes if i in flow]
            flow.add_edges_from((i, SINK if node.op == "output" else node) for i in inputs)
    return flow


def dominator_chain(flow: nx.DiGraph, root: object, node: object) -> Iterator[fx.Node]:
    """The dominators of a node from the nearest to the furthest, without the node itself."""
    parents = _parents(flow, root)
    while (parent := parents.get(node)) is not None and parent is not node and not isinstance(parent, str):
        yield parent
        node = parent


def _parents(flow: nx.DiGraph, root: object) -> dict[object, fx.Node]:
    cache = flow.graph.setdefault("dominators", {})
    if root not in cache:
        cache[root] = nx.immediate_dominators(flow, root)
    parents: dict[object, fx.Node] = cache[root]
    return parents


def post_dominator_chain(flow: nx.DiGraph, node: object) -> Iterator[fx.Node]:
    """The nodes that everything leaving `node` must pass, from the nearest to the furthest."""
    reverse = flow.graph.get("reverse")
    if reverse is None:
        # A view of another edge direction is made once: post-dominators are its dominators.
        reverse = flow.graph["reverse"] = nx.DiGraph([(b, a) for a, b in flow.edges])
    return dominator_chain(reverse, SINK, node)


def region(flow: nx.DiGraph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes on the paths from `start` to `end`, without `start`, in graph order."""
    if not nx.has_path(flow, start, end):
        return []
    inside = (nx.descendants(flow, start) & nx.ancestors(flow, end)) | {end}
    return [node for node in start.graph.nodes if node in inside]


def leaks(nodes: Iterable[fx.Node], end: fx.Node) -> list[fx.Node]:
    """The nodes of a region, other than its end, that something outside reads.

    What is computed only to be written into memory of the region, before it ends, stays inside.
    """
    inside = set(nodes)

    def outside(user: fx.Node) -> bool:
        return user not in inside and _reads_tensor(user) and not _written_back(user, inside, end)

    return [n for n in nodes if n is not end and any(map(outside, n.users))]


def _written_back(node: fx.Node, inside: set[fx.Node], end: fx.Node) -> bool:
    """Whether all that a node leads to is written into memory of a region before its end."""
    if node in inside:
        return True
    if node.op == "output" or end < node:
        return False
    if targets := written(node):
        return all(_viewed(target) in inside for target in targets) and not node.users
    return bool(node.users) and all(_written_back(user, inside, end) for user in node.users)


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of, through other views."""
    while is_view(node):
        node = tensor_argument(node, 0)
    return node


def _reads_tensor(user: fx.Node) -> bool:
    return user.op == "output" or carries_tensors(user) or has_effect(user)


def remove_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads and what writes nothing.

    A dropout that nobody reads goes too, though torch counts its dice as an effect.
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or has_effect(node))


def module_path(node: fx.Node) -> str:
    """The innermost module that a node was traced from; empty where it is the model itself, or unknown."""
    levels = list(node.meta.get("nn_module_stack", {}).values())
    return str(levels[-1][0]).partition("@")[0] if levels else ""  # torch numbers repeated calls: "fc@1"


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all nodes were traced from."""
    stacks = [[str(path) for path, _ in n.meta.get("nn_module_stack", {}).values()] for n in nodes]
    if not stacks or not all(stacks):
        return ""
    shared = [levels[0] for levels in zip(*stacks, strict=False) if len(set(levels)) == 1]
    return shared[-1] if shared else ""


def source_line(node: fx.Node) -> str:
    """The line of the user's own file that a node was traced from, as `file:line: code`."""
    return innermost_line(node.meta.get("stack_trace") or node.stack_trace or "")


def innermost_line(stack: str) -> str:
    """The innermost line of the user's own file in a stack as Python prints it, as `file:line: code`.

    Frames of libraries are passed over where there is any other.
    """
    lines = stack.strip().splitlines()
    frames = []
    for at, line in enumerate(lines):
        if line.strip().startswith("File "):
            file, number = line.split('"')[1], line.split("line ")[1].split(",")[0].strip()
            code = lines[at + 1].strip() if at + 1 < len(lines) else ""
            frames.append((file, f"{file}:{number}: {code}"))
    own = innermost([file for file, _ in frames])
    return "unknown line" if own is None else frames[own][1]
