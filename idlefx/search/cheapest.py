"""The cheapest plan that changes no more than is allowed.

1. Three even tapers are looked at from a little cheaper than the dense model downwards, until all change too much.
2. At the last cost at which one did not, the search finds the best shape.
3. Its depth is halved towards the next cost, with few pictures.
4. On all calibration pictures it is made less deep until it keeps the bound.
"""

from collections.abc import Iterator

from idlefx.errors import PlanError
from idlefx.search.search import Search, Tried
from idlefx.search.shapes import Shape, even_taper

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of what the dense model costs
LENGTHS = (1, 2, 3)  # blocks in a stage of the tapers that are looked at first
HALVINGS, STEPS_BACK = 4, 6


def cheapest(search: Search, max_change: float, trials: int) -> tuple[Tried, float]:
    """The cheapest plan within the bound, and its change on all calibration pictures.

    Args:
        search: Looks for plans.
        max_change: The most that a plan may change.
        trials: How many plans to look at besides even tapers.

    Raises:
        PlanError: None is within the bound.
    """
    shapes = [even_taper(search.places, min(1, search.places - 1), length) for length in LENGTHS]
    dense = search.costs.dense
    least, share, next_share = float("inf"), 0.0, 0.0
    for next_share in SHARES:
        change = min((tried.change for tried in _at(search, shapes, next_share * dense)), default=float("inf"))
        least = min(least, change)
        if change > max_change:
            break
        share = next_share
    if not share:
        raise PlanError(
            f"plan: nothing stays within max_change={max_change:g}: of plans that cost a little less than the dense "
            f"model the best changes {least:.2g}; allow more, or leave the model as it is"
        )
    shape = search.at(share * dense, trials)[0][0].shape
    high, low = share, next_share
    for _ in range(HALVINGS):
        middle = (high + low) / 2
        changes = [tried.change for tried in _at(search, [shape], middle * dense)]
        high, low = (middle, low) if changes and changes[0] <= max_change else (high, middle)
    return _confirmed(search, shape, high, max_change)


def _at(search: Search, shapes: list[Shape], limit: float) -> Iterator[Tried]:
    for shape in shapes:
        if (options := search.fit(shape, limit)) is not None:
            yield search.look(shape, options)


def _confirmed(search: Search, shape: Shape, share: float, max_change: float) -> tuple[Tried, float]:
    change = float("inf")
    for _ in range(STEPS_BACK):
        for tried in _at(search, [shape], share * search.costs.dense):
            (change,) = search.confirm([tried])
            if change <= max_change:
                return tried, change
        share += (1 - share) / 4
    raise PlanError(
        f"plan: nothing stays within max_change={max_change:g} on all pictures that plans are chosen on: the last one "
        f"tried changes {change:.2g}; allow more, or leave the model as it is"
    )
