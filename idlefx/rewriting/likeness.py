"""Build what tokens are grouped by: the tokens as the attention sees them, and what the class token makes of them."""

import torch
from torch import fx

from idlefx.graph.queries import region
from idlefx.rewriting.selector_head import Head
from idlefx.runtime import ops

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.addmm.default, aten.mm.default)
_STATISTICS = (
    aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim, aten.var.correction, aten.var.dim,
    aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.std.correction, aten.std.dim,
)  # fmt: skip


def normalised_input(head: Head) -> fx.Node:
    """What the attention projects, if a norm in front of it made that of the stream; else the stream (B, N, C).

    A norm is any statistic over features, whether it is one operation or spelled out.
    """
    entry, first = head.opened.entry, head.opened.cores[0].query
    chain = [node for node in head.opened.dominators(first) if node is not entry]
    product = next((node for node in reversed(chain) if node.target in _PRODUCTS), None)
    norm = product.args[0] if product is not None else entry
    assert isinstance(norm, fx.Node)
    between = region(head.opened.flow, entry, norm) if norm is not entry else []
    normalised = any(node.target in _STATISTICS for node in between)
    same = norm in head.walk and head.walk[norm] == head.walk[entry]
    stream = head.all_tokens(norm) if normalised and same else entry
    return head.tokens_first(stream)


def class_logits(head: Head) -> fx.Node | None:
    """Logits of the class token on all tokens (B, N), the mean over heads, scaled as in their attention.

    They are right up to a constant. None where there is no class token.
    """
    if head.block.class_token is None:
        return None
    sums = []
    for core in head.opened.cores:
        if head.block.affine and not core.scalings:
            query, key = head.projections(core)
            total, factor = head.sum_over_heads(core, "class"), core.scale * query.factor * key.factor
        else:
            one, keys = head.scaled(core, head.class_query(core)), head.heads_of(core, head.all_tokens, keys=True)
            total, factor = head.add(ops.sum_over_heads, one, keys, name="sums"), core.scale
        sums.append(head.add(aten.mul.Tensor, total, factor, name="scaled"))
    return head.add(ops.mean_over_heads, sums, head.head_count, name="logits")
