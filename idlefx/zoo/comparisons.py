"""A converted model beside the references: what it returns, and which tokens it chooses or groups."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idlefx.records import BlockTable
from idlefx.runtime.module import IdleModule
from idlefx.runtime.selections import groups, selections
from idlefx.zoo import reference as reference
from idlefx.zoo.entry import Inputs
from idlefx.zoo.reference import following
from idlefx.zoo.reference.groups import Stage

CLEAR = 1e-5  # of cosines; a narrower choice is decided by rounding


@dataclass(frozen=True)
class Comparison:
    """Relative error of the output, and of the choice in standard deviations of the scores."""

    error: float
    excess: float


def worse(a: Comparison, b: Comparison) -> Comparison:
    """The larger error and excess of two comparisons; of what is no number, that."""
    return Comparison(_larger(a.error, b.error), _larger(a.excess, b.excess))


def _larger(a: float, b: float) -> float:
    return b if b != b else max(a, b)


@dataclass(frozen=True)
class FollowingComparison:
    """A model whose tokens follow, beside the reference.

    Attributes:
        error: Largest relative difference of the output; None where nothing could be compared.
        grouped: Whether all tokens follow whom they should.
        ties: Batches that were passed over, as rounding decides in them who follows whom.
        reason: Why the reference has no answer; empty if it has.
    """

    error: float | None
    grouped: bool = True
    ties: int = 0
    reason: str = ""


def compare(model: nn.Module, idle: IdleModule, table: BlockTable, batch: Inputs) -> Comparison:
    """Hold a model whose tokens rest against the reference on one batch.

    Raises:
        ValueError: The converted model lets another number of tokens work than its plan says.
    """

    def call() -> Any:
        return run(model, batch)

    paths = {step.block: table[step.block].path for step in idle.plan if step.idles}
    args, kwargs = _arguments(batch)
    chosen = {paths[block]: index for block, index in selections(idle, *args, **kwargs).items()}
    keeps = {paths[step.block]: step.keep for step in idle.plan if step.idles}
    units = {paths[step.block]: step.unit for step in idle.plan if step.idles}
    tokens = {path: replace(each, unit=units.get(path, "")) for path, each in _tokens(model, table, batch).items()}
    answer = reference.idle(model, keeps, tokens, chosen, call)
    return Comparison(largest_difference(answer.output, run(idle, batch)), answer.excess)


def compare_following(
    model: nn.Module, idle: IdleModule, table: BlockTable, batches: Sequence[Inputs]
) -> FollowingComparison:
    """Hold a model whose tokens follow against the reference, on the first batch in which no choice is a near tie."""
    stages = idle.plan.stages
    plan = [
        Stage(steps[0].block, steps[-1].block + 1, steps[0].kept, steps[0].joins, steps[0].kept_by_segment)
        for steps in stages
    ]
    paths = [block.path for block in table]
    for ties, batch in enumerate(batches):
        tokens = _tokens(model, table, batch)
        tokens |= {block.path: replace(tokens[block.path], unit="tokens") for block in table if block.windows}
        try:
            answer = following.run(model, paths, plan, tokens, lambda batch=batch: run(model, batch))  # type: ignore[misc]
        except ValueError as reason:
            return FollowingComparison(None, reason=str(reason))
        if answer.margin <= CLEAR:
            continue
        args, kwargs = _arguments(batch)
        told = groups(idle, *args, **kwargs)
        grouped = all(torch.equal(told[block], wanted.leaders) for block, wanted in answer.groups.items())
        return FollowingComparison(largest_difference(answer.output, run(idle, batch)), grouped, ties)
    return FollowingComparison(None, ties=len(batches))


def _arguments(batch: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def _tokens(model: nn.Module, table: BlockTable, batch: Inputs) -> dict[str, reference.Tokens]:
    if all(block.batch_dim is None for block in table):  # there are no images to compare, and no prefix tokens known
        return {block.path: reference.Tokens((), None, (), segments=block.segments) for block in table}
    grids = {block.path: block.grid for block in table if block.grid and not block.shares_batch}
    joins = {block.path: block.grid[0] for block in table if block.shares_batch}
    found = reference.look(model, [block.path for block in table], lambda: _call(model, batch), grids, joins)
    segments = {block.path: block.segments for block in table}
    return {path: replace(each, segments=segments[path]) for path, each in found.items()}


def _call(model: nn.Module, batch: Inputs) -> Any:
    args, kwargs = _arguments(batch)
    return model(*args, **kwargs)


@torch.no_grad()
def run(model: nn.Module, batch: Inputs) -> Any:
    """The model's output, without the fused kernel of `nn.MultiheadAttention`, which rounds on its own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return _call(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def largest_difference(expected: Any, actual: Any, *, relative: bool = True) -> float:
    """The largest difference between the tensors of two outputs: of norms, in relation to the norm, or of entries."""
    found = [0.0]
    for a, b in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if isinstance(a, Tensor):
            gap = (a.double() - b.double()).abs()
            size = a.double().norm() if relative and a.any() else 1.0
            found.append(float((gap.norm() if relative else gap.max()) / size))
    return max(found) if all(value == value for value in found) else float("nan")
