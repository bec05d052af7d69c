"""The segments of a sequence that attention is over, as where several images are packed into one."""

from collections.abc import Iterable
from itertools import accumulate

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.layouts import Dim, Layout, Runs
from idlefx.analysis.walk import Walk


def segment_lengths(walk: Walk, stream: Layout, cores: Iterable[Core]) -> tuple[int, ...]:
    """How many tokens each segment has; empty unless the attentions of a block divide a sequence among them.

    Args:
        walk: Where the tokens of the block stand.
        stream: The layout of its entry.
        cores: Its attentions, of which each is over one segment.
    """
    held = {(_runs(walk[core.query][-2]), _keys(walk, core)) for core in cores}
    within = all(queries == keys and len(keys) == 1 for queries, keys in held)
    runs = sorted(run for _, keys in held for run in keys)
    lengths = tuple(stop - start for start, stop in runs)
    divided = tuple(stop for _, stop in runs) == tuple(accumulate(lengths))
    whole = sum(lengths) == sum(factor.size for dim in stream for factor in dim if factor.role == "tokens")
    return lengths if within and divided and whole and len(runs) > 1 else ()


def segment_of(walk: Walk, core: Core) -> int:
    """The first token of the segment that an attention is over."""
    ((start, _),) = _keys(walk, core)
    return start


def _keys(walk: Walk, core: Core) -> Runs:
    return _runs(core.key_layout(walk[core.key])[-2])


def _runs(dim: Dim) -> Runs:
    return dim[0].runs if lay.is_tokens(dim) else ()
