"""Regions of a trace that ran without gradients: their operations stand in the graph like all others.

1. What was computed without gradients is detached where it is read with gradients.
2. A region that writes into tensors from outside works on them detached, so that they come back as they were; what
   is read afterwards is the tensor itself, with the gradients it had.
"""

from collections import defaultdict
from itertools import count
from typing import Any

import torch
from torch import fx, nn

from idlefx.errors import CaptureError
from idlefx.graph.queries import argument, is_view, source_line

aten = torch.ops.aten

_ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default)
_AUTOCAST: Any = torch.ops.higher_order.wrap_with_autocast
NO_GRAD: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
_SET_GRAD: Any = torch._C._set_grad_enabled
_REGION = "idlefx_region"  # in a node's meta: the number of its region without gradients; 0 if it has gradients


def write_out(owner: nn.Module, graph: Any) -> None:
    """Put regions, whether calls of parts or between switches, into the graph, with detached edges."""
    numbers = count(1)
    _inline(owner, graph, numbers)
    region, regions = 0, dict[fx.Node, int]()
    for node in list(graph.nodes):
        if node.target is _SET_GRAD:
            region = 0 if node.args[0] else next(numbers)
            graph.erase_node(node)
        else:
            regions[node] = node.meta.pop(_REGION, region if node.op == "call_function" else 0)
    if any(regions.values()):
        _cut(owner, graph, regions)


def refuse_autocast(owner: nn.Module, graph: fx.Graph) -> None:
    """Refuse a region that switches autocast around attention, whose blocks would be hidden; others stay regions.

    The trace knows no line of a region: it gets that of its first operation.

    Raises:
        CaptureError: There is one.
    """
    for node in graph.find_nodes(op="call_function", target=_AUTOCAST):
        part: Any = node.args[4]
        module = owner.get_submodule(part.target)
        inner: Any = module.graph
        for call in inner.nodes:
            if call.target in _ATTENTION:
                raise CaptureError(
                    f"capture: the model switches autocast inside its forward (at {source_line(call)}); "
                    "switch it around the call instead"
                )
        refuse_autocast(module, inner)
        stacks = (call.meta.get("stack_trace") for call in inner.nodes)
        node.meta["stack_trace"] = next(filter(None, stacks), None)


def _inline(owner: nn.Module, graph: Any, numbers: "count[int]") -> None:
    for node in list(graph.nodes):
        if node.target is not NO_GRAD:
            continue
        enabled, part, *inputs = list[Any](node.args)
        module = owner.get_submodule(part.target)
        inner: Any = module.graph
        _inline(module, inner, numbers)
        region = 0 if enabled else next(numbers)
        for each in inner.nodes:
            each.meta.setdefault(_REGION, region)
        _replace_by_parts(node, part.target, inner, inputs)


def _replace_by_parts(node: fx.Node, path: str, inner: fx.Graph, inputs: list[Any]) -> None:
    holders = [n for n in inner.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(holders, inputs, strict=True))
    with node.graph.inserting_before(node):
        results: Any = node.graph.graph_copy(inner, mapping)
    for original, copied in mapping.items():
        if original.op == "get_attr":
            copied.target = f"{path}.{copied.target}"
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    for user in list(node.users):
        user.replace_all_uses_with(results[argument(user, 1)])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _cut(owner: nn.Module, graph: fx.Graph, regions: dict[fx.Node, int]) -> None:
    """Detach on the edges between regions."""
    writing = {regions[n] for n in regions if regions[n] and _writes(n) and not regions[_written(n, regions)]}
    crossing = defaultdict[tuple[fx.Node, int], list[fx.Node]](list)
    for node, region in regions.items():
        for source in node.all_input_nodes:
            there = regions[source]
            if region in writing and not there and _may_have_gradients(owner, source):
                crossing[source, region].append(node)
            elif there and not region and node.op != "get_attr":
                root = _written(source, regions) if _writes(source) else source
                if not regions[root] and _may_have_gradients(owner, root):
                    node.replace_input_with(source, root)
                elif there not in writing and _may_have_gradients(owner, source):
                    crossing[source, 0].append(node)
    for (source, _), readers in crossing.items():
        with graph.inserting_before(readers[0]):
            detached = graph.call_function(aten.detach.default, (source,))
        detached.meta = {k: v for k, v in source.meta.items() if k != "idlefx"}
        for reader in readers:
            reader.replace_input_with(source, detached)


def _may_have_gradients(owner: nn.Module, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    if node.op != "get_attr":
        return True
    path, _, leaf = str(node.target).rpartition(".")
    tensor = getattr(owner.get_submodule(path), leaf)
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _written(node: fx.Node, regions: dict[fx.Node, int]) -> fx.Node:
    """The tensor that a write ends up in, through views and other writes of the region."""
    current = node
    while regions[current] and (_writes(current) or is_view(current)):
        out: Any = current.kwargs.get("out", current.args[0])
        current = out
    return current
