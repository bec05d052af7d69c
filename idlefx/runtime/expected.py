"""What an input of a converted model must be like."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from idlefx.errors import InputError


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor input.

    Attributes:
        sizes: Its shape; None is a batch that is free.
        dtype: Its number type in the trace.
    """

    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    def check(self, value: Any, where: str) -> None:
        """Hold an input against this.

        Raises:
            InputError: It is of another kind, shape or number type.
        """
        if isinstance(value, fx.Proxy):  # which has no sizes: the graph is traced anew
            return
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input: `{where}` must be a tensor, as in the example; got {told(value)}")
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # where sizes are tensors
            return
        fits = value.dim() == len(self.sizes)
        for size, wanted in zip(value.shape, self.sizes, strict=False):
            fits = fits and (wanted is None or size == wanted)
        if not fits:
            wanted_shape = ", ".join(["batch" if size is None else f"{size}" for size in self.sizes])
            raise InputError(
                f"input: `{where}` has shape {_shape(value)}, but the model was traced for ({wanted_shape}); bring it "
                "to that size, or convert the model with example_inputs of the other one"
            )
        if value.dtype != self.dtype and not (self.dtype.is_floating_point and value.dtype.is_floating_point):
            raise InputError(
                f"input: `{where}` is {_kind(value.dtype)}, but was {_kind(self.dtype)} when the model was traced; "
                "convert the model with example_inputs of that type"
            )


@dataclass(frozen=True)
class ExpectedSetting:
    """An input that is no tensor, and the value it must have."""

    value: Any

    def check(self, value: Any, where: str) -> None:
        """Hold a setting against this.

        Raises:
            InputError: It has another value.
        """
        if not same(value, self.value):
            raise InputError(
                f"input: `{where}` was {self.value!r} when the model was traced and cannot be {told(value)}; convert "
                "the model with example_inputs that hold this value"
            )


@dataclass(frozen=True)
class ExpectedArray:
    """A numpy array, such as the lengths of packed images, which must have the very numbers it was traced with."""

    value: Any

    def check(self, value: Any, where: str) -> None:
        """Hold an array against this.

        Raises:
            InputError: It is no array, or has other numbers.
        """
        wanted, is_tensor = str(self.value.tolist()), isinstance(value, torch.Tensor)
        numbers = str(value.tolist()) if hasattr(value, "tolist") and not is_tensor else None
        if numbers != wanted:  # as text, in which what is no number equals itself
            raise InputError(
                f"input: `{where}` was the array {_shortened(wanted)} when the model was traced, which built it in, "
                f"and cannot be {_other(value) if numbers is None else _shortened(numbers)}; bring the images to the "
                "sizes of the example, or convert the model once for each of these"
            )


def same(value: Any, wanted: Any) -> bool:
    """Whether a setting has the value it should have."""
    if value is wanted:
        return True
    return not isinstance(value, torch.Tensor) and type(value) is type(wanted) and bool(value == wanted)


def told(value: Any) -> str:
    """A value, in a few words."""
    return f"a tensor of shape {_shape(value)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _other(value: Any) -> str:
    return told(value) if isinstance(value, torch.Tensor) else f"the {type(value).__name__} {told(value)}"


def _shortened(numbers: str) -> str:
    return numbers if len(numbers) <= 80 else f"{numbers[:60]}…"


def _shape(tensor: torch.Tensor) -> str:
    return "(" + ", ".join([f"{size}" for size in tensor.shape]) + ")"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
