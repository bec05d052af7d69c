"""Decide what each block does: layers, keep ratios and schedule become a plan. User mistakes are reported here."""

import math
from collections.abc import Sequence
from numbers import Real

from idlefx.errors import PlanError
from idlefx.planning.selectors import AUTO, LOGITS, find_selector
from idlefx.records import Block, BlockTable, Plan, Step

SCHEDULES = ("stages", "blocks")


def make_plan(
    blocks: BlockTable,
    layers: Sequence[int],
    keep: float | Sequence[float],
    schedule: str = "stages",
    selector: str = AUTO,
    reselect: bool = True,
    multiple_of: int = 1,
) -> Plan:
    """Which block keeps how many image tokens.

    Args:
        blocks: The table of the model.
        layers: With "stages" the blocks that open a stage, with "blocks" exactly the blocks that idle.
        keep: A ratio in (0, 1]. With "stages", stage s keeps `keep ** (s + 1)`; a sequence gives each entry of
            `layers` its own.
        schedule: "stages" or "blocks".
        selector: Name of the token score.
        reselect: Whether a token that idles may work again in a later block.
        multiple_of: K is raised until P + K, the tokens that work, is a multiple of it; never above M.

    Raises:
        PlanError: Anything of these does not fit the model.
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"plan: unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise PlanError(f"plan: multiple_of={multiple_of!r} is not a whole number from 1; 8 suits most kernels")
    listed = _listed(blocks, layers)
    ratios = _ratios(keep, len(listed), compound=schedule == "stages")
    if selector != AUTO:
        find_selector(selector)
    pairs = sorted(zip(listed, ratios, strict=True))
    if schedule == "stages":
        ends = [start for start, _ in pairs[1:]] + [len(blocks)]
        pairs = [(index, ratio) for (start, ratio), end in zip(pairs, ends, strict=True) for index in range(start, end)]
    steps = tuple(_step(blocks, index, ratio, selector, multiple_of) for index, ratio in pairs)
    plan = Plan(steps, blocks, reselect, multiple_of)
    if not reselect:
        _check_pruning(plan)
    return plan


def kept_tokens(keep: float, tokens: int) -> int:
    """K of M image tokens: `max(1, floor(keep * M))`, safe against the last bit of the product."""
    return max(1, math.floor(keep * tokens + 1e-9))


def rounded_tokens(kept: int, block: Block, multiple_of: int) -> int:
    """K, raised until P + K is a multiple, at most to M.

    What a kernel cuts into tiles is the sequence that works, prefix tokens and all: rows of the projections and of
    the MLP, queries and keys of attention. So it is their number that is rounded, not K alone.
    """
    return min(block.image_tokens, kept + -(kept + len(block.prefix)) % multiple_of)


def _listed(blocks: BlockTable, layers: Sequence[int]) -> list[int]:
    listed = list(layers) if isinstance(layers, (list, tuple, range)) else None
    if listed is None or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise PlanError(f"plan: layers={layers!r} is not a list of whole numbers; name block indices such as [3, 6, 9]")
    if not listed:
        raise PlanError("plan: layers is empty; name at least one block")
    for index in listed:
        if not 0 <= index < len(blocks):
            raise PlanError(f"plan: there is no block {index}; blocks count from 0 to {len(blocks) - 1}:\n{blocks}")
        if listed.count(index) > 1:
            raise PlanError(f"plan: block {index} is listed twice in layers={listed}; list it once")
    return listed


def _ratios(keep: float | Sequence[float], count: int, compound: bool) -> list[float]:
    if isinstance(keep, Real):
        _check_ratio(keep)
        return [float(keep) ** (s + 1 if compound else 1) for s in range(count)]
    if not isinstance(keep, (list, tuple)):
        raise PlanError(f"plan: keep={keep!r} is neither a ratio nor a list of ratios")
    if len(keep) != count:
        raise PlanError(f"plan: keep holds {len(keep)} ratios but layers {count} blocks; give one ratio, or one each")
    for ratio in keep:
        _check_ratio(ratio)
    return [float(ratio) for ratio in keep]


def _check_ratio(ratio: object) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        raise PlanError(f"plan: keep={ratio!r} is not in (0, 1]; 0.7 keeps 70 % of the image tokens, 1.0 all of them")


def _step(blocks: BlockTable, index: int, ratio: float, selector: str, multiple_of: int) -> Step:
    block = blocks[index]
    if not block.can_idle:
        raise PlanError(
            f"plan: block {index} ({block.path or 'no path'}) cannot idle: {block.refusal}; "
            f"leave it out, or name exact blocks with schedule='blocks':\n{blocks}"
        )
    name = _resolve(block, selector)
    form = ("affine" if block.affine else "keys") if name in LOGITS else ""
    kept = rounded_tokens(kept_tokens(ratio, block.image_tokens), block, multiple_of)
    return Step(index, block.path, ratio, kept, block.image_tokens, name, form)


def _check_pruning(plan: Plan) -> None:
    """Where no token may return, no later block may work on more tokens than are left, or on other ones."""
    steps = {step.block: step for step in plan}
    before: Step | None = None
    for block in plan.blocks:
        step = steps.get(block.index)
        kept = step.kept if step is not None else block.image_tokens
        if before is not None:
            last = plan.blocks[before.block]
            what = f"block {block.index} ({block.path or 'no path'})"
            if (block.tokens, block.prefix) != (last.tokens, last.prefix):
                raise PlanError(
                    f"plan: with reselect=False {what} must have the tokens of block {last.index}, but it has "
                    f"{block.tokens or 'unknown ones'}, {len(block.prefix)} of them prefix, where that has "
                    f"{last.tokens} and {len(last.prefix)}; let tokens return, with reselect=True"
                )
            if kept > before.kept:
                remedy = "lower its keep ratio" if step is not None else "list it too, or use schedule='stages'"
                raise PlanError(
                    f"plan: with reselect=False {what} would work on {kept} image tokens, but only {before.kept} are "
                    f"left after block {last.index}; {remedy}, or let tokens return, with reselect=True"
                )
        before = step if step is not None and step.idles else before


def _resolve(block: Block, selector: str) -> str:
    if selector == AUTO:
        return "mean" if block.class_token is None else "class"
    if selector == "class" and block.class_token is None:
        raise PlanError(
            f"plan: selector 'class' needs a class token, but the head reads none in block {block.index}; "
            "use 'mean' or 'auto'"
        )
    return selector
