"""Which nodes of a graph share memory, and which write into it.

1. What the schema of an operation says of its arguments is believed. What has no schema may share memory with all that
   it reads.
2. A few operations return their input where there is nothing to do, and do not say so; `batch_norm` does not say that
   it writes its statistics.
3. Parts of one tensor that were split or selected apart share no memory.
"""

import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

aten = torch.ops.aten

Path = tuple[Any, ...]  # whose memory it is, then one entry for each cut: what was cut, and which part it is

_MAY_RETURN_INPUT = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
    aten.type_as.default, aten.einsum.default, aten.sum_to_size.default,
)  # fmt: skip
_SPLITS = ("aten::unbind", "aten::chunk", "aten::split", "aten::split_with_sizes", "aten::tensor_split")
_STATISTICS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}  # which argument says that they are taken


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments of a call whose memory it writes into."""
    if node.target in _STATISTICS:
        arguments = node.args[3:5] if node.args[_STATISTICS[node.target]] else ()
        return [a for a in arguments if isinstance(a, fx.Node)]
    return _marked(node, writes=True)


def has_effect(node: fx.Node) -> bool:
    """Whether a node does something, though nobody may read it: it writes, or it is an operator made to be run."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        runs_only = not schema.returns and not schema.name.startswith("aten::")
        return runs_only or bool(written(node))
    # What has no schema may run a part of the module, which it reads as an attribute.
    parts = [_behind(i) for i in node.all_input_nodes if i.op == "get_attr"]
    return any(has_effect(n) for part in parts if isinstance(part, fx.GraphModule) for n in part.graph.nodes)


class Memory:
    """The memory of the nodes of a graph, as it stands; after a change of the graph it is to be made anew."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.writes = [node for node in graph.nodes if written(node)]
        self._paths: dict[fx.Node, frozenset[Path]] = {}
        for node in graph.nodes:
            self._paths[node] = self._paths_of(node)

    def share(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether to write into one may change the other."""
        return any(_overlap(p, q) for p in self._paths[a] for q in self._paths[b])

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that share memory with this one, itself included."""
        return [other for other in self._paths if self.share(node, other)]

    def is_seen_outside(self, node: fx.Node) -> bool:
        """Whether it is the memory of an input, a parameter or a buffer."""
        return any(not isinstance(path[0], fx.Node) or path[0].op == "placeholder" for path in self._paths[node])

    def writes_into(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The calls of the graph that write into the memory of any of these nodes."""
        paths = {path for node in nodes for path in self._paths[node]}
        targets = [(write, path) for write in self.writes for node in written(write) for path in self._paths[node]]
        return list(dict.fromkeys(write for write, path in targets if any(_overlap(path, p) for p in paths)))

    def _paths_of(self, node: fx.Node) -> frozenset[Path]:
        if node.op == "get_attr":
            return frozenset({(id(_behind(node)) if _behind(node) is not None else node.target,)})
        if node.op != "call_function":
            return frozenset({(node,)})
        sources = _sources(node)
        paths = frozenset[Path]().union(*(self._paths[source] for source in sources)) or frozenset({(node,)})
        part = _part(node)
        return paths if part is None else frozenset((*path, part) for path in paths)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the result of a call may share memory with."""
    if node.target in _MAY_RETURN_INPUT:
        return node.all_input_nodes
    if getattr(node.target, "_schema", None) is None:
        return [i for i in node.all_input_nodes if _is_tensor(i)] if _is_tensor(node) else []
    return _marked(node, writes=False)


def _marked(node: fx.Node, *, writes: bool) -> list[fx.Node]:
    """The arguments that the schema of a call says are written, or else shared with the result in some way."""
    nodes: list[fx.Node] = []
    for place, name, is_write in _marks(node.target):
        if is_write or not writes:
            map_arg(node.args[place] if place < len(node.args) else node.kwargs.get(name), nodes.append)
    return nodes


@cache
def _marks(target: Any) -> tuple[tuple[int, str, bool], ...]:
    """Place and name of each argument that is shared with the result or written, and whether it is written."""
    schema: Any = getattr(target, "_schema", None)
    marked = enumerate(schema.arguments if schema is not None else ())
    return tuple((place, a.name, a.alias_info.is_write) for place, a in marked if a.alias_info is not None)


def _part(node: fx.Node) -> Any:
    """What a call cuts, and which part of it it takes; None if it does not cut one tensor into parts."""
    if node.target is operator.getitem:
        cut, place = node.args
        schema = getattr(cut.target, "_schema", None) if isinstance(cut, fx.Node) else None
        return (cut, place) if schema is not None and schema.name in _SPLITS else None
    if node.target is aten.select.int:
        source, dim, place = node.args
        plain = all(isinstance(number, int) and number >= 0 for number in (dim, place))
        return ((source, dim), place) if plain else None
    return None


def _overlap(a: Path, b: Path) -> bool:
    if a[0] != b[0]:
        return False
    for (cut, place), (other_cut, other_place) in zip(a[1:], b[1:], strict=False):
        if (cut, place) != (other_cut, other_place):
            return bool(cut != other_cut)
    return True


def _behind(node: fx.Node) -> Any:
    """The tensor of an attribute, which may have several names, or the part of the module; None if there is none."""
    try:
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    except AttributeError:
        return None


def _is_tensor(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return val is None or isinstance(val, (torch.Tensor, list, tuple))
