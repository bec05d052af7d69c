"""The captured model, rewritten for one plan after the other: it is traced once."""

from dataclasses import dataclass

from torch import fx

from idlefx.analysis.blocks import find_blocks
from idlefx.capture.export import Captured
from idlefx.errors import PlanError
from idlefx.options import PlanOptions
from idlefx.pipeline import copied, rewrite, spell
from idlefx.planning.schedule import make_plan
from idlefx.records import BlockTable, Plan


@dataclass(frozen=True)
class Candidate:
    """A plan that is carried out.

    Attributes:
        plan: The plan.
        module: The graph, which shares its parameters with all others.
    """

    plan: Plan
    module: fx.GraphModule


class Candidates:
    """Makes candidates of a captured model.

    Args:
        captured: The model; only what it does in eval mode is looked at.
        base: Options that all plans share.

    Attributes:
        dense: The model as it was captured.
        blocks: Its blocks.
        usable: Indices of those that can idle as the options say.

    Raises:
        PlanError: No block can.
    """

    def __init__(self, captured: Captured, base: PlanOptions) -> None:
        self.dense, self.base = captured.eval_graph, base
        self._spelled = spell(self.dense)
        self.blocks: BlockTable = find_blocks(self._spelled, base.prefix)
        follow = base.idle == "follow"
        self.usable = [b.index for b in self.blocks if b.can_idle and not (follow and b.rest_only)]
        if not self.usable:
            raise PlanError(
                f"plan: no block of the model can {'idle' if base.idle == 'rest' else 'let idle tokens follow'}:\n"
                f"{self.blocks}"
            )

    @property
    def may_join(self) -> bool:
        """Whether groups may join from stage to stage: not those of windows, nor of segments."""
        used = [self.blocks[index] for index in self.usable]
        return self.base.idle == "follow" and not any(block.windows or block.segments for block in used)

    def plan(self, options: PlanOptions) -> Plan:
        """What the options mean for this model."""
        return make_plan(self.blocks, options)

    def make(self, options: PlanOptions) -> Candidate:
        """Carry the options out on a copy of the graph."""
        plan = self.plan(options)
        return Candidate(plan, rewrite(copied(self._spelled), plan, self.dense))
