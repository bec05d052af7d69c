"""Write an `einsum` as matrix products between permutations.

Operands are taken two at a time, from the left. First each is rid of what concerns it alone: of a letter that stands
in it twice it keeps the diagonal, and letters that nothing else has are summed. Then by its place in the equation a
letter is of one of four kinds. In `"bhid,bhjd->bhij"`, q @ kᵀ of every head, they are:

1. stacked, `b` and `h`: in both operands and kept, one product for each;
2. summed, `d`: in both operands and not kept;
3. rows, `i`: in the first operand alone;
4. columns, `j`: in the second operand alone.

So the operands become `bhid` and `bhdj`, and their matrix product `bhij`. Where nothing is summed it is a product of
numbers, entry by entry.
"""

from dataclasses import dataclass

import torch
from torch import fx

from idlefx.graph.build import add_call
from idlefx.graph.equations import read_equation
from idlefx.graph.queries import argument
from idlefx.graph.sizes import follows_batch, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """A tensor and the letters of its dimensions."""

    node: fx.Node
    letters: str

    def sizes(self, wanted: str) -> list[int]:
        """Sizes of some dimensions as `unflatten` takes them: -1 for one that changes with the batch."""
        shape = self.node.meta["val"].shape
        sizes = [shape[self.letters.index(c)] for c in wanted]
        return [-1 if follows_batch(size) else int(size) for size in sizes]


@dataclass(frozen=True)
class Pair:
    """The letters of two operands and of what is kept of both.

    Attributes:
        first: Letters of the first operand.
        second: Letters of the second operand.
        output: Letters that are kept.
    """

    first: str
    second: str
    output: str

    @property
    def stacked(self) -> str:
        """Letters of both operands that are kept, in the output's order."""
        return "".join(c for c in self.output if c in self.first and c in self.second)

    @property
    def summed(self) -> str:
        """Letters of both operands that are not kept, in the first operand's order."""
        return "".join(c for c in self.first if c in self.second and c not in self.output)

    @property
    def rows(self) -> str:
        """Letters of the first operand alone."""
        return "".join(c for c in self.first if c not in self.second)

    @property
    def columns(self) -> str:
        """Letters of the second operand alone."""
        return "".join(c for c in self.second if c not in self.first)


