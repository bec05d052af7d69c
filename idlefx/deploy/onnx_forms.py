"""What idlefx adds to a graph, in forms that runtimes of ONNX are quick at.

They take what the functions of `idlefx.runtime` take that they stand for, and choose the same tokens. A position in a
batch of images is one in all of its rows: a runtime copies rows as a whole, and nothing is scattered. Equal scores go
to the lower position, as `TopK` of ONNX has it.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import layer_norm, linear

from idlefx.deploy import onnx_groups
from idlefx.deploy.onnx_order import leave_in_order
from idlefx.deploy.onnx_rows import parted, rows
from idlefx.deploy.onnx_weights import multiplied
from idlefx.graph.queries import argument, remove_dead, tensor_argument
from idlefx.runtime import following, gather_scatter, ops

aten = torch.ops.aten


def in_onnx_forms(program: fx.GraphModule) -> fx.GraphModule:
    """A program that computes the same in these forms; the one that is given stays as it is."""
    module = fx.GraphModule(program, deepcopy(program.graph), "Program")
    graph = module.graph
    leave_in_order(graph)
    for node in graph.find_nodes(op="call_function", target=aten.matmul.default):
        if tensor_argument(node, 0).target is ops.norm_linear:
            query, keys = tensor_argument(node, 0), tensor_argument(node, 1)
            given: list[Any] = list(query.args[1:])
            node.target = _direction
            node.args = (_whole(query), *given[:-2], *multiplied(node, keys, *given[-2:]))
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if _is_plain(node):
            query, key, value = (tensor_argument(node, place) for place in range(3))
            told = {"mask": argument(node, 3, "attn_mask"), "scale": argument(node, 6, "scale")}
            node.target, node.args, node.kwargs = _attend, (query, key, value), told
    for node in graph.nodes:
        node.target = FORMS.get(node.target, node.target)
    remove_dead(graph)
    module.recompile()
    return module


def _whole(query: fx.Node) -> list[fx.Node]:
    """What the tokens of a query are the sum of: the sum itself, where it is there already."""
    addends: Any = query.args[0]
    sums = [user for user in addends[0].users if user.target is aten.add.Tensor and list(user.args) == list(addends)]
    return sums[:1] if sums and sums[0] < query and not sums[0].kwargs else addends


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention whose logits a runtime makes in one product, transposed and scaled."""
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = query @ key.mT
    return (logits if mask is None else logits + mask).softmax(-1) @ value


def _is_plain(attention: fx.Node) -> bool:
    """Whether it is one that `_attend` can spell."""
    mask = argument(attention, 3, "attn_mask")
    unmasked = mask is None or mask.meta["val"].dtype.is_floating_point
    others = ((4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
    return unmasked and not any(argument(attention, place, name) for place, name in others)


def _direction(
    addends: list[Tensor],
    position: int,
    dim: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    """`ops.norm_linear` and the product with the weight of the keys, if the other weights do not hold it already."""
    x = reduce(add, (part.select(dim, position) for part in addends))
    token = layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    if keys is not None:
        weight, bias = keys.t() @ weight, None if bias is None else bias @ keys
    return linear(token, weight, bias)


def _score_tokens(tokens: Tensor, direction: Tensor) -> Tensor:
    """See `ops.score_tokens`."""
    precision = torch.promote_types(tokens.dtype, torch.float32)
    return (tokens.to(precision) @ direction.to(precision).unsqueeze(2)).squeeze(2)


def _choose_tokens(
    scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.choose_tokens`; a token that idles stands behind the working ones by its position."""
    if among is not None:
        scores = ops.rank_among(scores, among).to(torch.float32)
    working, positions = len(prefix) + kept, torch.arange(scores.shape[1], device=scores.device)
    best = scores.masked_fill(ops.are_prefix(positions, prefix), math.inf).topk(scores.shape[1], dim=1).indices
    order, place = parted(best, positions >= working, working)
    return order.narrow(1, 0, working), place


def _take_tokens(x: Tensor, index: Tensor, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """See `gather_scatter.take_tokens`."""
    if (dim, batch_dim, x.ndim) != (1, 0, 3):
        return gather_scatter.take_tokens(x, index, dim, batch_dim)
    return rows(x, index)


def _put_tokens(
    x: Tensor, index: Tensor, tokens: Tensor, dim: int = 1, batch_dim: int = 0, place: Tensor | None = None
) -> Tensor:
    """See `gather_scatter.put_tokens`."""
    if (dim, batch_dim, x.ndim) != (1, 0, 3) or place is None:
        return gather_scatter.put_tokens(x, index, tokens, dim, batch_dim, place)
    working = index.shape[1]
    place = torch.where(place < working, place, torch.arange(x.shape[1], device=x.device) + working)
    return rows(torch.cat([tokens.to(x.dtype), x], 1), place)


FORMS: dict[Any, Callable[..., Any]] = {
    ops.choose_tokens: _choose_tokens,
    ops.score_tokens: _score_tokens,
    gather_scatter.take_tokens: _take_tokens,
    gather_scatter.put_tokens: _put_tokens,
    following.group_tokens: onnx_groups.group_tokens,
    following.average_groups: onnx_groups.average_groups,
    following.restore_tokens: onnx_groups.restore_tokens,
}
