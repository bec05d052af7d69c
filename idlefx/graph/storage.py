"""A graph as plain records that pickle can write, and back; torch itself would write code, and forget all values.

A node keeps its name, its call, the shape and type of its value, the line and the module it was traced from, and its
note. Sizes that follow the batch are stored as formulas of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from idlefx.errors import InputError
from idlefx.graph.notes import KEY, LAYER
from idlefx.graph.sizes import FREE_BATCH


@dataclass(frozen=True)
class StoredSize:
    """A size that follows the batch, as a formula such as "4*s77"."""

    formula: str


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor in the trace."""

    shape: tuple[int | StoredSize, ...]
    stride: tuple[int | StoredSize, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


@dataclass(frozen=True)
class Operator:
    """An operator of torch, as it is named under `torch.ops`."""

    name: str


@dataclass(frozen=True)
class Input:
    """Stands in a call for the node at that place."""

    place: int


@dataclass(frozen=True)
class StoredNode:
    """A node: what `fx.Graph.create_node` takes, and what its `meta` holds."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class StoredGraph:
    """A graph, and how its inputs and outputs are nested."""

    nodes: tuple[StoredNode, ...]
    codegen: CodeGen


def store(graph: fx.Graph) -> StoredGraph:
    """What can be written of a graph.

    Raises:
        InputError: It calls something that has no name.
    """
    places = {node: Input(place) for place, node in enumerate(graph.nodes)}

    def stored(argument: Any) -> Any:
        return places[argument] if isinstance(argument, fx.Node) else argument

    return StoredGraph(
        tuple(
            StoredNode(
                node.op,
                _stored_target(node),
                map_aggregate(node.args, stored),
                map_aggregate(node.kwargs, stored),
                node.name,
                _stored_meta(node),
            )
            for node in graph.nodes
        ),
        graph._codegen,
    )


def restore(stored: StoredGraph) -> fx.Graph:
    """The graph that was stored.

    Raises:
        InputError: It calls an operator that is not there.
    """
    graph, value_of = fx.Graph(), _restorer()
    nodes: list[fx.Node] = []

    def restored(argument: Any) -> Any:
        return nodes[argument.place] if isinstance(argument, Input) else argument

    for each in stored.nodes:
        args, kwargs = map_aggregate(each.args, restored), map_aggregate(each.kwargs, restored)
        target = _operator(each.target.name) if isinstance(each.target, Operator) else each.target
        node = graph.create_node(each.op, target, args, kwargs, each.name)
        node.meta = dict(each.meta)
        if "val" in node.meta:
            node.meta["val"] = tree_map(value_of, node.meta["val"])
        nodes.append(node)
    graph.set_codegen(stored.codegen)
    return graph


def _stored_target(node: fx.Node) -> Any:
    if isinstance(node.target, torch._ops.OpOverload):
        return Operator(str(node.target))
    if callable(node.target) and "<" in getattr(node.target, "__qualname__", "<"):
        raise InputError(
            f"pickle: `{node.name}` calls {node.target}, which has no name to be found by in another process; save "
            "idle.state_dict() instead, and convert the model anew there"
        )
    return node.target


def _operator(name: str) -> Any:
    operator: Any = torch.ops
    for part in name.split("."):
        operator = getattr(operator, part, None)
    if operator is None:
        raise InputError(f"pickle: there is no operator {name}; import what registers it, then load the model")
    return operator


def _stored_meta(node: fx.Node) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in (KEY, LAYER, "stack_trace") if key in node.meta}
    if "nn_module_stack" in node.meta:  # whose classes another process need not have
        meta["nn_module_stack"] = {key: (path, "") for key, (path, _) in node.meta["nn_module_stack"].items()}
    if "val" in node.meta:
        meta["val"] = tree_map(_stored_value, node.meta["val"])
    return meta


def _stored_value(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return StoredSize(str(value.node.expr))
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = (tuple(map(_stored_value, sizes)) for sizes in (value.shape, value.stride()))
    return StoredTensor(shape, stride, value.dtype, value.device, value.requires_grad)


def _restorer() -> Callable[[Any], Any]:
    """Makes values of what was stored, all in one trace of their own."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.utils._sympy import functions

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    symbols: dict[str, Any] = {}
    sizes: dict[str, Any] = {}

    def size_of(formula: str) -> Any:
        if formula not in sizes:
            expression = sympy.sympify(formula, locals={name: getattr(functions, name) for name in functions.__all__})
            for symbol in expression.free_symbols:
                if symbol.name not in symbols:
                    source = ConstantSource(symbol.name)
                    symbols[symbol.name] = shapes.create_symbol(FREE_BATCH, source, dynamic_dim=DimDynamic.DYNAMIC)
            renamed = expression.subs({symbol: symbols[symbol.name] for symbol in expression.free_symbols})
            hint = int(renamed.subs(dict.fromkeys(renamed.free_symbols, FREE_BATCH)))
            sizes[formula] = shapes.create_symintnode(renamed, hint=hint)
        return sizes[formula]

    def value_of(stored: Any) -> Any:
        if isinstance(stored, StoredSize):
            return size_of(stored.formula)
        if not isinstance(stored, StoredTensor):
            return stored
        shape, stride = ([value_of(size) for size in each] for each in (stored.shape, stored.stride))
        with mode:
            tensor = torch.empty_strided(shape, stride, dtype=stored.dtype, device=stored.device)
        return tensor.requires_grad_(stored.requires_grad)

    return value_of
