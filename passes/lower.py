"""Write operations that say several things at once as operations that say one.

1. `einsum` becomes matrix products between permutations.
2. A product with an outside matrix becomes a linear layer; `baddbmm` becomes a batched product and a sum.
3. An operation that overwrites memory which nobody else looks at later becomes the one that makes a new tensor. What
   writes into an input, a parameter or a buffer stays, through however many names it does so.
4. A conversion to the type that is there already is dropped; it would stand between a sum and its reader.
5. Zeros or ones that are made like a tensor of the image are made like a parameter: they hold nothing of the image.
6. A shape that is taken from another tensor of the image is written down: that tensor need not be made for it.
7. `narrow` becomes a slice, and `chunk` or `split` a split into pieces of plain sizes, unless a size follows the batch.
8. What does not fit these rules stays, for `propagation` to accept or to refuse.
"""

from typing import Any

import torch
from torch import fx

from idlefx.graph.build import add_call
from idlefx.graph.memory import Memory
from idlefx.graph.queries import argument, image_data, remove_dead, tensor_argument
from idlefx.graph.sizes import follows_batch
from idlefx.records import Plan
from idlefx.rewriting.constants import free_constants
from idlefx.rewriting.einsum import add_products

aten = torch.ops.aten

_CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default)


def lower_spellings(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite what has a simpler spelling; the plan does not matter."""
    del plan
    graph = module.graph
    free_constants(graph)
    data = image_data(graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is aten.einsum.default:
                _replace(node, add_products(graph, node))
            elif node.target is aten.baddbmm.default:
                _replace(node, _product_and_sum(graph, node))
            elif node.target in (aten.matmul.default, aten.mm.default, aten.addmm.default):
                _replace(node, _linear(graph, node, data))
            elif node.target in (aten.reshape_as.default, aten.view_as.default):
                _replace(node, _reshaped(graph, node, data))
            elif node.target in _CONVERSIONS:
                _replace(node, _unconverted(node))
            elif node.target is aten.narrow.default:
                _replace(node, _slice(graph, node))
            elif node.target in (aten.chunk.default, aten.split.Tensor):
                _replace(node, _pieces(graph, node))
            else:
                _replace(node, _out_of_place(graph, node))
    remove_dead(graph)
    return module


def _replace(node: fx.Node, new: fx.Node | None) -> None:
    if new is not None:
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)


def _product_and_sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    bias, a, b = (tensor_argument(node, at) for at in range(3))
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = add_call(graph, aten.bmm.default, a, b, name="product", like=node)
    if alpha != 1:
        product = add_call(graph, aten.mul.Tensor, product, alpha, name="scaled", like=node)
    if beta == 0:
        return product
    if beta != 1:
        bias = add_call(graph, aten.mul.Tensor, bias, beta, name="scaled", like=node)
    return add_call(graph, aten.add.Tensor, product, bias, name="sum", like=node)


def _reshaped(graph: fx.Graph, node: fx.Node, data: set[fx.Node]) -> fx.Node | None:
    x, like = tensor_argument(node, 0), tensor_argument(node, 1)
    sizes = [-1 if follows_batch(size) else int(size) for size in like.meta["val"].shape]
    if x is like or like not in data or sizes.count(-1) > 1:
        return None
    return add_call(graph, aten.reshape.default, x, sizes, name="reshaped", like=node)


def _slice(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    x, dim, start, length = node.args
    size = tensor_argument(node, 0).meta["val"].shape[dim]
    if not (isinstance(start, int) and isinstance(length, int)) or (start < 0 and follows_batch(size)):
        return None
    first = start % int(size) if start < 0 else start
    return add_call(graph, aten.slice.Tensor, x, dim, first, first + length, name="slice", like=node)


def _pieces(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    x, dim = tensor_argument(node, 0), argument(node, 2, "dim", 0)
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    if any(map(follows_batch, sizes)):
        return None
    return add_call(graph, aten.split_with_sizes.default, x, [*map(int, sizes)], dim, name="split", like=node)


def _unconverted(node: fx.Node) -> fx.Node | None:
    source = tensor_argument(node, 0)
    before, after = source.meta["val"], node.meta["val"]
    same = all(getattr(before, what) == getattr(after, what) for what in ("dtype", "device", "layout"))
    return source if same else None


def _linear(graph: fx.Graph, node: fx.Node, data: set[fx.Node]) -> fx.Node | None:
    first = 1 if node.target is aten.addmm.default else 0
    bias = tensor_argument(node, 0) if first else None
    x, weight = tensor_argument(node, first), tensor_argument(node, first + 1)
    plain = len(weight.meta["val"].shape) == 2 and (bias is None or len(bias.meta["val"].shape) == 1)
    if not plain or x not in data or weight in data or bias in data or node.kwargs:
        return None
    turned = add_call(graph, aten.t.default, weight, name="weight", like=node)
    return add_call(graph, aten.linear.default, x, turned, bias, name="linear", like=node)


def _out_of_place(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return None
    packet = getattr(aten, schema.name.removeprefix("aten::")[:-1], None)
    pure = getattr(packet, schema.overload_name or "default", None)
    target = node.args[0]
    if pure is None or not isinstance(target, fx.Node):
        return None
    memory = Memory(graph)
    if not _is_private(memory, node, target):
        return None
    options: Any = node.kwargs
    result = add_call(graph, pure, *node.args, name=schema.name.removeprefix("aten::"), like=node, **options)
    if result.meta["val"].dtype != target.meta["val"].dtype:  # only the overwriting form keeps the type
        graph.erase_node(result)
        return None
    later = [user for user in target.users if memory.order.get(user, -1) > memory.order[node]]
    for user in later:
        user.replace_input_with(target, result)
    return result


def _is_private(memory: Memory, node: fx.Node, target: fx.Node) -> bool:
    """Whether what `node` writes into `target` is seen through `target` and `node` alone, and what is made of them."""
    older = [n for n in memory.sharing(target) if n is not target and memory.order[n] < memory.order[node]]
    read_later = any(memory.order[user] > memory.order[node] for n in older for user in n.users)
    return not memory.is_seen_outside(target) and not read_later
