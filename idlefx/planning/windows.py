"""What idles in a block whose attention is over windows, and how much of it."""

from idlefx.errors import PlanError
from idlefx.options import PlanOptions
from idlefx.planning.ratios import kept_tokens
from idlefx.records import Block

FEW = 16  # windows; of fewer than that, a share of whole ones is too coarse a choice


def unit_of(block: Block, options: PlanOptions) -> str:
    """Whole "windows", or "tokens" in each; empty where attention is over all tokens.

    Raises:
        PlanError: Tokens in each window were asked for, and cannot idle there; or whole windows that follow.
    """
    if not block.windows:
        return ""
    if options.idle == "follow":
        if options.unit == "windows":
            raise PlanError(
                f"plan: unit='windows' does not serve block {block.index} ({block.path or 'no path'}) with "
                "idle='follow': whole windows can only rest; take unit='tokens', or idle='rest'"
            )
        return "tokens"
    if options.unit == "tokens" and block.whole_only:
        raise PlanError(
            f"plan: unit='tokens' does not serve block {block.index} ({block.path or 'no path'}): {block.whole_only}; "
            "take unit='windows', or leave the block out with schedule='blocks'"
        )
    if options.unit != "auto":
        return options.unit
    return "tokens" if block.windows[0] < FEW and not block.whole_only else "windows"


def kept_slots(ratio: float, block: Block, unit: str, multiple_of: int) -> int:
    """How many slots work: of whole windows, or of so many tokens in each; raised to a multiple where that is asked."""
    count, size = block.windows
    units, of_each = (count, size) if unit == "windows" else (size, count)
    kept = kept_tokens(ratio, units)
    while kept < units and kept * of_each % multiple_of:
        kept += 1
    return kept * of_each
