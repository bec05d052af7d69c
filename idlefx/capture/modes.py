"""The modes of a model's parts, and what its forward does in a mode beside what a graph shows."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.utils.checkpoint
from torch import nn

from idlefx.utils.source_lines import innermost

_CHECKPOINT = torch.utils.checkpoint.__file__


class Modes:
    """In which mode each part of a model is: while the whole is in its present mode, the parts are in theirs.

    Attributes:
        training: The mode of the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.training = model, model.training
        self._parts = {part: part.training for part in model.modules()}

    @property
    def mixed(self) -> bool:
        """Whether any part is in another mode than the whole."""
        return set(self._parts.values()) != {self.training}

    def switch(self, training: bool) -> nn.Module:
        """The model in train or eval mode; its parts in their own modes where it is in that mode now."""
        self._model.train(training)
        if self.mixed and training == self.training:
            self.restore()
        return self._model

    def restore(self) -> None:
        """Put all parts into the modes that they were in."""
        for part, training in self._parts.items():
            part.training = training

    def apart(self) -> str:
        """The names of the outermost parts that are in another mode than the whole, the first three of them."""
        names: list[str] = []
        for name, part in self._model.named_modules():
            inside = any(name.startswith(outer + ".") for outer in names)
            if self._parts[part] != self.training and not inside:
                names.append(name)
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(f"`{name}`" for name in names[:3]) + rest


@contextmanager
def checkpoints_seen() -> Iterator[list[str]]:
    """Collect the lines at which what runs meanwhile calls `torch.utils.checkpoint`, however it was imported.

    Nothing is collected under a profiler written in C, whose place this takes otherwise.
    """
    lines: list[str] = []
    before: Any = sys.getprofile()
    if before is not None and not callable(before):  # cProfile before Python 3.12, which only its owner can put back
        yield lines
        return

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == _CHECKPOINT and not lines:
            lines.append(_own_line(frame))

    sys.setprofile(watch)
    try:
        yield lines
    finally:
        sys.setprofile(before)


def _own_line(frame: FrameType) -> str:
    """The innermost line of the user's own file, or of the library that calls torch."""
    stack, current = list[tuple[str, int]](), frame.f_back
    while current is not None and not current.f_globals.get("__name__", "").startswith("idlefx."):
        stack.insert(0, (current.f_code.co_filename, current.f_lineno))
        current = current.f_back
    own = innermost([file for file, _ in stack])
    return "unknown line" if own is None else f"{stack[own][0]}:{stack[own][1]}"
