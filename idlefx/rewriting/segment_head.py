"""Choose the tokens that work in each segment of the sequence that attention is over.

1. A token is scored in its segment, by the mean query of that. Segments that are equally long and stand together are
   scored together, as if each were an image: a block has an attention for each segment, whose queries and keys stand
   one behind the other in the batch then.
2. The scores of all segments, one after the other, are those of the sequence.
"""

from itertools import groupby

import torch
from torch import fx

from idlefx.analysis.attention import Core
from idlefx.analysis.blocks import Opened
from idlefx.analysis.segments import segment_of
from idlefx.analysis.subset import Segment, segments_of
from idlefx.records import Block, Step
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.rewriting.selector_head import Head
from idlefx.runtime import segments

aten = torch.ops.aten


class SegmentHead(Head):
    """The selector head of a block whose attention is over segments of the sequence."""

    def build(self, step: Step) -> fx.Node:
        """The scores (B, N) of a step."""
        alike = groupby(
            segments_of(self.block.segments, step.kept_by_segment), lambda segment: segment.stop - segment.start
        )
        scores = [_Alike(self.graph, self.block, self.opened, tuple(run)).build(step) for _, run in alike]
        return scores[0] if len(scores) == 1 else self.add(aten.cat.default, scores, 1, name="scores")

    def choose(self, step: Step, among: fx.Node | None) -> fx.Node:
        """Insert the choice; gives the positions of what works."""
        given = (self.build(step), self.block.segments, step.kept_by_segment, among)
        return self.tell(self.add(segments.choose_in_segments, *given, name="choice", role="choice"))


class _Alike(Head):
    """A head of neighbouring segments that are equally long."""

    def __init__(self, graph: fx.Graph, block: Block, opened: Opened, together: tuple[Segment, ...]) -> None:
        super().__init__(graph, block, opened)
        self.together = together

    @property
    def score_count(self) -> int:
        """How many tokens are scored together."""
        return self.together[0].stop - self.together[0].start

    def build(self, step: Step) -> fx.Node:
        """Their scores (B, tokens of all of them)."""
        scores, count = super().build(step), len(self.together)
        if self.walk.has_batch:  # in front of which the segments stand
            scores = self.add(aten.unflatten.int, scores, 0, [count, -1], name="parts")
            scores = self.add(aten.transpose.int, scores, 0, 1, name="parts")
            return self.add(aten.flatten.using_ints, scores, 1, name="parts")
        return self.add(aten.reshape.default, scores, [1, -1], name="parts")

    def tokens_first(self, stream: fx.Node) -> fx.Node:
        """Something laid out as the stream, as (segments * B, tokens of each, C)."""
        tokens, size = super().tokens_first(stream), self.score_count
        first, last = self.together[0].start, self.together[-1].stop
        tokens = self.add(aten.slice.Tensor, tokens, 1, first, last, name="x")
        tokens = self.add(aten.unflatten.int, tokens, 1, [-1, size], name="x")
        tokens = self.add(aten.transpose.int, tokens, 0, 1, name="x")
        return self.add(aten.flatten.using_ints, tokens, 0, 1, name="x")

    def _heads(self, rebuild: Rebuilder, *, keys: bool) -> fx.Node:
        by_segment = [
            self._joined([self.heads_of(core, rebuild, keys=keys) for core in cores]) for cores in self._cores
        ]
        return by_segment[0] if len(by_segment) == 1 else self.add(aten.cat.default, by_segment, 0, name="segments")

    @property
    def _cores(self) -> list[list[Core]]:
        """The attentions over each segment."""
        starts = [segment_of(self.walk, core) for core in self.opened.cores]
        cores = list(zip(starts, self.opened.cores, strict=True))
        return [[core for start, core in cores if start == segment.start] for segment in self.together]
