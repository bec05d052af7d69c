"""Multiply-adds of any plan by formula: two plans are carried out to find what a block costs for how many tokens.

1. A block costs `linear * n + square * n²` for n tokens, layers and attention, and what runs on a whole grid of tokens
   whatever n is.
2. Choosing costs a constant, and where tokens follow also what the likeness of tokens and the means of groups do.
"""

from dataclasses import dataclass, replace

from idlefx.analysis.macs import count_macs
from idlefx.graph.notes import made_for
from idlefx.records import Block, Plan, Step
from idlefx.runtime import grids
from idlefx.runtime.nearest import anchors
from idlefx.search.candidates import Candidate, Candidates

SHARES = (0.5, 0.25)  # that the two plans keep


@dataclass(frozen=True)
class BlockWork:
    """Multiply-adds of one block.

    Attributes:
        linear: For each token.
        square: For each pair of tokens.
        fixed: For all tokens on a grid, however many of them work.
        choosing: For choosing tokens, besides what depends on how many work.
    """

    linear: float
    square: float
    fixed: float
    choosing: float


class Work:
    """Multiply-adds of plans.

    Args:
        candidates: Makes the two plans that the formulas are taken from.
    """

    def __init__(self, candidates: Candidates) -> None:
        self.blocks, self.follows = candidates.blocks, candidates.base.idle == "follow"
        more, less = (_everywhere(candidates, share) for share in SHARES)
        self.of_block = {index: self._fit(self.blocks[index], more, less) for index in candidates.usable}

    def gmacs(self, plan: Plan) -> float:
        """Billions of multiply-adds for one image."""
        total, left = float(self.blocks.macs), 0
        for step in plan:
            block = self.blocks[step.block]
            total += self._step(step, left if step.joins else block.image_tokens) - block.macs if step.idles else 0
            left = step.kept
        return total / 1e9

    def _step(self, step: Step, images: int) -> float:
        """Of one block; where it chooses, it chooses among so many image tokens."""
        block, work = self.blocks[step.block], self.of_block[step.block]
        prefix = len(block.prefix)
        tokens, there = step.kept + prefix, images + prefix
        choosing = work.choosing * there / block.tokens + self._grouping(block, images, step.kept) if step.opens else 0
        return work.linear * tokens + work.square * tokens**2 + work.fixed + choosing

    def _fit(self, block: Block, more: Candidate, less: Candidate) -> BlockWork:
        (n, work, fixed, choosing), (fewer, less_work, *_) = (_counted(block, made) for made in (more, less))
        square = 0.0
        if n != fewer:
            square = (work / n - less_work / fewer) / (n - fewer)
        grouping = self._grouping(block, block.image_tokens, n - len(block.prefix))
        return BlockWork(work / n - square * n, square, fixed, choosing - grouping)

    def _grouping(self, block: Block, images: int, kept: int) -> float:
        """Likeness of all tokens to the anchors and of idle tokens to workers, and the sums of groups."""
        if not self.follows:
            return 0.0
        # Tokens of a window or a segment are compared with those of the same.
        parts = block.windows[0] if block.windows else max(1, len(block.segments))
        there, idle = images + len(block.prefix), images - kept
        _, compared, *_ = anchors(images // parts, kept // parts)
        return float(block.sequences * block.width * (there * compared + idle * kept / parts + there))


def _everywhere(candidates: Candidates, share: float) -> Candidate:
    """The same share in every block that can idle, chosen anew in each."""
    return candidates.make(replace(candidates.base, layers=candidates.usable, keep=share, schedule="blocks"))


def _counted(block: Block, candidate: Candidate) -> tuple[int, int, int, int]:
    """How many tokens work, and multiply-adds of their work, of what runs on the whole grid, and of choosing."""
    graph = candidate.module.graph
    kept = next(step.kept for step in candidate.plan if step.block == block.index)
    works = made_for(graph, block.index, "work")
    on_grid = [node for node in works if any(given.target is grids.put_on_grid for given in node.all_input_nodes)]
    whole, work, fixed = map(count_macs, (made_for(graph, block.index), works, on_grid))
    return kept + len(block.prefix), work - fixed, fixed, whole - work
