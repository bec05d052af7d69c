"""Values of nodes: shape and type are inferred when a node is made, and again only where what they rest on changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from idlefx.graph.queries import run_target

UNFORESEEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # a fresh symbol at each call

KEY = "inferred"
_REMEMBERED: dict[Any, dict[Any, Any]] = {}  # by the fake mode of a trace
_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@dataclass(frozen=True, eq=False)
class Basis:
    """What a recorded value rests on: the call as it stands in the graph, and the values of its inputs."""

    target: Any
    args: Any
    kwargs: Any
    inputs: tuple[Any, ...]
    value: Any

    def holds(self, node: fx.Node) -> bool:
        """Whether all of it is still so, and the value therefore right."""
        now = basis_of(node)
        same_call = self.target is now.target and self.args == now.args and self.kwargs == now.kwargs
        before, after = (self.value, *self.inputs), (now.value, *now.inputs)
        return same_call and len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))


def basis_of(node: fx.Node) -> Basis:
    """What the value of a node rests on now."""
    inputs = tuple(i.meta.get("val") for i in node.all_input_nodes)
    # Frozen, as 1, 1.0 and True are equal, though they may give results of another type.
    return Basis(node.target, _frozen(node.args), _frozen(node.kwargs), inputs, node.meta.get("val"))


def infer(node: fx.Node) -> Any:
    """What a call gives for the recorded values of its inputs, nothing being computed.

    Blocks of one stage call the same operations on tensors of the same shapes, so what was inferred is remembered until
    `forget` is called.
    """
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    leaves = chain(tree_leaves((args, kwargs)), (n.meta.get("val") for n in node.graph.nodes))
    mode = next(mode for leaf in leaves if (mode := getattr(leaf, "fake_mode", None)) is not None)
    signature = _signature(node.target, args, kwargs)
    remembered = _REMEMBERED.setdefault(mode, {})
    if signature in remembered:
        return remembered[signature]
    # The Python dispatcher keeps the batch symbolic where some C++ kernels would ask for its value. Torch's own memory
    # of calls is left out: to write a call down costs it as much again, and the same call does not come twice here.
    unremembered = patch.object(mode, "cache_enabled", False, create=True)
    with unremembered, mode, torch.no_grad(), enable_python_dispatcher():
        value = run_target(node, args, kwargs)
    if signature is not None:
        remembered[signature] = value
    return value


def _signature(target: Any, *arguments: Any) -> Any:
    """A key that is equal for calls which give equal shapes and types; None where there is none."""
    if any(tag in getattr(target, "tags", ()) for tag in UNFORESEEN):
        return None
    try:
        key = target, _frozen(arguments)
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        sizes = (*argument.shape, *argument.stride())
        plain = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
        return plain, argument.dtype, argument.device, argument.requires_grad
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):  # whose own hash would fix the batch
        return type(argument), argument.node.expr
    if isinstance(argument, (list, tuple)):
        return type(argument).__name__, tuple(map(_frozen, argument))
    if isinstance(argument, dict):
        return tuple((key, _frozen(value)) for key, value in argument.items())
    return type(argument), argument


def record(node: fx.Node) -> None:
    """Infer the value of a node, and record it with what it rests on."""
    node.meta["val"] = infer(node)
    trust(node)


def trust(node: fx.Node) -> None:
    """Take the recorded value of a node for right, as long as what it rests on stays."""
    node.meta[KEY] = basis_of(node)


def is_trusted(node: fx.Node) -> bool:
    """Whether the value of a node was inferred or trusted, and nothing that it rests on has changed since."""
    basis: Basis | None = node.meta.get(KEY)
    return basis is not None and basis.holds(node)


def forget(graph: fx.Graph) -> None:
    """Forget what was inferred, but for the values of the nodes."""
    if not _KEEPING.get():
        _REMEMBERED.clear()
    for node in graph.nodes:
        node.meta.pop(KEY, None)


@contextmanager
def remembering() -> Iterator[None]:
    """Keep what calls give from one graph to the next: for many rewrites of one trace, whose calls are mostly alike."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)
        _REMEMBERED.clear()
