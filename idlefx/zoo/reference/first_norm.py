"""The norm that a block begins with, found by running it: the first map of the stream that forgets its length.

The norm may see the dimensions of the stream in another order, the rows and columns of a grid in one dimension, or
windows of an image in as many entries of the batch.
"""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}
FORGETS = 0.1  # relative difference that doubling the input may make, for what is added to variances


class _Found(Exception):
    """Ends a run whose rest nobody needs; holds the normalised stream."""


class _Calls(TorchFunctionMode):
    """Watches for norms of a stream that are called as functions."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream
        self._tries = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in NORMS and (order := self._order(args[0])):
            raise _Found(self._in_order(result, order))
        return result

    def watch(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """The same for norms that are modules; inner modules come before those that hold them."""
        order = self._order(args[0]) if len(args) == 1 else None
        if order is None or not isinstance(result, Tensor):
            return
        if result.shape == args[0].shape:
            self._tries = True
            doubled = module(2 * args[0])
            self._tries = False
            if (doubled - result).norm() < FORGETS * result.norm():
                raise _Found(self._in_order(result, order))

    def _order(self, x: Any) -> tuple[int, ...] | None:
        """In which order the dimensions of a tensor are those of the stream; None if it is not the stream."""
        if self._tries or not isinstance(x, Tensor) or x.numel() != self.stream.numel() or x.ndim not in (2, 3, 4, 5):
            return None
        orders = ((0, *rest) for rest in permutations(range(1, x.ndim)))
        return next((order for order in orders if torch.equal(self._in_order(x, order), self.stream)), None)

    def _in_order(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        """Dimensions in another order, with the sizes of the stream."""
        return x.permute(order).reshape(self.stream.shape)


def first_norm(stream: Tensor, run: Callable[[], Any]) -> Tensor | None:
    """The normalised stream, as a block's first norm gives it while the block runs; None if it begins with none.

    Args:
        stream: The block's input (B, N, C).
        run: Runs the block.
    """
    calls = _Calls(stream)
    hook = register_module_forward_hook(calls.watch)
    try:
        with calls:
            run()
    except _Found as found:
        return found.args[0]
    finally:
        hook.remove()
    return None
