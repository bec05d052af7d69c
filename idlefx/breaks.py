"""Graph breaks: where torch.compile cuts a model into parts, in which blocks do not count over the whole model.

A part may be converted if no other part has attention, such as all blocks before a head that breaks the graph.
Dynamo hands a backend each graph by itself; which graphs are parts of one model is read off the Python stack, on
which the compiled model is running.
"""

import inspect
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from idlefx.errors import PlanError

_TORCH = str(Path(torch.__file__).parent)
_REMEDY = (
    "take the break out: fullgraph=True stops at it, torch._dynamo.explain(model)(inputs) lists all; "
    "after a change of the model call torch._dynamo.reset()"
)


@dataclass
class _Model:
    """What is known of a compiled model: where its last break was, and the part that has attention."""

    place: str = "a place unknown"
    code: Any = None
    tensors: tuple[weakref.ref[torch.Tensor], ...] = ()
    blocks: str = ""


@dataclass(frozen=True)
class Part:
    """A graph that is not all of what was compiled."""

    model: _Model
    code: Any
    tensors: tuple[weakref.ref[torch.Tensor], ...]

    def claim(self, blocks: str) -> None:
        """Make this the part of its model that has attention, said in words to be `blocks`.

        Raises:
            PlanError: Another part has attention too.
        """
        known = self.model
        if known.blocks and not self._is_again():
            raise PlanError(
                f"plan: a graph break cuts the model apart at {known.place}; one part has {known.blocks}, another "
                f"{blocks}, where block indices must count over the whole model, so nothing is converted; {_REMEDY}"
            )
        known.code, known.tensors, known.blocks = self.code, self.tensors, blocks

    def excuse(self) -> str:
        """What to know of a plan for a part."""
        return (
            f"a graph break cuts the model apart at {self.model.place}: block indices count over this part, the "
            f"parts are compiled each by itself, and another part with attention would be refused; {_REMEDY}"
        )

    def _is_again(self) -> bool:
        """Whether the part with attention is this one, compiled before for another batch size or mode."""
        alive = {id(tensor) for ref in self.model.tensors if (tensor := ref()) is not None}
        return self.model.code == self.code and (not alive or alive == {id(ref()) for ref in self.tensors})


_models: weakref.WeakKeyDictionary[Any, _Model] = weakref.WeakKeyDictionary()


def forget() -> None:
    """Forget all models, as Dynamo does with its compiled code."""
    _models.clear()


def part_of(given: fx.GraphModule, inputs: list[Any]) -> Part | None:
    """Which part of a model a Dynamo graph is; None if it is all of it.

    Args:
        given: The graph that Dynamo is compiling now.
        inputs: Its inputs.
    """
    reason: Any = getattr(given, "compile_subgraph_reason", None)
    broken = reason is not None and reason.graph_break
    root, inside = _running()
    if not broken and not inside:
        return None
    model = _models.setdefault(root, _Model()) if root is not None else _Model()
    if broken and reason.user_stack:
        frame, why = reason.user_stack[-1], str(reason.reason).strip().splitlines()
        model.place = f"{frame.filename}:{frame.lineno} ({why[0] if why else 'no reason given'})"
    code = getattr(given.meta.get("dynamo_compile_id"), "frame_id", None)
    return Part(model, code, tuple(weakref.ref(t) for t in inputs if isinstance(t, torch.nn.Parameter)))


def _running() -> tuple[Any, bool]:
    """What was given to torch.compile, and whether user code of it is running around what is compiled now."""
    frame, inside = sys._getframe(1), False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("_dynamo/eval_frame.py") and name == "compile_wrapper":
            compiled = inspect.unwrap(frame.f_locals.get("fn"))
            return getattr(compiled, "__self__", compiled), inside
        # What stands above this file on the stack is the compiler at work, not the model.
        inside = not file.endswith("_dynamo/convert_frame.py") and (inside or not file.startswith(_TORCH))
        frame = frame.f_back
    return None, False
