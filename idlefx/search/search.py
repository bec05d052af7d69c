"""The search for a plan: even tapers, then moves from the best of them, then the finalists on all pictures.

1. Every even taper is fitted to the budget, and looked at with few pictures.
2. From the best of them the search moves to a neighbour that is better, as long as there is one; then from the next
   best, as long as trials are left.
3. The best that were looked at, and the best even taper, are compared on all calibration pictures.
"""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from idlefx.options import PlanOptions
from idlefx.reporting.comparison.compare import IDLE
from idlefx.search.costs import Costs
from idlefx.search.journal import Journal
from idlefx.search.scoring import Scorer, change_of
from idlefx.search.shapes import Shape, even_tapers, filled, fitted

FINALISTS = 4  # plans that are compared on all calibration pictures
STEPS = (0.4, 0.15)  # by what part a stage goes deeper or less deep: first widely, then finely
FEW, ALL = "few", "all"  # pictures, as the journal calls them


@dataclass(frozen=True)
class Tried:
    """A plan that was looked at, and what it changes on few pictures."""

    shape: Shape
    options: PlanOptions
    change: float


class Search:
    """Looks for the plan that changes least at a cost.

    Args:
        costs: Of plans, in the unit of the budget.
        few: Scores on few pictures.
        whole: Scores on all calibration pictures.
        telling: The outputs that plans are judged by.
        journal: What was found before.
        bar: Shows progress; `update` and `set_postfix_str` are called.

    Attributes:
        tried: All plans that were looked at, by what they mean for the model.
    """

    def __init__(
        self,
        costs: Costs,
        few: Scorer,
        whole: Scorer,
        telling: Collection[str],
        journal: Journal,
        bar: Any,
    ) -> None:
        self.costs, self.candidates, self.few, self.whole = costs, costs.candidates, few, whole
        self.telling, self.journal, self.bar = telling, journal, bar
        self.places = len(self.candidates.usable)
        self.tried: dict[Any, Tried] = {}

    def fit(self, shape: Shape, limit: float) -> PlanOptions | None:
        """The plan of that shape which costs as much as it may; None where even its deepest costs more."""
        costs = self.costs

        def cost(shares: Sequence[float]) -> float:
            return costs.of(self.candidates.plan(costs.options(shape, shares))) if shape.allows(shares) else math.inf

        depth = fitted(lambda depth: cost(shape.shares(depth)), limit, shape.deepest)
        return None if depth is None else costs.options(shape, filled(cost, limit, shape.shares(depth)))

    def look(self, shape: Shape, options: PlanOptions) -> Tried:
        """What a plan changes on few pictures; one that means the same is not run again."""
        meaning = self._meaning(options)
        if meaning not in self.tried:
            change = self.journal.get(FEW, options)
            if change is None:
                module = self.candidates.make(options).module
                change = change_of(self.few({IDLE: module}).changes[IDLE], self.telling)
                self.journal.put(FEW, options, change)
            self.tried[meaning] = Tried(shape, options, change)
            self.bar.set_postfix_str(f"least change {min(t.change for t in self.tried.values()):.2g}")
            self.bar.update()
        return self.tried[meaning]

    def at(self, limit: float, trials: int) -> list[tuple[Tried, float]]:
        """The finalists at a cost, each with its change on all calibration pictures, the best first.

        Args:
            limit: What a plan may cost.
            trials: How many plans to look at besides even tapers.
        """
        tapers = self._tapers(limit)
        climbed = self._climb(tapers, limit, trials)
        ranked = sorted(dict.fromkeys([*climbed, *tapers]), key=lambda tried: tried.change)
        finalists = list(dict.fromkeys([*ranked[:FINALISTS], tapers[0]]))
        return sorted(zip(finalists, self.confirm(finalists), strict=True), key=lambda pair: pair[1])

    def confirm(self, finalists: Sequence[Tried]) -> list[float]:
        """What plans change on all calibration pictures."""
        new = {
            str(place): self.candidates.make(tried.options).module
            for place, tried in enumerate(finalists)
            if self.journal.get(ALL, tried.options) is None
        }
        if new:
            changes = self.whole(new).changes
            for place, outputs in changes.items():
                self.journal.put(ALL, finalists[int(place)].options, change_of(outputs, self.telling))
        return [self.journal[ALL, tried.options] for tried in finalists]

    def _tapers(self, limit: float) -> list[Tried]:
        """Even tapers, the best first."""
        fits = ((shape, self.fit(shape, limit)) for shape in even_tapers(self.places))
        return sorted((self.look(shape, o) for shape, o in fits if o is not None), key=lambda tried: tried.change)

    def _climb(self, starts: Sequence[Tried], limit: float, trials: int) -> list[Tried]:
        """All plans that were looked at on the ways from some to better and better ones."""
        looked, draw = list[Tried](), random.Random(0)
        for start in starts:
            best = start
            for step in STEPS:
                moves = self._moves(best, step, draw)
                while moves and len(looked) < trials:
                    tried = self._new(moves.pop(), limit)
                    if tried is not None:
                        looked.append(tried)
                        if tried.change < best.change:
                            best, moves = tried, self._moves(tried, step, draw)
        return looked

    def _new(self, shape: Shape, limit: float) -> Tried | None:
        """What the plan of a shape changes; None where there is none, or it was looked at before."""
        options = self.fit(shape, limit)
        return None if options is None or self._meaning(options) in self.tried else self.look(shape, options)

    def _moves(self, tried: Tried, step: float, draw: random.Random) -> list[Shape]:
        """Shapes near one, in a random order that is always the same; taken from the end, groups join or part first."""
        shapes = list(tried.shape.neighbours(self.places, step))
        draw.shuffle(shapes)
        return [*shapes, replace(tried.shape, joined=not tried.shape.joined)] if self.candidates.may_join else shapes

    def _meaning(self, options: PlanOptions) -> Any:
        """What tells plans apart: in which blocks how many tokens work, and where they are chosen."""
        steps = [step for step in self.candidates.plan(options) if step.idles]
        return tuple((step.block, step.kept, step.opens, step.joins) for step in steps)
