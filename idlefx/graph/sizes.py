"""Sizes of traced tensors as plain numbers: the free batch, which the trace leaves a symbol, is stood in for."""

from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

FREE_BATCH = 1_000_003  # marks the batch where shapes are reasoned about: a prime that no model dimension contains
SMALL_BATCH = 2  # for running a few operations for real; a batch of one would hide that images are told apart
ONE_IMAGE = 1  # for counting what one image costs


def number(size: Any, batch: int = FREE_BATCH) -> int:
    """A size, or a node that carries one, as a plain number, the free batch replaced by `batch`."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        return _for_batch(sympy.sympify(size.node.expr), batch)
    return int(size)


@lru_cache(1024)  # a model has few different sizes, which the analysis asks for thousands of times
def _for_batch(expression: sympy.Expr, batch: int) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def follows_batch(size: Any) -> bool:
    """Whether a size changes with the batch."""
    return isinstance(size, torch.SymInt) and bool(sympy.sympify(size.node.expr).free_symbols)


def formula(size: Any, batch: int | str) -> int | str:
    """A size as a number, or as a formula of the free batch where that is given a name, such as "4*batch"."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = sympy.sympify(size.node.expr)
    of_batch = expression.subs(dict.fromkeys(expression.free_symbols, batch))
    return int(of_batch) if of_batch.is_Integer else str(of_batch)


def plain_shape(tensor: torch.Tensor, batch: int = FREE_BATCH) -> list[int]:
    """The shape of a traced tensor as plain numbers."""
    return [number(size, batch) for size in tensor.shape]


def shape_of(node: Any, batch: int = FREE_BATCH) -> list[int]:
    """The shape of a node that carries a tensor, as plain numbers.

    To compare symbolic sizes would record a guard, and might so fix the batch.
    """
    return plain_shape(node.meta["val"], batch)
