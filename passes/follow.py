"""Let idle tokens follow: run the blocks of each stage on the means of its groups, and hand back what became of them.

1. At the start of a stage the groups are averaged.
2. Its blocks are copied onto the means, one after the other; what they read by token position is taken where the
   worker stands, as `propagation` proved it, and once for all blocks that read the same.
3. In every attention the logits of a key get the logarithm of how many tokens it stands for.
4. At the end every token takes over what was added to its worker. What else reads the stream between two blocks reads
   a copy restored in the same way.
5. The dense blocks are removed, once all are rewritten: until then the positions of the others look unread.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from idlefx.analysis.blocks import Opened, open_blocks
from idlefx.analysis.key_axis import KeyAxis, key_axis
from idlefx.analysis.subset import Subset
from idlefx.graph import inference
from idlefx.graph.build import add_call
from idlefx.graph.memory import has_effect
from idlefx.graph.notes import Made, Role, only_made_for
from idlefx.graph.queries import argument, carries_tensors, remove_dead, tensor_argument
from idlefx.records import Block, Plan, Step
from idlefx.rewriting.rebuilder import Rebuilder
from idlefx.runtime import following

aten = torch.ops.aten


def follow_workers(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Rewrite the stages of the plan; their groups must be there (`group`)."""
    blocks = [plan.blocks[step.block] for steps in plan.stages for step in steps]
    opened = {block.index: dense for block, dense in zip(blocks, open_blocks(module.graph, blocks), strict=True)}
    # From the last to the first, so that a block's entry is still the node that the table names.
    for steps in reversed(plan.stages):
        _Stage(module.graph, plan, steps, opened).rewrite()
    remove_dead(module.graph)
    return module


@dataclass
class _Stage:
    """Blocks that run on the same groups, one after the other.

    Attributes:
        graph: The graph.
        plan: The plan.
        steps: Those of the stage.
        opened: The blocks, by index.
    """

    graph: fx.Graph
    plan: Plan
    steps: Sequence[Step]
    opened: dict[int, Opened]
    _reads: dict[Any, fx.Node] = field(default_factory=dict)  # what was read by position, for all blocks
    _terms: dict[Any, fx.Node] = field(default_factory=dict)  # what is added to logits, for all blocks

    def rewrite(self) -> None:
        """Run the stage on the means of its groups."""
        blocks = [self.plan.blocks[step.block] for step in self.steps]
        dense = first = self.opened[blocks[0].index]
        with self.graph.inserting_before(first.exit):
            means = self._average(first.entry)
        stream = means
        for block, next_block in zip(blocks, [*blocks[1:], None], strict=True):
            behind = self.opened[next_block.index] if next_block is not None else None
            readers = _readers(dense.exit, behind)
            with self.graph.inserting_before(dense.exit):
                stream = self._work(block, dense, stream)
                if readers:
                    restored = self._restore(block, first.entry, means, stream)
                    dense.exit.replace_all_uses_with(restored, readers.__contains__)
                    self._open_anew(readers)
            # What asks for sizes alone need not wait for the blocks.
            dense.exit.replace_all_uses_with(first.entry, lambda user: not _reads_tokens(user))
            dense = behind or dense

    def _open_anew(self, readers: set[fx.Node]) -> None:
        """Open the blocks of the stage again of which a node reads something else now."""
        for step in self.steps:
            if not readers.isdisjoint(self.opened[step.block].nodes):
                (self.opened[step.block],) = open_blocks(self.graph, [self.plan.blocks[step.block]])

    @property
    def _block(self) -> Block:
        """The block that opens the stage."""
        return self.plan.blocks[self.steps[0].block]

    @property
    def _dims(self) -> tuple[int, int]:
        return self._block.token_dim, self._block.batch_dim

    def _made(self, role: Role) -> fx.Node:
        return only_made_for(self.graph, self._block.index, role)

    def _average(self, stream: fx.Node) -> fx.Node:
        given = (stream, self._made("index"), self._made("order"), self._made("leaders"), *self._dims)
        averages = self._add(self._block, following.average_groups, *given, name="averages", role="gather")
        self._add(self._block, operator.getitem, averages, 1, name="sizes", role="sizes")
        return self._add(self._block, operator.getitem, averages, 0, name="means", role="gather")

    def _restore(self, block: Block, entry: fx.Node, means: fx.Node, stream: fx.Node) -> fx.Node:
        groups = (self._made("index"), self._made("place"), self._made("order"), self._made("leaders"))
        given = (entry, means, stream, *groups, *self._dims)
        return self._add(block, following.restore_tokens, *given, name="restored", role="scatter")

    def _work(self, block: Block, dense: Opened, stream: fx.Node) -> fx.Node:
        """The block on the workers alone."""
        chosen = Subset(self._made("index"), block.prefix, block.image_positions, self.steps[0].kept)
        name, note = f"idle_{block.index}_", Made(block.index, "work")
        rebuild = Rebuilder(self.graph, dense.walk, chosen, {dense.entry: stream}, name, note, self._reads)
        worked = rebuild(dense.exit)
        axes = [key_axis(dense.walk, core) for core in dense.cores]
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        for axis in sorted(axes, key=lambda axis: places[rebuild.mapping[axis.logits]]):
            self._weigh(block, rebuild.mapping[axis.logits], axis)
        return worked

    def _weigh(self, block: Block, attention: fx.Node, axis: KeyAxis) -> None:
        """Add to the logits of each key how many tokens it stands for."""
        logits_or_query = tensor_argument(attention, 0)
        with self.graph.inserting_before(attention):
            term = self._term(logits_or_query, axis)
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

    def _term(self, like: fx.Node, axis: KeyAxis) -> fx.Node:
        where = (axis.rank, axis.dim, axis.batch_dim, axis.copies)
        key = (like.meta["val"].dtype, *where)
        if key not in self._terms:
            given = (self._made("sizes"), like, *where)
            self._terms[key] = self._add(self._block, following.size_term, *given, name="term", role="work")
        return self._terms[key]

    def _add(self, block: Block, target: Any, *args: Any, name: str, role: Role) -> fx.Node:
        like, note = next(n for n in args if isinstance(n, fx.Node)), Made(block.index, role)
        return add_call(self.graph, target, *args, name=f"idle_{block.index}_{name}", like=like, note=note)


def _readers(leave: fx.Node, behind: Opened | None) -> set[fx.Node]:
    """What reads the tokens that leave a block, besides the block of the stage that takes them up."""
    inside = set(behind.nodes) if behind is not None else set()
    return {user for user in leave.users if user not in inside and _reads_tokens(user)}


def _reads_tokens(user: fx.Node) -> bool:
    return user.op == "output" or carries_tensors(user) or has_effect(user)
