"""What a plan may cost or change, as users say it, and in what the cost of plans is counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from idlefx.errors import InputError

Unit = Literal["ms", "gmacs"]
UNITS: tuple[Unit, ...] = get_args(Unit)
KINDS = ("speedup", "gmacs", "ms", "max_change")
EXAMPLES = "speedup=1.5, gmacs=3.0, ms=20 or max_change=0.01"


@dataclass(frozen=True)
class Budget:
    """One of the four that there are.

    Attributes:
        kind: "speedup" over the dense model, "gmacs" or "ms" at most, or "max_change".
        value: Of it.
        unit: What plans cost: predicted milliseconds of a call, or GMACs.
    """

    kind: str
    value: float
    unit: Unit

    def limit(self, dense: float) -> float | None:
        """What a plan may cost; None where that is to be found out.

        Args:
            dense: What the dense model costs.
        """
        if self.kind == "max_change":
            return None
        return dense / self.value if self.kind == "speedup" else self.value

    def __str__(self) -> str:
        counted = "predicted time" if self.unit == "ms" else "multiply-adds"
        return {
            "speedup": f"a speed-up of {self.value:g} by {counted}",
            "gmacs": f"{self.value:g} GMACs at most",
            "ms": f"{self.value:g} ms at most",
            "max_change": f"a change of {self.value:g} at most, and the least {counted}",
        }[self.kind]


def read_budget(told: Mapping[str, object], by: str) -> Budget:
    """The one budget that was told.

    Args:
        told: Values by kind; those that were not told are None.
        by: In what a speed-up or what is cheapest is counted.

    Raises:
        InputError: There is none, more than one, or its value is out of its range.
    """
    if by not in UNITS:
        raise InputError(f"budget: by={by!r} is unknown; plans are counted by 'ms' or by 'gmacs'")
    given = {kind: value for kind, value in told.items() if value is not None}
    if len(given) != 1:
        what = f"there are {len(given)}: {' and '.join(given)}" if given else "there is none"
        raise InputError(f"budget: {what}; give one, {EXAMPLES}")
    ((kind, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"budget: {kind}={value!r} is no number; give {EXAMPLES}")
    number = float(value)
    least, most = {"speedup": (1.0, float("inf")), "max_change": (0.0, 1.0)}.get(kind, (0.0, float("inf")))
    if not least < number < most:
        raise InputError(f"budget: {kind}={value!r} must be above {least:g}{f' and below {most:g}' * (most == 1)}")
    counted = kind if kind in UNITS else by
    return Budget(kind, number, "ms" if counted == "ms" else "gmacs")
