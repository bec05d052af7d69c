"""Write an `einsum` of two operands as a matrix product between permutations, where it is one.

By their place in the equation its letters fall into four kinds. In `"bhid,bhjd->bhij"`, q @ kᵀ of every head, they are:

1. stacked, `b` and `h`: in both operands and in the output, one product for each;
2. summed, `d`: in both operands and not in the output;
3. rows, `i`: in the first operand and in the output;
4. columns, `j`: in the second operand and in the output.

So the operands become `bhid` and `bhdj`, and their matrix product `bhij`.
"""

from dataclasses import dataclass

import torch
from torch import fx

from idlefx.graph.build import add_call
from idlefx.graph.queries import argument
from idlefx.graph.sizes import FREE_BATCH, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class ProductEquation:
    """The equation of an `einsum` of two operands, a letter for each dimension.

    Attributes:
        first: Letters of the first operand.
        second: Letters of the second operand.
        output: Letters of the output.
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

    @property
    def is_matrix_product(self) -> bool:
        """Whether it says no more than a matrix product: no diagonal, no sum over one operand, no outer product.

        Several rows or columns stand for one matrix only where nothing is stacked.
        """
        repeats = any(len(set(operand)) < len(operand) for operand in (self.first, self.second))
        all_kept = set(self.rows + self.columns) <= set(self.output)
        all_kinds = bool(self.summed and self.rows and self.columns)
        flat = not self.stacked or len(self.rows) == len(self.columns) == 1
        return not repeats and all_kept and all_kinds and flat


def parse_equation(equation: str, ranks: list[int]) -> ProductEquation | None:
    """Read an equation of two operands.

    Args:
        equation: Such as `"bhid,bhjd->bhij"`, also with `...`, or without `->`.
        ranks: How many dimensions each operand has.

    Returns:
        The equation with capitals in the place of dots, and with the output written down; None where there are not
        two operands, or the dots leave open what they stand for.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2 or ("..." in inputs and not arrow):
        return None
    dotted = {
        rank - len(operand.replace("...", ""))
        for operand, rank in zip(operands, ranks, strict=True)
        if "..." in operand
    }
    if len(dotted) > 1:
        return None
    unused = "".join(c for c in "ABCDEFGH" if c not in equation)
    capitals = unused[: max(dotted, default=0)]
    first, second, output = (letters.replace("...", capitals) for letters in (*operands, output))
    if not arrow:
        output = "".join(sorted(c for c in first + second if (first + second).count(c) == 1))
    return ProductEquation(first, second, output)


def add_product(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Insert the matrix product that an `einsum` node stands for, or nothing where it is none.

    Args:
        graph: Its graph, which is inserted into at its insertion point.
        node: A call of `aten.einsum`.

    Returns:
        What can stand for the node.
    """
    operands = argument(node, 1)
    equation = parse_equation(argument(node, 0), [len(shape_of(operand)) for operand in operands])
    if equation is None or not equation.is_matrix_product:
        return None
    first, second = operands
    widths = _sizes(second, equation.second, equation.columns)
    if len(widths) > 1 and FREE_BATCH in widths:
        # Columns are merged and split again, for which the batch would have to be a number; rows stay as they are.
        first, second = second, first
        equation = ProductEquation(equation.second, equation.first, equation.output)
        widths = _sizes(second, equation.second, equation.columns)
    stacked, summed, rows, columns = equation.stacked, equation.summed, equation.rows, equation.columns
    left = _ordered(graph, first, equation.first, stacked + rows + summed, node)
    left = _merged(graph, left, len(stacked + rows), len(summed), node)
    right = _ordered(graph, second, equation.second, stacked + summed + columns, node)
    right = _merged(graph, right, len(stacked), len(summed), node)
    right = _merged(graph, right, len(stacked) + 1, len(columns), node)
    product = add_call(graph, aten.matmul.default, left, right, name="einsum_product", like=node)
    if len(columns) > 1:
        product = add_call(graph, aten.unflatten.int, product, len(rows), widths, name="einsum_split", like=node)
    return _ordered(graph, product, stacked + rows + columns, equation.output, node)


def _sizes(operand: fx.Node, letters: str, wanted: str) -> list[int]:
    """Sizes of the wanted ones of an operand's dimensions, which have these letters."""
    return [shape_of(operand)[letters.index(c)] for c in wanted]


def _ordered(graph: fx.Graph, operand: fx.Node, letters: str, wanted: str, like: fx.Node) -> fx.Node:
    """The operand with its dimensions, which have these letters, in the wanted order."""
    if letters == wanted:
        return operand
    order = [letters.index(c) for c in wanted]
    return add_call(graph, aten.permute.default, operand, order, name="einsum_order", like=like)


def _merged(graph: fx.Graph, operand: fx.Node, first: int, count: int, like: fx.Node) -> fx.Node:
    """The operand with `count` dimensions from `first` on as one."""
    if count == 1:
        return operand
    return add_call(graph, aten.flatten.using_ints, operand, first, first + count - 1, name="einsum_merge", like=like)