def add_products(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Insert the matrix products that an `einsum` node stands for.

    Args:
        graph: Its graph, which is inserted into at its insertion point.
        node: A call of `aten.einsum`.

    Returns:
        What can stand for the node; None where several sizes that change with the batch would have to be merged.
    """
    operands = argument(node, 1)
    equation = read_equation(argument(node, 0), [len(shape_of(operand)) for operand in operands])
    builder = _Builder(graph, node)
    terms = [Term(operand, letters) for operand, letters in zip(operands, equation.operands, strict=True)]
    terms = [builder.without_broadcast(term, terms) for term in terms]
    while len(terms) > 1:
        first, second, *rest = terms
        later = "".join(term.letters for term in rest) + equation.output
        first = builder.alone(first, second.letters + later)
        second = builder.alone(second, first.letters + later)
        kept = equation.output if not rest else "".join(c for c in later if c in first.letters + second.letters)
        product = builder.product(first, second, "".join(dict.fromkeys(kept)))
        if product is None:
            return None
        terms = [product, *rest]
    return builder.ordered(builder.alone(terms[0], equation.output), equation.output).node


class _Builder:
    """Inserts the operations that one `einsum` becomes."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like

    def add(self, target: fx.node.Target, *args: object, name: str) -> fx.Node:
        return add_call(self.graph, target, *args, name=f"einsum_{name}", like=self.like)

    def without_broadcast(self, term: Term, terms: list[Term]) -> Term:
        """Drop dimensions of size one where another operand has more under the same letter."""
        wide = {c for t in terms for c, size in zip(t.letters, shape_of(t.node), strict=True) if size != 1}
        for c in [c for c, size in zip(term.letters, shape_of(term.node), strict=True) if size == 1 and c in wide]:
            squeezed = self.add(aten.squeeze.dim, term.node, term.letters.index(c), name="squeeze")
            term = Term(squeezed, term.letters.replace(c, "", 1))
        return term

    def alone(self, term: Term, others: str) -> Term:
        """Do what concerns one operand only: diagonals, and sums over letters that nothing else has."""
        while repeated := next((c for c in term.letters if term.letters.count(c) > 1), ""):
            one, other = term.letters.index(repeated), term.letters.rindex(repeated)
            diagonal = self.add(aten.diagonal.default, term.node, 0, one, other, name="diagonal")
            rest = "".join(c for at, c in enumerate(term.letters) if at not in (one, other))
            term = Term(diagonal, rest + repeated)
        unique = [at for at, c in enumerate(term.letters) if c not in others]
        if unique:
            total = self.add(aten.sum.dim_IntList, term.node, unique, name="sum")
            term = Term(total, "".join(c for c in term.letters if c in others))
        return term

    def product(self, first: Term, second: Term, output: str) -> Term | None:
        """The product of two operands with what is kept in that order."""
        pair = Pair(first.letters, second.letters, output)
        if not pair.summed:
            a, b = self.broadcast(first, output), self.broadcast(second, output)
            return Term(self.add(aten.mul.Tensor, a, b, name="product"), output)
        if not pair.stacked and len(pair.columns) > 1 and -1 in second.sizes(pair.columns):
            first, second = second, first  # rows stay as they are; columns are merged
            pair = Pair(first.letters, second.letters, output)
        stacked, summed, rows, columns = pair.stacked, pair.summed, pair.rows, pair.columns
        heights, widths = first.sizes(rows), second.sizes(columns)
        merges_rows = len(rows) != 1 and bool(stacked or not rows)
        if (merges_rows and heights.count(-1) > 1) or widths.count(-1) > 1:
            return None
        left = self.merged(self.ordered(first, stacked + rows + summed).node, len(stacked + rows), len(summed))
        left = self.merged(left, len(stacked), len(rows)) if merges_rows else left
        right = self.merged(self.ordered(second, stacked + summed + columns).node, len(stacked), len(summed))
        right = self.merged(right, len(stacked) + 1, len(columns))
        result = self.add(aten.matmul.default, left, right, name="product")
        result = self.split(result, len(stacked) + (1 if merges_rows else len(rows)), widths)
        result = self.split(result, len(stacked), heights) if merges_rows else result
        return self.ordered(Term(result, stacked + rows + columns), output)

    def broadcast(self, term: Term, letters: str) -> fx.Node:
        """The operand with a dimension for each of the letters, of size one where it has none."""
        node = self.ordered(term, "".join(c for c in letters if c in term.letters)).node
        for at in [at for at, c in enumerate(letters) if c not in term.letters]:
            node = self.add(aten.unsqueeze.default, node, at, name="unsqueeze")
        return node

    def ordered(self, term: Term, wanted: str) -> Term:
        """The operand with its dimensions in the wanted order."""
        if term.letters == wanted:
            return term
        order = [term.letters.index(c) for c in wanted]
        return Term(self.add(aten.permute.default, term.node, order, name="order"), wanted)

    def merged(self, node: fx.Node, first: int, count: int) -> fx.Node:
        """The node with `count` dimensions from `first` on as one; a new one of size one for none."""
        if count == 0:
            return self.add(aten.unsqueeze.default, node, first, name="unsqueeze")
        if count == 1:
            return node
        return self.add(aten.flatten.using_ints, node, first, first + count - 1, name="merge")

    def split(self, node: fx.Node, dim: int, sizes: list[int]) -> fx.Node:
        """Undo `merged`."""
        if not sizes:
            return self.add(aten.squeeze.dim, node, dim, name="squeeze")
        return node if len(sizes) == 1 else self.add(aten.unflatten.int, node, dim, sizes, name="split")
