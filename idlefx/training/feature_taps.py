"""The two ends of a model, found in its graph: what makes the tokens, and what the classifier reads."""

from copy import deepcopy
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves

from idlefx.analysis.image_input import image_input, takes_bytes
from idlefx.errors import InputError
from idlefx.graph.notes import layer_of
from idlefx.graph.queries import by_name, image_data, output_of, placeholders, remove_dead, tensor_argument, value
from idlefx.graph.sizes import shape_of
from idlefx.reporting.comparison.compare import class_counts
from idlefx.runtime.module import IdleModule, conversion_of, converted

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.cat.default)
_VIEWS = (
    aten.reshape.default, aten.view.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
    aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.to.dtype, aten._to_copy.default,
)  # fmt: skip


def tap(module: fx.GraphModule) -> fx.GraphModule:
    """The same model as a plain function of the images, which also returns what its classifier reads.

    Args:
        module: A captured or converted model, or `with_cut_loss` of one, in the mode that is wanted.

    Returns:
        A module with the same parameters: images (B, channels, H, W) to logits (B, classes), class features (B, F),
        or None where the logits come from no linear layer, and whatever else the model returns last, such as the
        cut loss.

    Raises:
        InputError: The model has no logits (B, classes), or takes more than images.
    """
    graph = deepcopy(module.graph)
    images, outputs = image_input(graph), [n for n in tree_leaves(output_of(graph).args) if isinstance(n, fx.Node)]
    refuse_bytes(graph)
    logits = next((n for n in outputs if (v := value(n)) is not None and v.is_floating_point() and v.ndim == 2), None)
    if logits is None:
        raise InputError("finetune: the model returns no logits (B, classes); fine-tuning needs a classifier")
    further = [n for n in placeholders(graph) if n is not images]
    if used := [n.name for n in further if n.users]:
        raise InputError(f"finetune: the model takes {', '.join(used)} besides images; wrap it so that it needs none")
    read = _class_features(graph, logits)
    with graph.inserting_before(output_of(graph)):
        features = graph.call_function(aten.cat.default, (read, 1)) if len(read) > 1 else (read or [None])[0]
    rest = outputs[-1:] if outputs[-1] is not logits and shape_of(outputs[-1]) == [] else []
    output_of(graph).args = ((logits, features, *rest),)
    graph.set_codegen(CodeGen())
    for node in further:
        graph.erase_node(node)
    remove_dead(graph)
    return fx.GraphModule(module, graph)


def refuse_bytes(graph: fx.Graph) -> None:
    """Refuse a model whose images are no numbers of floating point, as those of a loader are.

    Raises:
        InputError: It is one.
    """
    if takes_bytes(graph):
        raise InputError(
            "finetune: the model takes uint8 images and normalises them itself, but those of a loader are normalised "
            "already; convert the part of the model that takes such images"
        )


def class_count(tapped: fx.GraphModule) -> int:
    """How many classes the logits of a tapped model tell apart."""
    return shape_of(_outputs(tapped)[0])[1]


def classes_of(idle: IdleModule, there: int | None = None) -> int | None:
    """How many classes a model tells apart; None if it is no classifier as far as is known.

    It is one if it returns logits (B, classes), and either says itself that it has so many classes, or says nothing
    and makes them by a linear layer, or as many as there are. Features (B, C) of an encoder are none.

    Args:
        idle: The converted model.
        there: How many classes its data has, if it is known.
    """
    try:
        tapped = tap(idle)
    except InputError:
        return None
    count, said = class_count(tapped), class_counts(idle, conversion_of(idle).facts)
    return count if count in said or (not said and (has_features(tapped) or count == there)) else None


def has_features(tapped: fx.GraphModule) -> bool:
    """Whether a linear classifier, and so the class features, were found in a tapped model."""
    return _outputs(tapped)[1] is not None


def _outputs(tapped: fx.GraphModule) -> Any:
    return output_of(tapped.graph).args[0]


def _class_features(graph: fx.Graph, logits: fx.Node) -> list[Any]:
    """The inputs (B, F) of the linear layers that the logits come from, several where their votes are averaged."""
    data, found = image_data(graph), set[fx.Node]()
    stack: list[fx.Node] = [logits]
    while stack:
        node = stack.pop()
        if _is_linear(node) and len(shape_of(node.args[0])) == 2:
            found.add(tensor_argument(node, 0))
        elif node.target in _VIEWS or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            stack += [i for i in node.all_input_nodes if i in data]
        else:
            return []
    return [node for node in graph.nodes if node in found]


def _is_linear(node: fx.Node) -> bool:
    layer = layer_of(node)
    return node.target is aten.linear.default or (layer is not None and layer.kind == "Linear")


def token_parameters(idle: IdleModule) -> set[str]:
    """Names of the parameters that are joined with, or added to, the tokens in front of the first block.

    These are class, distillation and register tokens and positions, however they are named; weights of layers that
    work on the image are not among them.
    """
    idle = converted(idle)
    conversion = conversion_of(idle)
    graph = conversion.evaluation.graph
    data, found, seen = image_data(graph), set[str](), set[fx.Node]()
    stack: list[fx.Node] = [by_name(graph)[conversion.blocks[0].entry]]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            found.add(str(node.target))
        everything = node not in data or node.target in _SUMS
        stack += [i for i in node.all_input_nodes if everything or i in data]
    return found & {name for name, _ in idle.named_parameters(remove_duplicate=False)}
