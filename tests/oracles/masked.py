"""Training with masks: every token runs through every block, full attention maps are kept, idle tokens are put back.

Written from the definition, without a look at the passes; shapes: B images, N tokens, H heads, D head width.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.oracles import reference


class Result(NamedTuple):
    """What the model returns, the token cut loss, and who worked in each block (B, P + K)."""

    output: Any
    cut_loss: Tensor
    selected: dict[int, Tensor]


class Masked(TorchFunctionMode):
    """Hides idle tokens from every attention run inside it, and collects scaled logits (B, H, N, N)."""

    def __init__(self, works: Tensor) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self.hidden = ~works[:, None, None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            self.logits.append(scale * (q @ k.transpose(-2, -1)))
            added = torch.zeros(self.logits[-1].shape, dtype=q.dtype).masked_fill(self.hidden, -torch.inf)
            given = kwargs.get("attn_mask")
            if given is not None:
                added = added.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else added + given
            return func(*args, **kwargs | {"attn_mask": added})
        if func in reference.SOFTMAXES and args[0].ndim == 4:
            self.logits.append(args[0])
            return func(args[0].masked_fill(self.hidden, -torch.inf), *args[1:], **kwargs)
        return func(*args, **kwargs)


def token_cut_loss(logits: Tensor, works: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """The definition, from the scaled logits (B, H, N, N) of one block and who works (B, N)."""
    weights = logits.mean(1).softmax(-1)
    m = works.to(weights.dtype)
    to_working = (weights * m[:, None]).sum(-1)
    to_prefix = weights[:, :, list(prefix)].sum(-1)
    return (m * 2 * (1 - to_working) ** 2 + (1 - m) * (to_working - to_prefix) ** 2).mean()


def run(
    model: nn.Module, plan: Mapping[int, int], inputs: Tensor, *, prefix: int, class_position: int | None
) -> Result:
    """Runs a timm model whose blocks of the plan keep so many image tokens."""
    losses: list[Tensor] = []
    selected: dict[int, Tensor] = {}

    def masked(index: int, block: nn.Module) -> Any:
        dense = block.forward

        def forward(x: Tensor, *context: Any, **named: Any) -> Tensor:
            with torch.no_grad(), reference.AttentionInputs() as seen:
                dense(x, *context, **named)
            q, k = (torch.cat(parts, 1) for parts in zip(*seen.found, strict=True))
            scores = reference.attention_scores(q, k, prefix, class_position)
            selected[index], margin = reference.choose(scores, plan[index], prefix)
            assert margin > 1e-9, "rounding decides what is kept here: take another seed"
            works = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, selected[index], True)
            with Masked(works) as attention:
                worked = dense(x, *context, **named)
            losses.append(token_cut_loss(torch.cat(attention.logits, 1), works, tuple(range(prefix))))
            return torch.where(works[..., None], worked, x)

        return forward

    with ExitStack() as stack:
        for index in plan:
            block = model.blocks[index]
            stack.enter_context(patch.object(block, "forward", masked(index, block)))
        output = model(inputs)
    return Result(output, torch.stack(losses).mean(), selected)
