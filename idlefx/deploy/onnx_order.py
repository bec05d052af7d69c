"""Leave resting tokens in the order of the choice from block to block, for runtimes of ONNX.

There moving rows costs as much as a norm. A block that puts its tokens back where they stood sorts, turns the order
around and moves every row; one that leaves them in front of those that rest moves the latter alone. Blocks do not care,
as scores, norms and attention do not ask where a token stands, so the tokens go back when something else reads them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from idlefx.deploy.onnx_rows import rows, turned
from idlefx.graph.notes import layer_of
from idlefx.graph.queries import argument, tensor_argument
from idlefx.graph.sizes import shape_of
from idlefx.runtime import gather_scatter, ops

aten = torch.ops.aten


@dataclass(frozen=True)
class _Choice:
    """A block whose tokens rest.

    Attributes:
        scores: Of all tokens, up to a factor.
        leading: P, how many prefix tokens there are, which lead.
        working: P + K.
        take: Where the tokens that work are taken out of the stream.
        put: Where they are put back.
        norms: What else reads the stream, for the scores alone and token by token; None if something reads more.
    """

    scores: fx.Node
    leading: int
    working: int
    take: fx.Node
    put: fx.Node
    norms: Sequence[fx.Node] | None

    @property
    def stream(self) -> fx.Node:
        """All tokens."""
        return tensor_argument(self.put, 0)


def leave_in_order(graph: fx.Graph) -> None:
    """Rewrite the blocks whose choice nothing reads but they themselves."""
    puts = graph.find_nodes(op="call_function", target=gather_scatter.put_tokens)
    choices = [choice for put in puts if (choice := _choice_of(put)) is not None]
    content = {
        (choice.stream, reader)
        for choice in choices
        if choice.norms is not None
        for reader in (choice.take, choice.put, *choice.norms)
    }
    standing = dict[fx.Node, fx.Node]()  # where the tokens of a stream stood at first
    for choice in choices:
        stream, put, moved = choice.stream, choice.put, standing.get(choice.stream)
        with graph.inserting_before(choice.take):
            order = graph.call_function(_ranking, (choice.scores, choice.leading))
            standing[put] = order if moved is None else graph.call_function(aten.gather.default, (moved, 1, order))
        choice.take.target, choice.take.args = _take_first, (stream, order, choice.working)
        put.target, put.args = _put_in_front, (stream, order, tensor_argument(put, 2))
        if others := [user for user in put.users if (put, user) not in content]:
            with graph.inserting_after(put):
                restored = graph.call_function(_in_place, (put, standing[put]))
            put.replace_all_uses_with(restored, others.__contains__)


def _choice_of(put: fx.Node) -> _Choice | None:
    stream, index, _, dim, batch_dim, place = _arguments(put)
    if (dim, batch_dim, len(shape_of(put))) != (1, 0, 3):
        return None
    takes = [user for user in index.users if user is not put]
    scores, prefix, kept, *among = _arguments(tensor_argument(index, 0))
    alone = [take.args for take in takes] == [(stream, index, 1, 0)] and set(place.users) == {put}
    if among or not alone or not ops.leads(prefix) or takes[0].target is not gather_scatter.take_tokens:
        return None
    return _Choice(_unscaled(scores), len(prefix), len(prefix) + kept, takes[0], put, _norms(scores, stream))


def _arguments(node: fx.Node) -> Any:
    return node.args


def _unscaled(scores: fx.Node) -> fx.Node:
    """Scores that order alike."""
    if scores.target is ops.mean_over_heads and len(sums := argument(scores, 0)) == 1:
        only: fx.Node = sums[0]
        return only
    return scores


def _norms(scores: fx.Node, stream: fx.Node) -> Sequence[fx.Node] | None:
    """What reads the stream for scores of each token by itself, if all that the scores are made of does."""
    sums = argument(scores, 0) if scores.target is ops.mean_over_heads else [scores]
    readers = list[fx.Node]()
    for each in sums:
        if each.target is not ops.score_tokens:
            return None
        tokens = tensor_argument(each, 0)
        if tokens is stream:
            readers.append(each)
        elif _is_norm(tokens) and tokens.args[0] is stream and set(tokens.users) <= set(sums):
            readers.append(tokens)
        else:
            return None
    return readers


def _is_norm(node: fx.Node) -> bool:
    """Whether it norms each token."""
    layer = layer_of(node)
    if layer is not None:
        return layer.kind == "LayerNorm" and len(layer.settings[0]) == 1
    return node.target is aten.layer_norm.default and len(argument(node, 1)) == 1


def _ranking(scores: Tensor, leading: int) -> Tensor:
    """Places of the tokens in the order of falling scores, the leading ones first (B, N)."""
    count = scores.shape[1]
    first = torch.arange(count, device=scores.device) < leading
    return scores.masked_fill(first, math.inf).topk(count, dim=1).indices


def _take_first(stream: Tensor, order: Tensor, working: int) -> Tensor:
    """The first tokens of an order (B, W, C)."""
    return rows(stream, order.narrow(1, 0, working))


def _put_in_front(stream: Tensor, order: Tensor, worked: Tensor) -> Tensor:
    """The tokens that worked, and behind them those that did not, in that order (B, N, C)."""
    working = worked.shape[1]
    idle = rows(stream, order.narrow(1, working, order.shape[1] - working))
    return torch.cat([worked.to(stream.dtype), idle], 1)


def _in_place(stream: Tensor, standing: Tensor) -> Tensor:
    """Tokens where they stood at first, of those that stood at `standing` (B, N)."""
    return rows(stream, turned(standing))
