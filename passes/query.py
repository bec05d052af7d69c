"""Shorten the way to the class token's query, for which the choice of tokens waits.

1. The linear layer of a query takes over the norm in front of it and the sum that makes the class token: on a GPU one
   kernel, which need not wait until the other tokens are added up or put back.
2. Leading prefix tokens lead among the worked tokens too, and nobody follows them: other slices of them are taken
   there.
"""

import torch
from torch import fx

from idlefx.graph.build import add_call
from idlefx.graph.notes import made_for, note_of
from idlefx.graph.queries import argument, remove_dead, tensor_argument
from idlefx.graph.sizes import shape_of
from idlefx.records import Block, Plan
from idlefx.runtime import ops

aten = torch.ops.aten


def shorten_query(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite what the heads of the plan's blocks read; those blocks must idle already (`idle`, `follow`)."""
    graph = module.graph
    blocks = [plan.blocks[step.block] for step in plan if step.idles]
    scatters = {scatter: block for block in blocks for scatter in made_for(graph, block.index, "scatter")}
    leading = {scatter: block.leading for scatter, block in scatters.items()}
    for block in blocks:
        for query in made_for(graph, block.index, "query"):
            _take_over(query, leading)
    remove_dead(graph)
    for scatter, block in reversed(scatters.items()):  # what is put back may have been put together of others
        _read_worked(scatter, block)
    remove_dead(graph)
    return module


def _take_over(linear: fx.Node, leading: dict[fx.Node, int]) -> None:
    squeeze, weight, bias = tensor_argument(linear, 0), argument(linear, 1), argument(linear, 2)
    norm = tensor_argument(squeeze, 0)
    if norm.target is not aten.layer_norm.default or len(argument(norm, 1)) != 1 or len(shape_of(squeeze)) != 2:
        return
    token = tensor_argument(norm, 0)
    cut = _bounds(token)
    if cut is None:
        return
    stream, (dim, position, end) = tensor_argument(token, 0), cut
    if position < leading.get(stream, 0) and _same_type(_worked(stream), stream):
        stream = _worked(stream)
    if end == position + 1:
        linear.target = ops.norm_linear
        addends = list(stream.args) if _is_plain_sum(stream) else [stream]
        norm_weight, norm_bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
        epsilon = argument(norm, 4, "eps", 1e-5)
        linear.args = (addends, position, dim, norm_weight, norm_bias, epsilon, weight, bias)


def _read_worked(scatter: fx.Node, block: Block) -> None:
    """Let who reads leading prefix tokens of the stream read them among the worked tokens."""
    worked = _worked(scatter)
    for user in list(scatter.users):
        cut = _bounds(user)
        if cut is not None and _same_type(worked, scatter):
            dim, start, stop = cut
            if dim == block.token_dim and 0 <= start < stop <= block.leading:
                with user.graph.inserting_before(user):
                    user.replace_all_uses_with(_cut_out(worked, user))


def _worked(scatter: fx.Node) -> fx.Node:
    """The tokens that a block puts back."""
    return tensor_argument(scatter, 2)


def _bounds(node: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and stop of a slice, if it is one and they are plain numbers."""
    if node.target is not aten.slice.Tensor:
        return None
    dim, start, stop = argument(node, 1, "dim", 0), argument(node, 2, "start") or 0, argument(node, 3, "end")
    return (dim, start, stop) if all(isinstance(n, int) for n in (dim, start, stop)) else None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].dtype is b.meta["val"].dtype


def _cut_out(node: fx.Node, like: fx.Node) -> fx.Node:
    """The part of a node that another cuts out; of a sum the sum of the parts, as the whole is then read only once."""

    def cut(part: fx.Node) -> fx.Node:
        return add_call(like.graph, like.target, part, *like.args[1:], name=like.name, like=like, note=note_of(like))

    if not _is_plain_sum(node):
        return cut(node)
    parts = [cut(tensor_argument(node, place)) for place in (0, 1)]
    return add_call(like.graph, node.target, *parts, name=like.name, like=like, note=note_of(like))


def _is_plain_sum(node: fx.Node) -> bool:
    """Whether it is the sum of two tensors like itself."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    kinds = {(tuple(shape_of(n)), n.meta["val"].dtype) for n in (node, *node.all_input_nodes)}
    return len(node.all_input_nodes) == 2 and len(kinds) == 1
