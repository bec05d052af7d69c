"""Make an exported program a plain graph module that holds the model's own state.

1. Guards and assertions of the trace are left out.
2. A part that ran under `torch.no_grad` is written into the graph; see `regions`.
3. A mask that no input decides and that masks nothing is left out, also where it is added to a bias: Hugging Face
   models build one only while being traced, and fast attention takes none.
4. Parameters and buffers are the model's objects under the model's names, the unused ones too.
"""

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from idlefx.capture.regions import refuse_autocast, write_out
from idlefx.graph.memory import Memory
from idlefx.graph.queries import argument, carries_tensors, remove_dead, run_target
from idlefx.graph.sizes import SMALL_BATCH, number
from idlefx.graph.state import adopt

aten = torch.ops.aten


def tidy(exported: nn.Module, model: nn.Module) -> fx.GraphModule:
    """A plain module from what `ExportedProgram.module()` gives."""
    graph: Any = exported.graph
    for part in exported.modules():
        if isinstance(part, fx.GraphModule):
            _drop_assertions(part)
    write_out(exported, graph)
    refuse_autocast(exported, graph)
    _drop_masks(graph)
    remove_dead(graph)
    module = fx.GraphModule(exported, graph, type(model).__name__)
    adopt(module, model)
    return module


def _drop_assertions(part: fx.GraphModule) -> None:
    """Also in a region that switches autocast, where they would hold the number types of the trace against others."""
    for node in list(part.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default or node.target == "_guards_fn":
            part.graph.erase_node(node)
    part.recompile()


def _drop_masks(graph: fx.Graph) -> None:
    memory = Memory(graph)
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = argument(node, 3, "attn_mask")
        while mask is not None and (kept := _without_idle_part(mask, memory)) is not mask:
            mask = kept
        if len(node.args) > 3:
            node.args = (*node.args[:3], mask, *node.args[4:])
        elif "attn_mask" in node.kwargs:
            node.kwargs = {**node.kwargs, "attn_mask": mask}


def _without_idle_part(mask: fx.Node, memory: Memory) -> fx.Node | None:
    """The mask, or what is left of it if it, or a summand of it, masks nothing."""
    if _masks_nothing(mask, memory):
        return None
    a, b = argument(mask, 0), argument(mask, 1)
    if mask.target is aten.add.Tensor and isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if _masks_nothing(b, memory):
            return a
        if _masks_nothing(a, memory):
            return b
    return mask


def _masks_nothing(mask: fx.Node, memory: Memory) -> bool:
    value = _constant(mask, memory)
    return value is not None and bool(value.all() if value.dtype == torch.bool else (value == 0).all())


def _constant(node: fx.Node, memory: Memory) -> Any:
    """The value of a node that only sizes decide, for a batch of two; None if an input, a parameter or a write does."""
    needed, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in needed or not carries_tensors(current):
            continue
        random = torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ())
        if current.op != "call_function" or random or len(needed) > 200:
            return None
        needed.add(current)
        stack += current.all_input_nodes
    if not needed.issuperset(memory.writes_into(needed)):
        return None
    values: dict[fx.Node, Any] = {}
    for current in sorted(needed, key=memory.order.__getitem__):
        given = (current.args, current.kwargs)
        args, kwargs = map_arg(given, lambda n: values[n] if n in values else number(n, SMALL_BATCH))
        values[current] = run_target(current, args, kwargs)
    return values[node]
