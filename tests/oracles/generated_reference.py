"""Token idling of the models in `generated`, in eager PyTorch: idle tokens are hidden as keys and keep their value.

Every token runs through every block, so nothing is gathered and no position is ever looked up anew: a working
token attends to the working tokens, at the places where they always stood, and an idle one is put back as it was.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.generated.attention import Attention
from tests.models.generated.block import Block
from tests.models.generated.config import MULTIHEAD, TOKENS_BEFORE_HEADS
from tests.models.generated.vit import ViT


class Result(NamedTuple):
    """What the model returns, the positions that worked in each block, the narrowest choice.

    Shapes:
        selected: (B, P + K) for each idling block.
        margin: distance between the last score kept and the first one left, in standard deviations.
    """

    output: Any
    selected: dict[int, Tensor]
    margin: float


def heads_of(attention: Attention, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D) of tokens (B, N, C)."""
    if attention.config.core in MULTIHEAD:
        inner = attention.attention
        inputs = (x, x, x) if positions is None else (x + positions, x + positions, x)
        parts = zip(inputs, inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3), strict=True)
        flat = [F.linear(given, weight, bias) for given, weight, bias in parts]
        return tuple(y.view(*y.shape[:2], inner.num_heads, -1).transpose(1, 2) for y in flat)
    q, k, v = attention.project(x, positions)
    if attention.config.core in TOKENS_BEFORE_HEADS:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    each = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)


def attend(
    attention: Attention,
    x: Tensor,
    positions: Tensor | None,
    valid: Tensor | None,
    works: Tensor,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention among the working tokens (B, N), with the queries and keys of all (B, H, N, D).

    Where `sizes` (B, N) says so, a key counts as that many equal ones do: its weight is a multiple, so that the
    logarithm is added to what the softmax takes, behind everything else that makes up a logit.
    """
    first = attention.config.tokens_first
    x, positions = (y.transpose(0, 1) if first and y is not None else y for y in (x, positions))
    q, k, v = heads_of(attention, x, positions)
    scale = attention.temperature.exp() if attention.config.scale.startswith("learned") else attention.scale
    logits = q @ k.transpose(-2, -1) * scale
    bias, seen = attention.bias(), attention.seen_keys(x.shape[1], valid)
    logits = attention.talk(logits if bias is None else logits + bias, attention.before)
    logits = logits if attention.added is None else logits + attention.added
    logits = logits if sizes is None else logits + sizes.clamp(min=1).log().to(logits.dtype)[:, None, None]
    # Idle tokens see themselves too, so that their rows, which nobody reads, stay finite.
    alone = torch.eye(x.shape[1], dtype=torch.bool)
    working = works[:, None, None] | alone
    seen = working if seen is None else working & seen
    weights = attention.talk(logits.masked_fill(~seen, -math.inf).softmax(-1), attention.after)
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = attention.attention.out_proj(out) if attention.config.core in MULTIHEAD else attention.out(out)
    return (out.transpose(0, 1) if first else out), q, k


def attention_scores(q: Tensor, k: Tensor, prefix: tuple[int, ...], class_position: int | None) -> Tensor:
    """Mean over heads of the logit each token receives from the class query or the mean image query, (B, N)."""
    image = [p for p in range(q.shape[2]) if p not in prefix]
    query = q[:, :, image].mean(2) if class_position is None else q[:, :, class_position]
    return (query[:, :, None] * k).sum(-1).mean(1)


def choose(scores: Tensor, kept: int, prefix: tuple[int, ...]) -> tuple[Tensor, float]:
    """Who works (B, N): the prefix and the best image tokens, the lower position first; and the margin."""
    image = torch.tensor([p for p in range(scores.shape[1]) if p not in prefix])
    ordered, order = scores[:, image].sort(dim=1, descending=True, stable=True)
    works = torch.zeros_like(scores, dtype=torch.bool)
    works[:, list(prefix)] = True
    works.scatter_(1, image[order[:, :kept]], True)
    if kept == len(image):
        return works, math.inf
    margin = (ordered[:, kept - 1] - ordered[:, kept]) / ordered.std(dim=1)
    return works, margin.min().item()


def run_block(
    block: Block, x: Tensor, context: tuple[Tensor | None, ...], works: Tensor, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The block among the working tokens (B, N), with queries and keys of all its attention (B, H, N, D)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def forward(attention: Attention) -> Callable[..., Tensor]:
        def forward_working(y: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
            out, q, k = attend(attention, y, positions, valid, works, sizes)
            seen.append((q, k))
            return out

        return forward_working

    with ExitStack() as stack:
        for attention in block.attentions:
            stack.enter_context(patch.object(attention, "forward", forward(attention)))
        out = block(x.clone(), *context)
    queries, keys = zip(*seen, strict=True)
    return out, torch.cat(queries, 1), torch.cat(keys, 1)


def run(model: ViT, plan: Mapping[int, int], inputs: tuple[Any, ...], *, gradients: bool = False) -> Result:
    """Run the model with the blocks of the plan keeping so many image tokens."""
    config, selected, margins = model.config, {}, []

    def through(index: int, x: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
        block, prefix, first = model.blocks[index], config.prefix_at(index), config.tokens_first
        if index not in plan:
            return block(x, *context)
        everyone = torch.ones(x.shape[:2][::-1] if first else x.shape[:2], dtype=torch.bool)
        _, q, k = run_block(block, x, context, everyone)
        scores = attention_scores(q, k, prefix, config.class_at(index)).detach()
        works, margin = choose(scores, plan[index], prefix)
        selected[index] = works.nonzero()[:, 1].view(len(works), -1)
        margins.append(margin)
        worked, *_ = run_block(block, x, context, works)
        return torch.where((works.t() if first else works)[..., None], worked, x)

    with patch.object(model, "through", through), torch.set_grad_enabled(gradients):
        output = model(*inputs)
    return Result(output, selected, min(margins, default=math.inf))
