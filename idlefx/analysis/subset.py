"""Which tokens are there, and whether an edit can be made on them."""

from dataclasses import dataclass

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Factor, Runs
from idlefx.analysis.refusal import refuse
from idlefx.analysis.walk import Cut, Edit, Read, Resize

aten = torch.ops.aten


@dataclass(frozen=True)
class Subset:
    """Which tokens are there, and where in the graph their positions are known.

    Attributes:
        index: Node of the positions (B, n), ascending; None while it is only asked what could be cut.
        fixed: Positions that are always there.
        free: Positions of which some are there, chosen for each image.
        kept: How many of the free ones.
    """

    index: fx.Node | None
    fixed: tuple[int, ...]
    free: tuple[int, ...]
    kept: int

    def count(self, node: fx.Node, runs: Runs) -> int:
        """How many tokens of the runs are there."""
        fixed = sum(a <= p < b for p in self.fixed for a, b in runs)
        free = sum(a <= p < b for p in self.free for a, b in runs)
        if self.kept and free not in (0, len(self.free)):
            refuse(node, "cuts the image tokens apart at a place that moves when some of them idle")
        return fixed + (self.kept if free else 0)

    def size(self, node: fx.Node, factor: Factor) -> int:
        """How many entries a factor of a dimension has then, the batch left as it is.

        On a grid the tokens stand in one row: the last side holds all that are there.
        """
        if factor.role != "tokens":
            return factor.size
        if factor.side is not None and factor.side < len(factor.grid) - 1:
            return 1
        return self.count(node, factor.runs)

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
