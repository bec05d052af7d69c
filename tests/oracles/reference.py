"""Token idling in eager PyTorch on the model's own modules: what every conversion is compared with."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
SOFTMAXES = (torch.softmax, torch.Tensor.softmax, F.softmax)

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class Result(NamedTuple):
    """What the model returns, the positions that worked in each block, the narrowest choice.

    Shapes:
        selected: (B, P + K) for each idling block.
        margin: distance between the last score kept and the first one left, in standard deviations.
    """

    output: Any
    selected: dict[int, Tensor]
    margin: float


class AttentionInputs(TorchFunctionMode):
    """Collects queries and keys of every attention run inside it, fused or written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.found.append((args[0], args[1]))
        elif func in MATMULS:
            self._products.append((result, args[0], args[1]))
        elif func in SOFTMAXES:
            self.found += [(q, k.transpose(-2, -1)) for product, q, k in self._products if product is args[0]]
        return result


def kept_tokens(keep: float, tokens: int) -> int:
    return max(1, math.floor(keep * tokens + 1e-9))


def schedule_plan(
    layers: Sequence[int], keep: float | Sequence[float], schedule: str, tokens: int, depth: int
) -> dict[int, int]:
    """Kept image tokens of every block that idles."""
    if schedule == "blocks":
        keeps = [keep] * len(layers) if isinstance(keep, float) else keep
        return {block: kept_tokens(ratio, tokens) for block, ratio in zip(layers, keeps, strict=True)}
    keeps = [keep ** (stage + 1) for stage in range(len(layers))] if isinstance(keep, float) else keep
    ends = [*layers[1:], depth]
    return {
        block: kept_tokens(ratio, tokens)
        for start, end, ratio in zip(layers, ends, keeps, strict=True)
        for block in range(start, end)
    }


def attention_scores(q: Tensor, k: Tensor, prefix: int, class_position: int | None) -> Tensor:
    """Mean over heads of the logit each token receives from the class query or the mean image query.

    Shapes:
        q, k: (B, H, N, D); returns (B, N).
    """
    query = q[:, :, prefix:].mean(2) if class_position is None else q[:, :, class_position]
    return (query[:, :, None] * k).sum(-1).mean(1)


def choose(scores: Tensor, kept: int, prefix: int) -> tuple[Tensor, float]:
    """The prefix and the best image tokens in ascending order, with the margin of the choice.

    Shapes:
        scores: (B, N); returns (B, prefix + kept).
    """
    image = scores[:, prefix:]
    ordered, order = image.sort(dim=1, descending=True, stable=True)
    best = order[:, :kept].sort(dim=1).values + prefix
    always = torch.arange(prefix).expand(len(scores), -1)
    if kept == image.shape[1]:
        return torch.cat([always, best], 1), math.inf
    margin = (ordered[:, kept - 1] - ordered[:, kept]) / image.std(dim=1)
    return torch.cat([always, best], 1), margin.min().item()


def idling(
    block: nn.Module, kept: int, prefix: int, score: Score, report: Callable[[Tensor, float], None]
) -> Callable[[Tensor], Tensor]:
    """The forward of a block in which all but the chosen tokens idle."""
    dense = block.forward

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad(), AttentionInputs() as attention:
            dense(x)
        queries, keys = zip(*attention.found, strict=True)
        selected, margin = choose(score(x, torch.cat(queries, 1), torch.cat(keys, 1)), kept, prefix)
        report(selected, margin)
        index = selected[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, dense(x.gather(1, index)))

    return forward


def run(
    model: nn.Module,
    plan: Mapping[int, int],
    inputs: Tensor,
    *,
    prefix: int,
    class_position: int | None,
    score: Score | None = None,
) -> Result:
    """Runs the model with the blocks of the plan idling; `score(x, q, k)` replaces the attention logits."""
    selected: dict[int, Tensor] = {}
    margins: list[float] = []

    def attention(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_scores(q, k, prefix, class_position)

    def reporter(index: int) -> Callable[[Tensor, float], None]:
        def report(choice: Tensor, margin: float) -> None:
            selected[index] = choice
            margins.append(margin)

        return report

    with ExitStack() as stack:
        for index, kept in plan.items():
            block = model.blocks[index]
            forward = idling(block, kept, prefix, score or attention, reporter(index))
            stack.enter_context(patch.object(block, "forward", forward))
        output = model(inputs)
    return Result(output, selected, min(margins, default=math.inf))
