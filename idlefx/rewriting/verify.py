"""What must hold after every pass.

A value is inferred again only where something that it rests on has changed since it was inferred.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from idlefx.errors import PassError
from idlefx.graph import inference
from idlefx.graph.queries import output_of, placeholders
from idlefx.rewriting.memory_order import contiguous_outputs


@dataclass(frozen=True)
class Promise:
    """What a graph promised its users before the passes.

    Attributes:
        inputs: Names of the inputs.
        outputs: Shape and type of each output.
        state: Names of parameters and buffers.
        contiguous: Whether each output is a contiguous tensor; passes need not keep that.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: frozenset[str]
    contiguous: tuple[bool, ...]


def promise_of(module: fx.GraphModule) -> Promise:
    """What the module promises now."""
    inputs = tuple(node.name for node in placeholders(module.graph))
    values = map_arg(output_of(module.graph).args, lambda n: n.meta["val"])
    outputs, state = tuple(_kind(v) for v in tree_leaves(values)), frozenset(module.state_dict())
    return Promise(inputs, outputs, state, contiguous_outputs(module.graph))


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(str(s) for s in value.shape)} {value.dtype}"
    return repr(value)


def verify(module: fx.GraphModule, before: Promise, name: str) -> None:
    """Check a module after the pass of that name.

    Raises:
        PassError: The graph is broken, a value is stale, or a promise is not kept; names the pass.
    """
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"in pass {name}: the graph is broken: {error}") from error
    for node in module.graph.nodes:
        if node.op == "call_function" and not inference.is_trusted(node):
            _check_value(node, name)
    now = promise_of(module)
    for what in ("inputs", "outputs", "state"):
        old, new = getattr(before, what), getattr(now, what)
        if old != new:
            raise PassError(f"in pass {name}: the {what} changed from {old} to {new}")


def _check_value(node: fx.Node, name: str) -> None:
    """A node's recorded value must be what its inputs' recorded values give, as later passes rely on it."""
    if any(tag in getattr(node.target, "tags", ()) for tag in inference.UNFORESEEN):
        return
    try:
        inferred = inference.infer(node)
    except Exception as error:
        raise PassError(f"in pass {name}: `{node.name}` = {node.target} does not run: {error}") from error
    if [_kind(v) for v in tree_leaves(inferred)] != [_kind(v) for v in tree_leaves(node.meta.get("val"))]:
        raise PassError(f"in pass {name}: `{node.name}` = {node.target} has a stale value")
    inference.trust(node)
