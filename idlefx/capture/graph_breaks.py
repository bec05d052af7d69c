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
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from idlefx.errors import PlanError

_TORCH = str(Path(torch.__file__).parent)
_REMEDY = (
    "take the break out: fullgraph=True stops at it, torch._dynamo.explain(model)(inputs) lists all; "
    "after a change of the model call torch._dynamo.reset()"
)


@dataclass
class _Model:
    """What is known of a compiled model: where its last break was, and the part that has attention."""

    place: str
    code: Any = None
    tensors: tuple[weakref.ref[nn.Parameter], ...] = ()
    blocks: str = ""


@dataclass(frozen=True)
class Part:
    """A graph that is not all of what was compiled.

    Attributes:
        model: What is known of the whole.
        code: Dynamo's number of the code that it was traced from, the same when that is compiled anew.
        tensors: The parameters among its inputs.
        repeated: The module that it is, where the model has several of the kind.
    """

    model: _Model
    code: Any
    tensors: tuple[weakref.ref[nn.Parameter], ...]
    repeated: str

    def claim(self, blocks: str) -> None:
        """Make this the part of its model that has attention, said in words to be `blocks`.

        Raises:
            PlanError: Another part has attention too.
        """
        known = self.model
        if self.repeated:
            blocks += f" and is a {self.repeated}"
        if self.repeated or (known.blocks and not self._is_again()):
            raise PlanError(
                f"plan: a graph break cuts the model apart at {known.place}; one part has {blocks}, "
                f"{known.blocks and 'another ' + known.blocks + ', '}where block indices must count over the whole "
                f"model, so it is refused; {_REMEDY}"
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
    root, around, modules = _running()
    if not broken and not around:
        return None
    model = _models.setdefault(root, _Model(around)) if root is not None else _Model(around)
    if broken and reason.user_stack:
        frame, why = reason.user_stack[-1], str(reason.reason).strip().splitlines()
        model.place = f"{frame.filename}:{frame.lineno} ({why[0] if why else 'no reason given'})"
    code = getattr(given.meta.get("dynamo_compile_id"), "frame_id", None)
    tensors = tuple(weakref.ref(tensor) for tensor in inputs if isinstance(tensor, nn.Parameter))
    return Part(model, code, tensors, _twins(root, modules))


def _running() -> tuple[Any, str, list[nn.Module]]:
    """What is running around the code that is compiled now.

    Returns:
        What was given to torch.compile, the line of user code in it, if any, and its modules, the innermost first.
    """
    frame: FrameType | None = sys._getframe(1)
    around, modules = "", list[nn.Module]()
    while frame is not None:
        file, own = frame.f_code.co_filename, frame.f_locals.get("self")
        if file.endswith("_dynamo/eval_frame.py") and frame.f_code.co_name == "compile_wrapper":
            compiled = inspect.unwrap(frame.f_locals["fn"])
            return getattr(compiled, "__self__", compiled), around, modules
        if file.endswith("_dynamo/convert_frame.py"):
            around, modules = "", []  # what was called from here is the compiler, not the model
        elif not around and not file.startswith(_TORCH):
            around = f"{file}:{frame.f_lineno}"
        if isinstance(own, nn.Module):
            modules.append(own)
        frame = frame.f_back
    return None, "", []


def _twins(root: Any, modules: list[nn.Module]) -> str:
    """The name of the module that is running, if the model has others of its code: one graph may serve them all."""
    if not modules:
        return ""
    whole = root if isinstance(root, nn.Module) else modules[-1]
    code = type(modules[0]).forward
    alike = sum(type(module).forward is code for module in whole.modules())
    return f"{type(modules[0]).__name__}, of which the model has {alike}" if alike > 1 else ""
