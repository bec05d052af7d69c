"""Which selector head a block gets."""

from torch import fx

from idlefx.analysis.blocks import Opened
from idlefx.records import Block, Step
from idlefx.rewriting.segment_head import SegmentHead
from idlefx.rewriting.selector_head import Head
from idlefx.rewriting.window_head import WindowHead


def head_of(graph: fx.Graph, block: Block, opened: Opened, step: Step) -> Head:
    """The head of a block, whose attention is over all tokens, over windows, or over segments of the sequence."""
    if step.unit:
        return WindowHead(graph, block, opened, step.unit)
    return SegmentHead(graph, block, opened) if step.kept_by_segment else Head(graph, block, opened)
