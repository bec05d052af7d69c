"""Decide what each block does: options and the blocks of a model become a plan, or a refusal that says why not."""

import math
from dataclasses import replace

from idlefx.errors import PlanError
from idlefx.options import AUTO, PlanOptions
from idlefx.planning.ratios import kept_tokens
from idlefx.planning.selectors import LOGITS, find_selector
from idlefx.planning.windows import kept_slots, unit_of
from idlefx.records import Block, BlockTable, Plan, Step


def make_plan(blocks: BlockTable, options: PlanOptions) -> Plan:
    """Which block keeps how many image tokens.

    Args:
        blocks: The table of the model.
        options: What was asked for; `multiple_of` never raises K above M.

    Raises:
        PlanError: The options do not fit the model.
    """
    _check_layers(blocks, options)
    _check_unit(blocks, options)
    if options.selector != AUTO:
        find_selector(options.selector)
    shares = sorted(zip(options.layers, _ratios(options), strict=True))
    if options.schedule == "stages":
        ends = [start for start, _ in shares[1:]] + [len(blocks)]
        shares = [(index, keep) for (start, keep), end in zip(shares, ends, strict=True) for index in range(start, end)]
    steps = tuple(_step(blocks, index, keep, options) for index, keep in shares)
    if options.idle == "follow":
        steps = _in_groups(blocks, steps, options)
    plan = Plan(steps, blocks, options.reselect, options.multiple_of, options.idle)
    if not options.reselect and options.idle == "rest":
        _check_pruning(plan)
    return plan


def rounded_tokens(kept: int, block: Block, multiple_of: int) -> int:
    """K, raised until P + K is a multiple, at most to M.

    What a kernel cuts into tiles is the sequence that works, prefix tokens and all: rows of the projections and of
    the MLP, queries and keys of attention. So it is their number that is rounded, not K alone.
    """
    return min(block.image_tokens, kept + -(kept + len(block.prefix)) % multiple_of)


def kept_by_segment(ratio: float, block: Block, multiple_of: int) -> tuple[int, ...]:
    """K of each segment that attention is over, each raised to a multiple where it has as many tokens."""
    each = [(kept_tokens(ratio, size), size) for size in block.segments]
    return tuple(min(size, kept + -kept % multiple_of) for kept, size in each)


def _check_layers(blocks: BlockTable, options: PlanOptions) -> None:
    for index in options.layers:
        if not 0 <= index < len(blocks):
            raise PlanError(f"plan: there is no block {index}; blocks count from 0 to {len(blocks) - 1}:\n{blocks}")


def _ratios(options: PlanOptions) -> list[float]:
    """The keep ratio of each listed layer."""
    if not isinstance(options.keep, float):
        return list(options.keep)
    compounds = options.schedule == "stages"
    return [options.keep ** (stage + 1 if compounds else 1) for stage in range(len(options.layers))]


def _step(blocks: BlockTable, index: int, ratio: float, options: PlanOptions) -> Step:
    block = blocks[index]
    if not block.can_idle:
        raise PlanError(
            f"plan: block {index} ({block.path or 'no path'}) cannot idle: {block.refusal}; "
            f"leave it out, or name exact blocks with schedule='blocks':\n{blocks}"
        )
    if options.idle == "follow" and block.rest_only:
        raise PlanError(
            f"plan: the idle tokens of block {index} ({block.path or 'no path'}) can rest but not follow: "
            f"{block.rest_only}; leave it out with schedule='blocks', or take idle='rest'"
        )
    name = _resolve(block, options.selector)
    form = ("affine" if block.affine else "keys") if name in LOGITS else ""
    unit = unit_of(block, options)
    if unit:
        kept = kept_slots(ratio, block, unit, options.multiple_of)
        return Step(index, block.path, ratio, kept, math.prod(block.windows), name, form, unit=unit)
    if block.segments:
        each = kept_by_segment(ratio, block, options.multiple_of)
        return Step(index, block.path, ratio, sum(each), block.image_tokens, name, form, kept_by_segment=each)
    kept = rounded_tokens(kept_tokens(ratio, block.image_tokens), block, options.multiple_of)
    return Step(index, block.path, ratio, kept, block.image_tokens, name, form)


