"""Give the model a second output: the token cut loss, averaged over the idling blocks.

1. A step that idles gets its token cut loss, made of queries and keys of all tokens. The mean over heads of their
   products is one product over the features of all heads.
2. Where both are affine, `<W_q x + b_q, W_k y>` is `<W_kᵀ (W_q x + b_q), y>` up to what all y have in common, which the
   softmax takes away: one projection instead of two, and the keys are the normalised input itself.
3. Elsewhere queries and keys are computed as for a score; what the score has computed already is used again.
4. The logits have the attention's own scale, learned ones too. Biases, masks and the mixing of heads are left out.
5. The output becomes `(output, cut_loss)`. Where nothing idles, the loss is zero.
"""

from typing import Any

import torch
from torch import fx

from idlefx.analysis.attention import Core
from idlefx.analysis.blocks import open_blocks
from idlefx.analysis.image_input import image_input
from idlefx.graph.build import add_call, return_too
from idlefx.graph.notes import only_made_for
from idlefx.graph.queries import output_of
from idlefx.records import Plan
from idlefx.rewriting.selector_head import Head
from idlefx.runtime import cut_loss

aten = torch.ops.aten


def add_cut_loss(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Insert the losses of the plan's blocks; their heads must be there (`select`), and the blocks still be dense."""
    graph = module.graph
    found = []
    blocks = [plan.blocks[step.block] for step in plan if step.idles]
    for block, opened in zip(blocks, open_blocks(graph, blocks), strict=True):
        index = only_made_for(graph, block.index, "index")
        with graph.inserting_before(opened.exit):
            head = Head(graph, block, opened)
            pairs = [_pair(head, core, block.affine and not core.scalings) for core in opened.cores]
            queries, keys = (_joined(head, list(parts)) for parts in zip(*pairs, strict=True))
            given = (queries, keys, index, block.prefix)
            found.append(head.add(cut_loss.token_cut, *given, name="cut", role="cut loss"))
    _return_too(graph, found)
    return module


def _pair(head: Head, core: Core, affine: bool) -> tuple[fx.Node, fx.Node]:
    """What stands for the queries and keys of a core (B, N, F) in the mean over all heads."""
    if not affine:
        queries, keys = (head.heads_of(core, head.all_tokens, keys=keys) for keys in (False, True))
        queries = head.add(aten.mul.Tensor, queries, core.scale / head.head_count, name="cut_scaled", role="cut loss")
        return _flat(head, head.scaled(core, queries, "cut loss")), _flat(head, keys)
    query, key = head.projections(core)
    scale = core.scale * query.factor * key.factor / head.head_count
    (_, to_query, bias), (_, to_key, _) = head.weights(query), head.weights(key)
    to_key = head.add(aten.mul.Tensor, to_key, scale, name="cut_scaled", role="cut loss")
    back = head.add(aten.t.default, to_key, name="cut_back", role="cut loss")
    both = head.add(aten.matmul.default, back, to_query, name="cut_weight", role="cut loss")
    shift = bias and head.add(aten.mv.default, back, bias, name="cut_bias", role="cut loss")
    queries = head.add(aten.linear.default, head.tokens(query), both, shift, name="cut_queries", role="cut loss")
    return queries, head.tokens(key)


def _flat(head: Head, heads: fx.Node) -> fx.Node:
    """(B, H, N, D) as (B, N, H * D)."""
    rows = head.add(aten.transpose.int, heads, 1, 2, name="cut_rows", role="cut loss")
    return head.add(aten.flatten.using_ints, rows, 2, name="cut_rows", role="cut loss")


def _joined(head: Head, parts: list[fx.Node]) -> fx.Node:
    return parts[0] if len(parts) == 1 else head.add(aten.cat.default, parts, 2, name="cut_joined", role="cut loss")


def _return_too(graph: fx.Graph, found: list[fx.Node]) -> None:
    like: Any = found[-1] if found else image_input(graph)
    with graph.inserting_before(output_of(graph)):
        if found:
            blocks = add_call(graph, aten.stack.default, found, name="cut_losses", like=like)
            loss = add_call(graph, aten.mean.default, blocks, name="cut_loss", like=like)
        else:
            loss = add_call(graph, aten.new_zeros.default, like, [], name="cut_loss", like=like)
    return_too(graph, loss)
