"""Tokens that follow in any model whose blocks are modules with a stream of tokens, by its attention calls."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from idlefx.zoo.reference.attention import SegmentAttention
from idlefx.zoo.reference.first_norm import first_norm
from idlefx.zoo.reference.groups import (
    Groups,
    Passage,
    Result,
    Stage,
    by_slot,
    class_attention,
    group,
    group_in_segments,
    group_in_windows,
    join,
)
from idlefx.zoo.reference.looking import Tokens, laid_out, tokens_first
from idlefx.zoo.reference.windows import NOBODY, Slots, WindowAttention, find_slots


class Stream:
    """The residual stream among the inputs or outputs of a block: the first tensor of the shape, or of the rank.

    Args:
        values: The inputs or outputs.
        tokens: Where the tokens stand: in one dimension or those of a grid, and in how many entries of the batch.
        shape: That of the stream, if it is known.
    """

    def __init__(self, values: Any, tokens: Tokens, shape: torch.Size | None = None) -> None:
        dims = tokens.dims
        rank = 2 + len(dims)
        self._leaves, self._structure = tree_flatten(values)
        self._place = next(
            place
            for place, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and (leaf.ndim == rank if shape is None else leaf.shape == shape)
        )
        self._dims, self._joined, self._like = dims, tokens.joined, self._leaves[self._place]
        self.shape: torch.Size = self._like.shape

    @property
    def value(self) -> Tensor:
        """The stream as (B, N, C)."""
        entries = tokens_first(self._like, self._dims)
        return entries.reshape(entries.shape[0] // self._joined, -1, entries.shape[2])

    def replaced(self, tokens: Tensor) -> Any:
        """The inputs or outputs with another stream, given as (B, N, C)."""
        leaves = list(self._leaves)
        entries = tokens if self._joined == 1 else tokens.reshape(self._like.shape[0], -1, tokens.shape[2])
        leaves[self._place] = laid_out(entries, self._like, self._dims)
        return tree_unflatten(leaves, self._structure)


@torch.no_grad()
def run(
    model: nn.Module,
    paths: Sequence[str],
    plan: Sequence[Stage],
    tokens: Mapping[str, Tokens],
    call: Callable[[], Any],
) -> Result:
    """Run a model with tokens following.

    Args:
        model: The dense model.
        paths: Module paths of its blocks, in order.
        plan: The stages, by positions in `paths`; blocks outside them run on all tokens.
        tokens: Prefix and class token of each block, by path.
        call: Runs the model.

    Raises:
        ValueError: Something writes the stream inside a stage, or a block opens one and runs no known attention.
    """
    groups: dict[int, Groups] = {}
    passages: list[Passage] = []  # the one under way is the last
    with ExitStack() as stack:
        for stage in plan:
            blocks = [model.get_submodule(path) for path in paths[stage.first : stage.end]]
            forwards = _following(blocks, stage, tokens[paths[stage.first]], groups, passages)
            for block, forward in zip(blocks, forwards, strict=True):
                stack.enter_context(patch.object(block, "forward", forward))
        output = call()
    return Result(output, groups)


def _following(
    blocks: Sequence[nn.Module], stage: Stage, tokens: Tokens, groups: dict[int, Groups], passages: list[Passage]
) -> list[Callable[..., Any]]:
    """What the blocks of one stage do instead."""

    def forward_of(dense: Callable[..., Any], opens: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entry = Stream((args, kwargs), tokens)
            x = entry.value
            slots = _slots(dense, entry) if tokens.unit else []
            if opens:
                before = passages[-1] if stage.joins else None
                grouped = _grouped(dense, entry, stage, tokens, before, slots)
                passages.append(Passage(grouped, x))
                groups[stage.first] = by_slot(grouped, slots[0].table) if tokens.inside else grouped
            if stage.kept == x.shape[1] - len(tokens.prefix):
                return dense(*args, **kwargs)
            exits: list[Stream] = []

            def block(stream: Tensor, sizes: Tensor) -> Tensor:
                moved, named = entry.replaced(stream)
                weighs = WindowAttention([sizes.flatten()[each.tokens].log() for each in slots])
                segments = tokens.segments or tuple(x.shape[1:2])
                with weighs if slots else SegmentAttention(x.shape[0], segments, sizes):
                    exits.append(Stream(dense(*moved, **named), tokens, entry.shape))
                return exits[0].value

            restored = passages[-1].through(x, block)
            return exits[0].replaced(restored)

        return forward

    return [forward_of(block.forward, place == 0) for place, block in enumerate(blocks)]


def _slots(dense: Callable[..., Any], entry: Stream) -> list[Slots]:
    """Which token stands in which slot, for each attention of a block."""

    def run(stream: Tensor) -> Any:
        args, kwargs = entry.replaced(stream)
        return dense(*args, **kwargs)

    found = find_slots(run, entry.value, (1,))
    if not found or any(not torch.equal(each.table, found[0].table) for each in found):
        raise ValueError("the block runs no attention over windows that the reference recognises")
    if (found[0].tokens == NOBODY).any():
        raise ValueError("the windows of the block are padded")
    return found


def _grouped(
    dense: Callable[..., Any],
    entry: Stream,
    stage: Stage,
    tokens: Tokens,
    before: Passage | None,
    slots: Sequence[Slots],
) -> Groups:
    """The grouping that a block begins with; where it joins groups, of what they are by then."""
    x = entry.value if before is None else before.stream
    args, kwargs = entry.replaced(x)  # as they were
    normalised = first_norm(x, lambda: dense(*args, **kwargs))
    if slots:
        windows = slots[0].table
        return group_in_windows(
            x if normalised is None else normalised, windows, stage.kept * x.shape[0] // len(windows)
        )
    if tokens.segments:
        likeness = x if normalised is None else normalised
        joined = None if before is None else before.groups
        return group_in_segments(likeness, tokens.segments, stage.parts, joined)
    with SegmentAttention(x.shape[0], tuple(x.shape[1:2])) as attention:
        dense(*args, **kwargs)
    (cores,) = attention.by_segment
    received = class_attention(cores, tokens.class_token)
    evidence = (x if normalised is None else normalised, received, stage.kept, tokens.prefix)
    return group(*evidence) if before is None else join(before.groups, *evidence)