def _check_unit(blocks: BlockTable, options: PlanOptions) -> None:
    if options.unit != "auto" and not any(block.windows for block in blocks):
        raise PlanError(
            f"plan: unit={options.unit!r} is for attention over windows, which no block has; leave it out:\n{blocks}"
        )


def _in_groups(blocks: BlockTable, steps: tuple[Step, ...], options: PlanOptions) -> tuple[Step, ...]:
    """Tell which blocks go on with the groups of the block before, which join some of them, and which group anew."""
    grouped: list[Step] = []
    for step in steps:
        listed, before = step.block in options.layers, grouped[-1] if grouped else None
        if not options.reselect and step.unit and step.idles:
            raise PlanError(
                f"plan: with reselect=False groups only join, but block {step.block} ({step.path or 'no path'}) groups "
                "tokens anew in windows of its own; let groups part, with reselect=True"
            )
        continued = before is not None and continues(blocks, before.block, step.block)
        goes_on = continued and not listed
        joins = False
        if before is not None and continued and listed and not options.reselect and before.idles:
            _check_joining(before, step)
            goes_on = step.kept == before.kept
            joins = not goes_on and blocks[step.block].prefix_among(before.kept) is not None
        score, form = ("", "") if goes_on else ("likeness", step.form)
        grouped.append(replace(step, opens=not goes_on, joins=joins, selector=score, form=form))
    return tuple(grouped)


def _check_joining(before: Step, step: Step) -> None:
    if step.kept > before.kept:
        raise PlanError(
            f"plan: with reselect=False groups only join, so block {step.block} ({step.path or 'no path'}) cannot work "
            f"on {step.kept} image tokens where block {before.block} works on {before.kept}; lower its keep ratio, or "
            "let groups part, with reselect=True"
        )


def continues(blocks: BlockTable, before: int, block: int) -> bool:
    """Whether a block takes up the very stream that the block before leaves, with the same tokens and windows in it."""

    def tokens(b: Block) -> tuple[object, ...]:
        return b.tokens, b.grid, b.windows, b.segments, b.partition, b.prefix, b.token_dim, b.batch_dim, b.width

    return (
        block == before + 1
        and blocks[block].entry == blocks[before].exit
        and tokens(blocks[block]) == tokens(blocks[before])
    )


def fits(plan: Plan, blocks: BlockTable) -> bool:
    """Whether a plan can be carried out on blocks other than those it was made for, such as those of train mode."""

    def tokens(b: Block) -> tuple[object, ...]:
        return b.tokens, b.prefix, b.segments

    return [*map(tokens, blocks)] == [*map(tokens, plan.blocks)] and all(
        blocks[step.block].can_idle
        and ((step.opens and not step.joins) or continues(blocks, step.block - 1, step.block))
        for step in plan
    )


def _check_pruning(plan: Plan) -> None:
    """Where no token may return, no later block may work on more tokens than are left, or on other ones."""
    if inside := [step for step in plan if step.unit and step.idles]:
        raise PlanError(
            f"plan: with reselect=False tokens that idle never work again, but block {inside[0].block} "
            f"({inside[0].path or 'no path'}) chooses anew in windows of its own; let tokens return, with reselect=True"
        )
    steps = {step.block: step for step in plan}
    before: Step | None = None
    for block in plan.blocks:
        step = steps.get(block.index)
        kept = step.kept if step is not None else block.image_tokens
        if before is not None:
            last = plan.blocks[before.block]
            what = f"block {block.index} ({block.path or 'no path'})"
            if block.segments != last.segments:
                raise PlanError(
                    f"plan: with reselect=False {what} must attend over the segments of block {last.index}, but it has "
                    f"{_segments(block)} where that has {_segments(last)}; let tokens return, with reselect=True"
                )
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


def _segments(block: Block) -> str:
    lengths = ", ".join(map(str, block.segments[:8])) + (", …" if len(block.segments) > 8 else "")
    return f"{len(block.segments)} of {lengths} tokens" if block.segments else "none"


def _resolve(block: Block, selector: str) -> str:
    if selector == AUTO:
        return "mean" if block.class_token is None else "class"
    if selector == "class" and block.class_token is None:
        raise PlanError(
            f"plan: selector 'class' needs a class token, but block {block.index} has none: the head reads no "
            "prefix token, nor is there a single one; use 'mean' or 'auto'"
        )
    return selector
