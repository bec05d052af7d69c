"""Let idle tokens follow: run the blocks of each stage on the means of its groups, and hand back what became of them.

1. At the start of a stage the groups are averaged; where tokens stand on a grid, it is flattened first, and the means
   stand in one row; where windows are stacked in the batch, they are joined first; where there is no batch, it gets
   one. Where attention is over windows, the means stand in the order of these, and where the stream itself stands in
   windows, they are laid out as it is. Where they join groups of the stage before, they are formed of the means as
   they are by then, and a mean counts as often as it has tokens.
2. Its blocks are copied onto the means, one after the other; what they read by token position is taken where the
   worker stands, as `propagation` proved it, and once for all blocks that read the same.
3. In every attention the logits of a key get the logarithm of how many tokens it stands for.
4. At the end every token takes over what was added to its worker, in all stages that were joined. What else reads the
   stream between two blocks reads a copy restored in the same way.
5. The dense blocks are removed, once all are rewritten: until then the positions of the others look unread.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from idlefx.analysis.blocks import Opened, open_blocks
from idlefx.analysis.key_axis import key_axis
from idlefx.analysis.subset import Subset
from idlefx.analysis.walk import Walk
from idlefx.graph import inference
from idlefx.graph.build import add_call
from idlefx.graph.memory import has_effect
from idlefx.graph.notes import Made, Role, only_made_for
from idlefx.graph.queries import argument, carries_tensors, remove_dead, tensor_argument
from idlefx.records import Block, Plan, Step
from idlefx.rewriting.likeness import add_groups
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.rewriting.selector_head import Head
from idlefx.rewriting.stage_tokens import StageTokens, stage_tokens
from idlefx.runtime import following

aten = torch.ops.aten


def follow_workers(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite the stages of the plan; the groups that join no others must be there (`group`)."""
    blocks = [plan.blocks[step.block] for steps in plan.stages for step in steps]
    opened = {block.index: dense for block, dense in zip(blocks, open_blocks(module.graph, blocks), strict=True)}
    # From the last to the first, so that a block's entry is still the node that the table names.
    for stages in reversed(plan.chains):
        _Chain(module.graph, plan, stages, opened).rewrite()
    remove_dead(module.graph)
    return module


@dataclass
class _Stage:
    """Groups, and what is known of them.

    Attributes:
        block: The block that opens the stage.
        step: What it does.
        tokens: How its tokens stand, and who of them follows whom.
        entry: What was averaged.
        positions: Positions of the workers among all tokens.
        means: The means.
        sizes: How many tokens each stands for.
    """

    block: Block
    step: Step
    tokens: StageTokens
    entry: fx.Node
    positions: fx.Node
    means: fx.Node
    sizes: fx.Node
    reads: dict[Any, fx.Node] = field(default_factory=dict)  # what was read by position, for all blocks
    terms: dict[Any, fx.Node] = field(default_factory=dict)  # what is added to logits, for all blocks

    def workers(self, walk: Walk) -> Subset:
        """The tokens that work, for one block of the stage."""
        return self.tokens.subset(self.positions, walk)


