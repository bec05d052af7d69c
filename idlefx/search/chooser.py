"""From a budget to findings: the search, and what the chosen plan does to pictures that were held out."""

from collections.abc import Collection, Sequence
from typing import Any

from idlefx.reporting.comparison.compare import IDLE
from idlefx.search.cheapest import SHARES, cheapest
from idlefx.search.costs import Costs
from idlefx.search.journal import Journal
from idlefx.search.pictures import Pictures
from idlefx.search.proposal import Findings, Point
from idlefx.search.scoring import Scorer, change_of, worst_of
from idlefx.search.search import Search, Tried
from idlefx.search.worst_picture import WorstPicture, take_outputs

CORRECTIONS, CLOSE = 3, 0.03  # how often a time is corrected at most, and by what share it may be off


class Chooser:
    """Chooses a plan for one model, one budget and some pictures.

    Args:
        costs: Of plans of the model.
        pictures: To choose on, and to judge on.
        few: Scores on the few pictures.
        telling: The outputs that plans are judged by.
        classes: How many classes the model says it has.
        journal: What was found before.
        bar: Shows progress.
    """

    def __init__(
        self,
        costs: Costs,
        pictures: Pictures,
        few: Scorer,
        telling: Collection[str],
        classes: Collection[int],
        journal: Journal,
        bar: Any,
    ) -> None:
        self.costs, self.candidates, self.pictures = costs, costs.candidates, pictures
        self.telling = telling
        whole = Scorer(self.candidates.dense, pictures.calibration, classes)
        self.judge = Scorer(self.candidates.dense, pictures.held_out, classes)
        self.search = Search(costs, few, whole, self.telling, journal, bar)

    def choose(self, trials: int) -> tuple[Findings, WorstPicture]:
        """Search, and judge the plan that was found.

        Raises:
            InputError: The budget is out of reach.
            PlanError: Nothing is faster, or nothing stays within the allowed change.
            KeyboardInterrupt: The user stopped it before anything was found.
        """
        limit, interrupted = self.costs.limit(), False
        try:
            chosen, change = self._settled(*self._found(limit, trials), limit)
            frontier = self._frontier(chosen)
        except KeyboardInterrupt:
            best = self._best_so_far(limit)
            if best is None:
                raise
            chosen, (change,), frontier, interrupted = best, self.search.confirm([best]), (best,), True
        return self._judged(chosen, change, frontier, interrupted=interrupted)

    def _found(self, limit: float | None, trials: int) -> tuple[Tried, float]:
        if limit is not None:
            return self.search.at(limit, trials)[0]
        return cheapest(self.search, self.costs.budget.value, trials)

    def _settled(self, chosen: Tried, change: float, limit: float | None) -> tuple[Tried, float]:
        """The plan, as deep as its budget of time asks once it was itself measured; predictions learn from it."""
        timing = self.costs.timing
        for _ in range(CORRECTIONS if timing else 0):
            assert timing is not None
            candidate = self.candidates.make(chosen.options)
            off = timing.learn(candidate.plan, timing.measured_ms(candidate.module))
            if off <= CLOSE or limit is None or self.costs.budget.unit != "ms":
                break
            options = self.search.fit(chosen.shape, limit)
            if options is None:
                break
            chosen = self.search.look(chosen.shape, options)
            (change,) = self.search.confirm([chosen])
        return chosen, change

    def _best_so_far(self, limit: float | None) -> Tried | None:
        """What is best of the plans that were looked at, if one fits the budget."""
        cost = {tried: self.costs.of(self.candidates.plan(tried.options)) for tried in self.search.tried.values()}
        if limit is not None:
            return min((t for t in cost if cost[t] <= limit), key=lambda t: t.change, default=None)
        return min((t for t in cost if t.change <= self.costs.budget.value), key=lambda t: cost[t], default=None)

    def _frontier(self, chosen: Tried) -> tuple[Tried, ...]:
        """Plans of the same shape at other costs, looked at with few pictures."""
        fits = [self.search.fit(chosen.shape, share * self.costs.dense) for share in SHARES]
        looked = [self.search.look(chosen.shape, options) for options in fits if options is not None]
        return tuple(dict.fromkeys([*looked, chosen]))

    def _judged(
        self, chosen: Tried, change: float, frontier: Sequence[Tried], *, interrupted: bool
    ) -> tuple[Findings, WorstPicture]:
        """What the plan changes on the pictures held out, and the one that suffers most."""
        module, timing = self.candidates.make(chosen.options).module, self.costs.timing
        outputs = self.judge({IDLE: module}).changes[IDLE]
        output, worst = worst_of(outputs, self.telling)
        points = {tried: self._point(tried) for tried in frontier}
        findings = Findings(
            budget=str(self.costs.budget),
            chosen=points[chosen],
            frontier=tuple(sorted(points.values(), key=lambda point: point.gmacs)),
            dense_gmacs=self.costs.dense_gmacs,
            dense_ms=timing.dense_ms if timing else None,
            measured_ms=timing.measured_ms(module) if timing else None,
            conditions=timing.conditions if timing else "",
            reach=self.costs.reach(),
            change=change_of(outputs, self.telling),
            calibration_change=change,
            worst_image=(worst.worst_image, output),
            worst=worst.worst,
            pictures=self.pictures.counts,
            tried=len(self.search.tried),
            interrupted=interrupted,
        )
        models = (self.candidates.dense, module)
        return findings, take_outputs(models, self.pictures.held_out, worst.worst_image, output, worst.worst)

    def _point(self, tried: Tried) -> Point:
        plan, timing = self.candidates.plan(tried.options), self.costs.timing
        return Point(tried.options, self.costs.work.gmacs(plan), timing.ms(plan) if timing else None, tried.change)
