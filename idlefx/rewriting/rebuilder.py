"""Copy part of a graph so that it works on some of the tokens only."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from idlefx.analysis import layouts as lay
from idlefx.analysis.edits import Axis, Cut, Read, ReadPlaces, Rearrange, Resize, WholeGrid
from idlefx.analysis.layouts import Dim, Runs
from idlefx.analysis.refusal import RefusedOperation
from idlefx.analysis.subset import Subset
from idlefx.analysis.walk import Walk
from idlefx.errors import PassError
from idlefx.graph.build import add_call
from idlefx.graph.notes import Made
from idlefx.graph.queries import carries_tensors
from idlefx.rewriting.told_layouts import products, reading, rearranging
from idlefx.runtime import gather_scatter, grids
from idlefx.runtime.windows import read_places, rearrange

aten = torch.ops.aten


@dataclass
class Rebuilder:
    """Copies nodes of a followed region onto a subset of its tokens, each when it is first asked for.

    Attributes:
        graph: The graph, which is inserted into at its insertion point.
        walk: Layouts and edits of the region.
        subset: The tokens that are there; None for all of them.
        mapping: What stands for a node of the region; holds the region's entry from the start.
        prefix: What the copies' names begin with.
        note: What the copies are made for.
        reads: What was read by position already; the same for several regions with the same tokens.
    """

    graph: fx.Graph
    walk: Walk
    subset: Subset | None
    mapping: dict[fx.Node, fx.Node]
    prefix: str
    note: Made
    reads: dict[Any, fx.Node] = field(default_factory=dict)

    def __call__(self, node: fx.Node) -> fx.Node:
        """The node's copy; a node outside the region stands for itself.

        Raises:
            PassError: An operation on the way cannot work on these tokens only.
        """
        for needed in self._needed(node):
            try:
                target, args, kwargs = self._edited(needed)
            except RefusedOperation as refusal:
                raise PassError(f"rewriting: `{needed.name}` cannot work on these tokens only: {refusal}") from refusal
            note = replace(self.note, stands_for=needed.name)
            name = self.prefix + needed.name
            copy = add_call(self.graph, target, *args, name=name, like=needed, note=note, **kwargs)
            self.mapping[needed] = self._taken_again(needed, copy)
        return self.mapping.get(node, node)

    def _add(self, target: Callable[..., Any], *args: Any, name: str, like: fx.Node) -> fx.Node:
        return add_call(self.graph, target, *args, name=self.prefix + name, like=like, note=self.note)

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """What must be copied before `node`, and itself, in order; a stack, as blocks are deeper than Python likes."""
        order: dict[fx.Node, None] = {}
        stack = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if current in self.mapping or current in order or not self._inside(current):
                continue
            if ready:
                order[current] = None
            else:
                stack += [(current, True), *((i, False) for i in reversed(self._inputs(current)))]
        return list(order)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        moved = self._moved(node)
        return node.all_input_nodes if moved is None else [moved.source]

    def _moved(self, node: fx.Node) -> Rearrange | None:
        """The chain of movement that ends at a node, where only some tokens are there and one reshape does it."""
        edits = self.walk.edits.get(node, []) if self.subset is not None else []
        return next((edit for edit in edits if isinstance(edit, Rearrange)), None)

    def _inside(self, node: fx.Node) -> bool:
        sizes = not carries_tensors(node) and any(i in self.walk for i in node.all_input_nodes)
        return node in self.walk or sizes

    def _edited(self, node: fx.Node) -> tuple[Any, Any, Any]:
        """What is called for a node: target, arguments, and those by keyword."""
        if self.subset is not None and (moved := self._moved(node)) is not None:
            return rearrange, rearranging(self.subset, moved, self(moved.source)), {}
        replaced: dict[fx.Node, fx.Node] = {}
        args = list(node.args)
        if self.subset is not None:
            for edit in self.walk.edits.get(node, []):
                self.subset.check(node, edit)
                if isinstance(edit, Read):
                    replaced[edit.operand] = self._read(node, edit)
                elif isinstance(edit, Resize):
                    entries = list(args[edit.arg])  # type: ignore[arg-type]
                    entries[edit.entry] = self._size(node, entries[edit.entry], edit.dim)
                    args[edit.arg] = entries
                elif isinstance(edit, Cut):
                    args[edit.arg] = self.subset.count(node, lay.cut(edit.runs, 0, edit.place))
                elif isinstance(edit, ReadPlaces):
                    replaced[edit.operand] = self._read_places(node, edit)
                elif isinstance(edit, WholeGrid):
                    where = (self.subset.index, products(edit.before), edit.grid)
                    few = self.mapping[edit.operand]
                    replaced[edit.operand] = self._add(grids.put_on_grid, few, *where, name="on_grid", like=node)
        done: tuple[Any, Any] = map_arg((tuple(args), node.kwargs), lambda n: replaced.get(n) or self.mapping.get(n, n))
        return node.target, *done

    def _size(self, node: fx.Node, before: Any, dim: Dim) -> Any:
        assert self.subset is not None
        count = 1
        for factor in dim:
            if factor.role != "batch" or not isinstance(before, fx.Node):
                count *= self.subset.size(node, factor)
        if not isinstance(before, fx.Node):
            return count
        batch = self._add(aten.sym_size.int, self.subset.index, 0, name="batch", like=node)
        return batch if count == 1 else self._add(operator.mul, batch, count, name="size", like=node)

    def _taken_again(self, node: fx.Node, copy: fx.Node) -> fx.Node:
        """The tokens that are there, of a copy that works on the whole grid; any other copy as it is."""
        for edit in self.walk.edits.get(node, []):
            if isinstance(edit, WholeGrid) and self.subset is not None:
                where = (self.subset.index, products(edit.after), edit.grid)
                return self._add(grids.take_from_grid, copy, *where, name="off_grid", like=node)
        return copy

    def _read(self, node: fx.Node, edit: Read) -> fx.Node:
        table = self.mapping.get(edit.operand, edit.operand)
        key = (table, edit.axes, edit.rank, edit.batch_dim)
        if key not in self.reads:
            for _ in range(edit.rank - len(table.meta["val"].shape)):
                table = self._add(aten.unsqueeze.default, table, 0, name="table", like=node)
            for axis in edit.axes:
                table = self._read_along(node, table, edit, axis)
            self.reads[key] = table
        return self.reads[key]

    def _read_places(self, node: fx.Node, edit: ReadPlaces) -> fx.Node:
        """A table at the windows or slots that work; as it is where it serves all of them."""
        assert self.subset is not None
        table = self.mapping.get(edit.operand, edit.operand)
        told = reading(self.subset, node, edit)
        key = (table, told)
        if told is not None and key not in self.reads:
            for _ in range(len(edit.output) - len(table.meta["val"].shape)):
                table = self._add(aten.unsqueeze.default, table, 0, name="table", like=node)
            self.reads[key] = self._add(read_places, table, self.subset.chosen, *told, name="read", like=node)
        return table if told is None else self.reads[key]

    def _read_along(self, node: fx.Node, table: fx.Node, edit: Read, axis: Axis) -> fx.Node:
        index = self._index(node, axis.runs)
        if edit.batch_dim is None:
            index = self._add(aten.squeeze.dim, index, 0, name="places", like=node)
            return self._add(aten.index_select.default, table, axis.dim, index, name="read", like=node)
        if edit.copies > 1:
            index = self._add(aten.repeat_interleave.self_int, index, edit.copies, 0, name="copies", like=node)
        if axis.grid:
            given = (table, index, axis.dim, edit.batch_dim, axis.grid)
            return self._add(grids.read_on_grid, *given, name="read", like=node)
        return self._add(gather_scatter.take_tokens, table, index, axis.dim, edit.batch_dim, name="read", like=node)

    def _index(self, node: fx.Node, runs: Runs) -> fx.Node:
        """Where the tokens that are there stand along an axis made of `runs`, (B, n)."""
        subset = self.subset
        assert subset is not None and subset.index is not None
        total = len(subset.fixed) + subset.kept
        parts, offset = [], 0
        for start, stop in runs:
            first = subset.count(node, ((0, start),))
            last = first + subset.count(node, ((start, stop),))
            part = subset.index
            if (first, last) != (0, total):
                part = self._add(aten.slice.Tensor, part, 1, first, last, name="part", like=node)
            if offset != start:
                part = self._add(aten.add.Tensor, part, offset - start, name="place", like=node)
            parts.append(part)
            offset += stop - start
        if len(parts) == 1:
            return parts[0]
        return self._add(aten.cat.default, parts, 1, name="places", like=node)
