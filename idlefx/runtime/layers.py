"""The layers of a converted model: real modules, for what quantises, prunes or replaces modules to find.

1. Where a module of the model did nothing but one linear layer, layer norm or convolution with a weight of its own, an
   `nn.Linear`, `nn.LayerNorm` or `nn.Conv2d` with the same parameters stands, and the graph calls it.
2. What else the graph does with the weight of a layer, such as scoring tokens, it does with what the layer holds at
   that call.
3. All other modules are containers, of which nothing runs.

`swaps` has what looks at them in each call.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from idlefx.graph.notes import LAYER, Layer
from idlefx.graph.queries import argument, module_path, value
from idlefx.graph.state import owner_of, place
from idlefx.runtime.swaps import KINDS, read_weight

aten = torch.ops.aten


def find_layers(module: nn.Module, sources: Iterable[fx.Graph]) -> dict[str, Layer]:
    """The layers of a captured model, by path.

    Args:
        module: Holds its parameters and buffers.
        sources: Its graphs as they were captured, one for each mode.
    """
    layers, others = dict[str, Layer](), set[str]()
    for source in sources:
        calls = defaultdict[str, list[fx.Node]](list)
        for node in source.nodes:
            if node.op == "call_function":
                calls[module_path(node)].append(node)
        for path, nodes in calls.items():
            layer, *differing = {_layer_of_call(node) for node in nodes}
            if differing or layer is None or layer.path != path or layers.setdefault(path, layer) != layer:
                others.add(path)
    names = Counter(id(tensor) for _, tensor in module.named_parameters(remove_duplicate=False))
    return {
        path: layer
        for path, layer in layers.items()
        if path not in others and _is_all_of(part := module.get_submodule(path), layer)
        if all(names[id(tensor)] == 1 for tensor in part.parameters())  # shared ones are only read
    }


def _layer_of_call(node: fx.Node) -> Layer | None:
    """The layer that a call with the weight and the bias of one module makes up."""
    if node.target is aten.linear.default:
        kind, (weight, bias) = "Linear", (argument(node, 1), argument(node, 2, "bias"))
    elif node.target is aten.conv2d.default:
        kind, (weight, bias) = "Conv2d", (argument(node, 1), argument(node, 2, "bias"))
    elif node.target is aten.layer_norm.default:
        kind, (weight, bias) = "LayerNorm", (argument(node, 2, "weight"), argument(node, 3, "bias"))
    else:
        return None
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and (held := value(weight)) is not None):
        return None
    path, _, leaf = str(weight.target).rpartition(".")
    own_bias = bias is None or (isinstance(bias, fx.Node) and (bias.op, bias.target) == ("get_attr", f"{path}.bias"))
    if not path or leaf != "weight" or not own_bias:
        return None
    settings: tuple[Any, ...]
    if kind == "Linear":
        settings = held.shape[1], held.shape[0]
    elif kind == "LayerNorm":
        settings = tuple(argument(node, 1)), argument(node, 4, "eps", 1e-5)
    else:
        places = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
        pairs = [_pair(argument(node, place, name, default)) for place, name, default in places]
        groups = argument(node, 6, "groups", 1)
        settings = (held.shape[1] * groups, held.shape[0], tuple(held.shape[2:]), *pairs, groups)
    return Layer(path, kind, settings, bias is not None)


def _pair(setting: Any) -> tuple[int, ...]:
    return (setting, setting) if isinstance(setting, int) else tuple(setting) * (2 // len(setting))


def _is_all_of(part: nn.Module, layer: Layer) -> bool:
    """Whether a module holds what the layer does and nothing else."""
    tensors = {"weight", "bias"} if layer.bias else {"weight"}
    return not (part._modules or part._buffers) and set(part._parameters) == tensors


def put_layers(layers: Mapping[str, Layer], *modules: nn.Module) -> None:
    """Let real layers stand in modules where containers of their parameters stood, the same in all of them."""
    for layer in layers.values():
        kind, names = KINDS[layer.kind]
        tensors = modules[0].get_submodule(layer.path)._parameters
        made = kind(**dict(zip(names, layer.settings, strict=True)), bias=layer.bias, device="meta")
        for name, tensor in tensors.items():
            made.register_parameter(name, tensor)
        for module in modules:
            owner, leaf = owner_of(module, layer.path)
            owner.add_module(leaf, made)


def layer_around(name: str, layers: Mapping[str, Layer]) -> str:
    """The path of the layer that a dotted name is of, or of something in; empty if there is none."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name


def call_layers(graph: fx.Graph, layers: Mapping[str, Layer]) -> None:
    """Let a graph call the layers, and read their weights from them."""
    for node in graph.nodes:
        layer = _layer_of_call(node) if node.op == "call_function" else None
        if layer is not None and layers.get(layer.path) == layer and module_path(node) == layer.path:
            inputs = node.args[0]
            node.op, node.target, node.args, node.kwargs = "call_module", layer.path, (inputs,), {}
            node.meta[LAYER] = layer
    parts = dict[str, fx.Node]()
    for node in graph.find_nodes(op="get_attr"):
        path, _, leaf = node.target.rpartition(".")
        if path in layers:
            if node.users:
                with graph.inserting_before(node):
                    if path not in parts:
                        parts[path] = graph.create_node("get_attr", path)
                with graph.inserting_before(min(node.users)):
                    read = graph.call_function(read_weight, (parts[path], leaf, *layers[path]))
                read.meta = dict(node.meta)
                node.replace_all_uses_with(read)
            graph.erase_node(node)


def add_constants(module: nn.Module, root: nn.Module, graph: fx.Graph, layers: Mapping[str, Layer]) -> None:
    """Give `module` the constants of `root` that only this graph reads, under names that are free."""
    for node in graph.find_nodes(op="get_attr"):
        if layer_around(str(node.target), layers):
            continue
        path, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(root.get_submodule(path), leaf)
        owner, _ = owner_of(module, str(node.target))
        if getattr(owner, leaf, tensor) is not tensor:
            node.target += "_in_training"
        place(module, str(node.target), tensor)
