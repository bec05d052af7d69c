"""What a plan looks like whatever it may cost: where its stages begin, and how deep each goes beside the others.

1. An even taper has stages of one length, and each keeps the same share of what the one before kept.
2. A shape becomes a plan by one number, how deep it goes as a whole; a budget settles that. Shares are whole 64ths, so
   that plans of other shapes keep the same numbers of tokens, and what is known of one block serves the next.
3. Shapes near one have a stage that begins a block earlier or later, goes deeper or less deep, is split or left out; or
   all of them go deeper late rather than early, or early rather than late.
4. Where tokens follow, stages group all tokens anew or join the groups of the stage before.

Stages begin at places among the blocks that can idle, which are not numbers of blocks where others stand between.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from idlefx.options import PlanOptions

STAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # how many an even taper has; each count is tried from several starts
EARLIEST = 4  # blocks before the first stage, at most
PARTS = 64  # of all image tokens: shares are so many of them
HALVINGS = 16  # of the depth, which then is known to a part


@dataclass(frozen=True)
class Shape:
    """Stages without a budget.

    Attributes:
        starts: Where they begin, as places among the usable blocks, ascending.
        depths: How deep each goes: stage s keeps `exp(-depth * depths[s])`.
        joined: Whether groups join from stage to stage.
    """

    starts: tuple[int, ...]
    depths: tuple[float, ...]
    joined: bool = False

    @property
    def deepest(self) -> float:
        """The depth from which on every stage keeps a single part."""
        return math.log(PARTS) / min(self.depths)

    def shares(self, depth: float) -> tuple[float, ...]:
        """What each stage keeps: whole parts, and no more than is meant.

        Args:
            depth: From 0, which keeps all tokens.
        """
        depths = accumulate(self.depths, max) if self.joined else self.depths
        return tuple(max(1, math.floor(PARTS * math.exp(-depth * each) + 1e-6)) / PARTS for each in depths)

    def allows(self, shares: Sequence[float]) -> bool:
        """Whether stages may keep so much: groups that only join never become more."""
        return not self.joined or all(before >= after for before, after in pairwise(shares))

    def options(self, shares: Sequence[float], usable: Sequence[int], blocks: int, base: PlanOptions) -> PlanOptions:
        """The plan whose stages keep so much.

        Args:
            shares: One for each stage.
            usable: Indices of the blocks that can idle.
            blocks: How many there are.
            base: The options that are not about stages.
        """
        base = replace(base, reselect=False) if self.joined else base
        layers = [usable[start] for start in self.starts]
        if list(range(layers[0], blocks)) == [*usable[self.starts[0] :]]:
            return replace(base, layers=layers, keep=[*shares])
        ends = [*self.starts[1:], len(usable)]
        listed = [
            (usable[place], share)
            for start, end, share in zip(self.starts, ends, shares, strict=True)
            for place in range(start, end)
        ]
        return replace(base, layers=[b for b, _ in listed], keep=[s for _, s in listed], schedule="blocks")

    def neighbours(self, places: int, step: float) -> Iterator["Shape"]:
        """Shapes near this one.

        Args:
            places: How many blocks can idle.
            step: By what part of its depth a stage goes deeper or less deep.
        """
        starts, depths = list(self.starts), list(self.depths)
        for power in (1 + step, 1 / (1 + step)):
            yield replace(self, depths=tuple(depth**power for depth in depths))
        for at, start in enumerate(starts):
            for moved in (start - 1, start + 1):
                after = starts[at + 1] if at + 1 < len(starts) else places
                if (starts[at - 1] if at else -1) < moved < after:
                    yield replace(self, starts=(*starts[:at], moved, *starts[at + 1 :]))
            for factor in (1 + step, 1 / (1 + step)):
                yield replace(self, depths=(*depths[:at], depths[at] * factor, *depths[at + 1 :]))
            if len(starts) > 1:
                yield replace(self, starts=(*starts[:at], *starts[at + 1 :]), depths=(*depths[:at], *depths[at + 1 :]))
            end = starts[at + 1] if at + 1 < len(starts) else places
            if end - start > 1:
                before = depths[at - 1] if at else 0.0
                yield replace(
                    self,
                    starts=(*starts[: at + 1], (start + end) // 2, *starts[at + 1 :]),
                    depths=(*depths[:at], (before + depths[at]) / 2, *depths[at:]),
                )


def even_tapers(places: int) -> list[Shape]:
    """Even tapers of one stage to as many as there are blocks, from each of the first blocks.

    Args:
        places: How many blocks can idle.
    """
    found = dict[Shape, None]()
    for first in range(min(EARLIEST, places - 1) + 1):
        for stages in STAGES:
            found[even_taper(places, first, math.ceil((places - first) / stages))] = None
    return list(found)


def even_taper(places: int, first: int, length: int) -> Shape:
    """Stages of one length, each of which keeps the same share of what the one before kept.

    Args:
        places: How many blocks can idle.
        first: Where the first stage begins.
        length: Blocks in a stage.
    """
    starts = tuple(range(first, places, length))
    return Shape(starts, tuple(float(stage + 1) for stage in range(len(starts))))


def fitted(cost: Callable[[float], float], limit: float, deepest: float) -> float | None:
    """The least depth at which a cost is within a limit; None where the deepest plan is above it.

    Args:
        cost: Of a depth; the deeper, the less.
        limit: What it may be at most.
        deepest: The greatest depth.
    """
    low, high = 0.0, deepest
    if cost(high) > limit:
        return None
    if cost(low) <= limit:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    return high


def filled(cost: Callable[[Sequence[float]], float], limit: float, shares: Sequence[float]) -> Sequence[float]:
    """Shares with what rounding has left of the limit: each stage keeps a part more where that still fits.

    Args:
        cost: Of shares.
        limit: What it may be at most.
        shares: One for each stage.
    """
    for stage, share in enumerate(shares):
        more = (*shares[:stage], min(1.0, share + 1 / PARTS), *shares[stage + 1 :])
        if cost(more) <= limit:
            shares = more
    return shares
