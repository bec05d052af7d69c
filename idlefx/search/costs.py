"""What plans cost, in multiply-adds and in time, and which budgets are within reach."""

from collections.abc import Sequence
from dataclasses import dataclass

from idlefx.errors import InputError, PlanError
from idlefx.options import PlanOptions
from idlefx.records import Plan, written
from idlefx.search.budget import Budget
from idlefx.search.candidates import Candidates
from idlefx.search.shapes import Shape, even_taper
from idlefx.search.timing import Timing
from idlefx.search.work import Work


@dataclass(frozen=True)
class Costs:
    """Costs of plans for one model, counted in the unit of the budget.

    Attributes:
        candidates: Makes plans of the model.
        budget: What a plan may cost or change.
        work: Counts multiply-adds.
        timing: Predicts times; None where none were asked for.
    """

    candidates: Candidates
    budget: Budget
    work: Work
    timing: Timing | None

    def of(self, plan: Plan) -> float:
        """What a plan costs."""
        if self.budget.unit == "gmacs":
            return self.work.gmacs(plan)
        assert self.timing is not None
        return self.timing.ms(plan)

    @property
    def dense(self) -> float:
        """What the dense model costs."""
        if self.budget.unit == "gmacs":
            return self.dense_gmacs
        assert self.timing is not None
        return self.timing.dense_ms

    @property
    def dense_gmacs(self) -> float:
        """Billions of multiply-adds of the dense model."""
        return self.candidates.blocks.macs / 1e9

    @property
    def least(self) -> float:
        """What a plan costs in which hardly a token works in any block, or in any but the first."""
        places = len(self.candidates.usable)
        deepest = [even_taper(places, first, places) for first in range(min(2, places))]
        return min(self.of(self.candidates.plan(self.options(shape, shape.shares(shape.deepest)))) for shape in deepest)

    def options(self, shape: Shape, shares: Sequence[float]) -> PlanOptions:
        """The plan of a shape whose stages keep so much."""
        return shape.options(shares, self.candidates.usable, len(self.candidates.blocks), self.candidates.base)

    def limit(self) -> float | None:
        """What a plan may cost; None where that is to be found out.

        Raises:
            InputError: No plan costs so little, or the dense model does already.
            PlanError: No plan costs less than the dense model.
        """
        least, dense, limit = self.least, self.dense, self.budget.limit(self.dense)
        if least >= dense:
            where = f" ({self.timing.conditions})" if self.timing else ""
            raise PlanError(
                f"plan: nothing is faster than the dense model, which takes {dense:.4g} {self._unit}: with hardly a "
                f"token at work it is {least:.4g}{where}; leave the model as it is, or try larger images, a larger "
                "batch or another device"
            )
        if limit is not None and not least <= limit < dense:
            raise InputError(f"budget: {self.budget} is out of reach: {self.reach()}")
        return limit

    def reach(self) -> str:
        """What can be had at all, in words."""
        return (
            f"plans of this model cost from {written(self.least)} to less than {written(self.dense)} {self._unit}, a "
            f"speed-up of up to {self.dense / self.least:.2f}"
        )

    @property
    def _unit(self) -> str:
        return "ms" if self.budget.unit == "ms" else "GMACs"
