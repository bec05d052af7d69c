"""Equations of `einsum`: a letter for each dimension of each operand and of the output."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Equation:
    """What an `einsum` says, with everything written down.

    Attributes:
        operands: Letters of each operand.
        output: Letters of the output.
    """

    operands: tuple[str, ...]
    output: str


def read_equation(equation: str, ranks: list[int]) -> Equation:
    """Write down what an equation leaves out.

    Args:
        equation: Such as `"bhid,bhjd->bhij"`, also with `...`, or without `->`.
        ranks: How many dimensions each operand has.

    Returns:
        The equation with capitals in the place of dots, aligned on the right as in broadcasting, and with an output.

    Example:
        >>> read_equation("...d,ed", [3, 2])
        Equation(operands=('ABd', 'ed'), output='ABe')
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    given = inputs.split(",")
    dotted = [rank - len(letters.replace("...", "")) for letters, rank in zip(given, ranks, strict=True)]
    unused = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    capitals = "".join(unused[: max((d for d, g in zip(dotted, given, strict=True) if "..." in g), default=0)])
    operands = tuple(
        letters.replace("...", capitals[len(capitals) - count :]) for letters, count in zip(given, dotted, strict=True)
    )
    if arrow:
        return Equation(operands, output.replace("...", capitals))
    every = "".join(operands)
    return Equation(operands, capitals + "".join(sorted(c for c in set(every) - set(capitals) if every.count(c) == 1)))