@dataclass
class _Chain:
    """Stages one after the other, of which each joins groups of the one before.

    Attributes:
        graph: The graph.
        plan: The plan.
        stages: The steps of each stage.
        opened: The blocks, by index.
    """

    graph: fx.Graph
    plan: Plan
    stages: Sequence[Sequence[Step]]
    opened: dict[int, Opened]
    _begun: list[_Stage] = field(default_factory=list)  # the last one is under way

    def rewrite(self) -> None:
        """Run the blocks on the means of the groups."""
        steps = [step for stage in self.stages for step in stage]
        dense = self.opened[steps[0].block]
        entry = stream = dense.entry
        for step, next_step in zip(steps, [*steps[1:], None], strict=True):
            block = self.plan.blocks[step.block]
            behind = self.opened[next_step.block] if next_step is not None else None
            readers = _readers(dense.exit, behind)
            with self.graph.inserting_before(dense.exit):
                if step.opens:
                    stream = self._average(step, dense, stream)
                stream = self._work(block, dense, stream)
                if readers:
                    dense.exit.replace_all_uses_with(self._restore(block, stream), readers.__contains__)
                    self._open_anew(readers)
            # What asks for sizes alone need not wait for the blocks.
            dense.exit.replace_all_uses_with(entry, lambda user: not _reads_tokens(user))
            dense = behind or dense

    def _open_anew(self, readers: set[fx.Node]) -> None:
        """Open the blocks of the chain again of which a node reads something else now."""
        for stage in self.stages:
            for step in stage:
                if not readers.isdisjoint(self.opened[step.block].nodes):
                    (self.opened[step.block],) = open_blocks(self.graph, [self.plan.blocks[step.block]])

    def _average(self, step: Step, dense: Opened, stream: fx.Node) -> fx.Node:
        """Begin a stage."""
        block, before = self.plan.blocks[step.block], self._begun[-1] if self._begun else None
        if before is not None:
            workers = before.workers(dense.walk)
            add_groups(Head(self.graph, block, dense, stream, workers), step, before.step)
        tokens = stage_tokens(self.graph, partial(self._add, block), block, step, dense)
        index, _, order, leaders = tokens.groups
        positions, stand_for = only_made_for(self.graph, block.index, "index"), None
        if before is not None:
            found = (aten.gather.default, before.positions, 1, index)
            positions, stand_for = self._add(block, *found, name="positions", role="positions"), before.sizes
        entry = tokens.apart(stream)
        given = (entry, index, order, leaders, *tokens.dims, stand_for)
        averages = self._add(block, following.average_groups, *given, name="averages", role="gather")
        sizes = self._add(block, operator.getitem, averages, 1, name="sizes", role="sizes")
        means = self._add(block, operator.getitem, averages, 0, name="means", role="gather")
        self._begun.append(_Stage(block, step, tokens, entry, positions, means, sizes))
        return tokens.in_row(means)

    def _restore(self, block: Block, stream: fx.Node) -> fx.Node:
        """All tokens, each with what was added to its worker in all stages so far."""
        stream = self._begun[-1].tokens.from_row(stream)
        for stage in reversed(self._begun):
            given = (stage.entry, stage.means, stream, *stage.tokens.groups, *stage.tokens.dims)
            stream = self._add(block, following.restore_tokens, *given, name="restored", role="scatter")
        return self._begun[0].tokens.whole(stream)

    def _work(self, block: Block, dense: Opened, stream: fx.Node) -> fx.Node:
        """The block on the workers alone."""
        stage = self._begun[-1]
        name, note = f"idle_{block.index}_", Made(block.index, "work")
        workers = stage.workers(dense.walk)
        rebuild = Rebuilder(self.graph, dense.walk, workers, {dense.entry: stream}, name, note, stage.reads)
        worked = rebuild(dense.exit)
        axes = [key_axis(dense.walk, core) for core in dense.cores]
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        for axis in sorted(axes, key=lambda axis: places[rebuild.mapping[axis.logits]]):
            self._weigh(block, rebuild.mapping[axis.logits], stage.tokens.term(axis, dense.walk))
        return worked

    def _weigh(self, block: Block, attention: fx.Node, makes_term: tuple[Any, ...]) -> None:
        """Add to the logits of each key how many tokens it stands for."""
        logits_or_query = tensor_argument(attention, 0)
        with self.graph.inserting_before(attention):
            term = self._term(logits_or_query, *makes_term)
            if attention.target is not aten.scaled_dot_product_attention.default:
                logits = self._add(block, aten.add.Tensor, logits_or_query, term, name="logits", role="work")
                attention.update_arg(0, logits)
            else:
                mask = argument(attention, 3, "attn_mask")
                if mask is not None:
                    term = self._add(block, following.add_to_mask, mask, term, name="mask", role="work")
                attention.args = (*attention.args[:3], term, *attention.args[4:])
                attention.kwargs = {key: told for key, told in attention.kwargs.items() if key != "attn_mask"}
        inference.record(attention)

    def _term(self, like: fx.Node, size_term: Any, *where: Any) -> fx.Node:
        stage, key = self._begun[-1], (like.meta["val"].dtype, *where)
        if key not in stage.terms:
            given = (stage.sizes, like, *where)
            stage.terms[key] = self._add(stage.block, size_term, *given, name="term", role="work")
        return stage.terms[key]

    def _add(self, block: Block, target: Any, *args: Any, name: str, role: Role) -> fx.Node:
        like, note = next(n for n in args if isinstance(n, fx.Node)), Made(block.index, role)
        return add_call(self.graph, target, *args, name=f"idle_{block.index}_{name}", like=like, note=note)


def _readers(leave: fx.Node, behind: Opened | None) -> set[fx.Node]:
    """What reads the tokens that leave a block, besides the block of the stage that takes them up."""
    inside = set(behind.nodes) if behind is not None else set()
    return {user for user in leave.users if user not in inside and _reads_tokens(user)}


def _reads_tokens(user: fx.Node) -> bool:
    return user.op == "output" or carries_tensors(user) or has_effect(user)
