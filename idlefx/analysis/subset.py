"""Which tokens are there, and whether an edit can be made on them."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Cut, Edit, Read, ReadPlaces, Resize, WholeWindows
from idlefx.analysis.layouts import Factor, Runs
from idlefx.analysis.partition import Partition, Windows
from idlefx.analysis.refusal import refuse

aten = torch.ops.aten

Told = tuple[tuple[str, int], ...]


class Segment(NamedTuple):
    """Tokens `start … stop` of a sequence that attention is over, and how many of its free ones are there."""

    start: int
    stop: int
    kept: int


@dataclass(frozen=True)
class Subset:
    """Which tokens are there, and where in the graph their positions are known.

    Attributes:
        index: Node of the positions (B, n), ascending; None while it is only asked what could be cut.
        fixed: Positions that are always there.
        free: Positions of which some are there, chosen for each image.
        kept: How many of the free ones; where attention is over windows, how many slots.
        windows: What the attention is over, where it is over windows; the tokens stand in their order.
        unit: What of them idles: whole "windows", or "tokens" in each.
        chosen: Node of the windows (B, K) or, window by window, of the slots (B * windows, K) that work.
        segments: Where attention is over segments of the sequence, these; `kept` is the sum over them.
    """

    index: fx.Node | None
    fixed: tuple[int, ...]
    free: tuple[int, ...]
    kept: int
    windows: Windows | None = None
    unit: str = "windows"
    chosen: fx.Node | None = None
    segments: tuple[Segment, ...] = ()

    def count(self, node: fx.Node, runs: Runs) -> int:
        """How many tokens of the runs are there."""
        count = sum(_between(self.fixed, start, stop) for start, stop in runs)
        for segment in self.segments or (Segment(0, len(self.fixed) + len(self.free), self.kept),):
            free = _between(self.free, segment.start, segment.stop)
            cut = sum(_between(self.free, max(a, segment.start), min(b, segment.stop)) for a, b in runs)
            if segment.kept and cut not in (0, free):
                refuse(node, "cuts the image tokens apart at a place that moves when some of them idle")
            count += segment.kept if cut else 0
        return count

    def size(self, node: fx.Node, factor: Factor) -> int:
        """How many entries a factor of a dimension has then, the batch left as it is.

        On a grid the tokens stand in one row: the last side holds all that are there.
        """
        if factor.role != "tokens":
            return factor.size
        if factor.partition is not None:
            return math.prod(self.sides(factor.partition)[side] for side in lay.sides_of((factor,)))
        if factor.side is not None and factor.side < len(factor.grid) - 1:
            return 1
        return self.count(node, factor.runs)

    def sides(self, partition: Partition) -> tuple[int, ...]:
        """Sizes of the sides of a partition then: of what idles, the last side holds all that is there."""
        windows, last = self.windows, len(partition.sides) - 1
        if windows is None or partition != windows.partition:
            return (*(1,) * last, self.kept)
        working = windows.which if self.unit == "windows" else windows.slots
        others = windows.size if self.unit == "windows" else windows.count
        few = {side: self.kept // others if side == working[-1] else 1 for side in working}
        return tuple(few.get(side, size) for side, size in enumerate(partition.sides))

    def order(self, partition: Partition) -> tuple[int, ...]:
        """The sides of a partition from the outermost on: those that say which window, then those of the slots."""
        if self.windows is None or partition != self.windows.partition:
            return tuple(range(len(partition.sides)))
        return self.windows.order

    def check(self, node: fx.Node, edit: Edit) -> None:
        """Refuse an edit whose outcome would depend on which tokens are there."""
        if isinstance(edit, Resize):
            for factor in edit.dim:
                self.count(node, factor.runs)
        elif isinstance(edit, Read):
            for start, stop in (run for axis in edit.axes for run in axis.runs):
                self.count(node, ((0, start),))
                self.count(node, ((start, stop),))
        elif isinstance(edit, Cut):
            self.count(node, lay.cut(edit.runs, 0, edit.place))
            if node.target is aten.select.int and self.count(node, lay.cut(edit.runs, edit.place, edit.place + 1)) != 1:
                refuse(node, "picks a token that is not there")
        elif isinstance(edit, ReadPlaces):
            self.places_read(node, edit)
        elif isinstance(edit, WholeWindows):
            if self.unit == "tokens":
                refuse(node, "needs every slot of a window")
            if self.windows is None or not set(edit.sides) <= set(self.windows.slots):
                refuse(node, "has something of its own for each window")

    def places_read(self, node: fx.Node, edit: ReadPlaces) -> tuple[Told, ...] | None:
        """What the dimensions of an output hold that an operand is read for; None where it need not be read.

        A dimension is a product of ("batch", 0), ("window", 0), ("slot", 0) and ("features", size).

        Raises:
            RefusedOperation: The windows or the slots are no factor of one dimension.
        """
        windows = self.windows
        if windows is None:
            refuse(node, f"reads `{edit.operand.name}` by position where tokens stand in another order")
        wanted = windows.which if self.unit == "windows" else windows.slots
        if not any(side in wanted for d in edit.along for side in lay.sides_of(edit.output[d])):
            return None
        if edit.computed:
            refuse(node, f"reads `{edit.operand.name}` for every slot of a window")
        return tuple(self._told(node, windows, dim) for dim in edit.output)

    def _told(self, node: fx.Node, windows: Windows, dim: lay.Dim) -> Told:
        told: list[tuple[str, int]] = []
        for factor in dim:
            if factor.role == "batch":
                told.append(("batch", 0))
            elif factor.partition is None:
                told.append(("features", factor.size))
        if not (sides := lay.sides_of(dim)):
            return tuple(told)
        first, *others = [at for at, factor in enumerate(dim) if factor.partition is not None]
        if dim[first].partition != windows.partition:
            refuse(node, "reads by position where tokens stand in another order than that of the windows")
        if others and others[-1] - first != len(others):
            refuse(node, "reads by position where the batch stands between the sides of a window")
        if sides == windows.which:
            told.insert(first, ("window", 0))
        elif sides == windows.slots and len(told) == 0:
            told.append(("slot", 0))
        elif self.unit == "windows" and set(sides) <= set(windows.slots):
            told.insert(first, ("features", math.prod(windows.partition.sides[side] for side in sides)))
        else:
            refuse(node, "reads by position where windows or slots share a dimension with something else")
        return tuple(told)


def _between(positions: tuple[int, ...], start: int, stop: int) -> int:
    """How many of some ascending positions stand at `start … stop`."""
    return max(0, bisect_left(positions, stop) - bisect_left(positions, start))


def segments_of(lengths: Sequence[int], kept: Sequence[int]) -> tuple[Segment, ...]:
    """Segments that follow one another.

    Args:
        lengths: How many tokens each has.
        kept: How many of them are there.
    """
    ends = accumulate(lengths)
    return tuple(Segment(end - size, end, few) for end, size, few in zip(ends, lengths, kept, strict=True))
