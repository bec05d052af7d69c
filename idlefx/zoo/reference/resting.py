"""Tokens that rest in the user's own eager modules: an independent answer to what a converted model returns.

Nothing here looks at a graph. A block runs on all of its tokens, once to read its queries and keys, once more with
the idle tokens hidden from its attention; then the idle tokens take back what they were. Whatever a block reads by
position, that is what it gives on the working tokens alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from idlefx.zoo.reference.attention import Core, SegmentAttention
from idlefx.zoo.reference.looking import Tokens, laid_out, stream_of, tokens_first
from idlefx.zoo.reference.windows import rested


@dataclass(frozen=True)
class Answer:
    """What the model returns when tokens idle.

    Attributes:
        output: The model's output.
        excess: By how much the best token that was not chosen outscores the worst that was, in standard deviations
            of the scores: 0 where the choice is the published one, a rounding error where scores tie.
    """

    output: Any
    excess: float


def kept_tokens(keep: float, tokens: int) -> int:
    """K of M image tokens."""
    return max(1, math.floor(keep * tokens + 1e-9))


def scores(cores: Sequence[Core], tokens: Tokens) -> Tensor:
    """Mean over heads of the raw logit of the class query, or of the mean image query, on each token.

    Args:
        cores: All attention of a block over these tokens.
        tokens: The tokens.

    Returns:
        Scores (B, N), minus infinity on the prefix.
    """
    q, k = (torch.cat(heads, 1) for heads in list(zip(*cores, strict=True))[:2])
    image = [p for p in range(k.shape[2]) if p not in tokens.prefix]
    query = q[:, :, image].mean(2) if tokens.class_token is None else q[:, :, tokens.class_token]
    found = torch.einsum("bhd,bhnd->bn", query, k) / k.shape[1]
    found[:, list(tokens.prefix)] = -math.inf
    return found


@torch.no_grad()
def idle(
    model: nn.Module,
    keeps: Mapping[str, float],
    tokens: Mapping[str, Tokens],
    chosen: Mapping[str, Tensor],
    call: Callable[[], Any],
) -> Answer:
    """Run the dense model with tokens idling in some blocks.

    Args:
        model: The dense model.
        keeps: Keep ratio of each idling block, by module path.
        tokens: Prefix and class token of each block.
        chosen: Positions (B, n) that work, as another implementation chose them; they are used, so that a tie does
            not count as an error, and held against the published rule.
        call: Runs the model.

    Raises:
        ValueError: A choice misses a prefix token, or has another number of tokens than the rule says.
    """
    excesses: list[float] = []
    with ExitStack() as stack:
        for path, keep in keeps.items():
            block = model.get_submodule(path)
            forward = _idling(block.forward, keep, tokens[path], chosen[path], excesses)
            stack.enter_context(patch.object(block, "forward", forward))
        output = call()
    return Answer(output, max(excesses, default=0.0))


def _idling(
    dense: Callable[..., Any], keep: float, tokens: Tokens, chosen: Tensor, excesses: list[float]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = stream_of((args, kwargs), rank=2 + len(tokens.dims))
        if tokens.unit:

            def run(stream: Tensor) -> Any:
                given = tree_map_only(Tensor, lambda t: stream if t is x else t, (args, kwargs))
                return dense(*given[0], **given[1])

            output, excess = rested(run, x, tokens.dims, keep, chosen, tokens.unit, inside=tokens.inside)
            excesses.append(excess)
            return output
        entries = tokens_first(x, tokens.dims)
        sequence = entries.reshape(entries.shape[0] // tokens.joined, -1, entries.shape[2])
        (batch, count), segments = sequence.shape[:2], tokens.segments or sequence.shape[1:2]
        working = torch.zeros(batch, count, dtype=torch.bool).scatter_(1, chosen, True)
        wanted = [len(tokens.prefix) + kept_tokens(keep, size - len(tokens.prefix)) for size in segments]
        works = [part.sum(1) for part in working.split(segments, 1)]
        right = all((many == few).all() for many, few in zip(works, wanted, strict=True))
        if not right or not working[:, list(tokens.prefix)].all():
            raise ValueError(
                f"{working.sum(1).tolist()} tokens work where {sum(wanted)} should, or a prefix token idles"
            )
        with SegmentAttention(batch, segments) as attention:
            dense(*args, **kwargs)
        for cores, here in zip(attention.by_segment, working.split(segments, 1), strict=True):
            found = scores(cores, tokens)
            spread = found[found > -math.inf].std()
            best = found.masked_fill(here, -math.inf).amax(1)
            worst = found.masked_fill(~here | (found == -math.inf), math.inf).amin(1)
            excesses.append(float(((best - worst) / spread).clamp(min=0).max()))
        with SegmentAttention(batch, segments, working):
            output = dense(*args, **kwargs)
        works_there = working.unsqueeze(2).expand_as(sequence).reshape(entries.shape)
        everywhere = laid_out(works_there, x, tokens.dims)
        put = lambda t: torch.where(everywhere, t, x) if t.shape == x.shape else t  # noqa: E731
        return tree_map_only(Tensor, put, output)

    return forward
