"""Inductor: compiled forms of a converted model, in this process or in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import fx

from idlefx.deploy.parity import check_parity, example_of
from idlefx.errors import ArtifactError, InputError, first_line
from idlefx.runtime.labels import LABELS, without_labels
from idlefx.runtime.module import IdleModule, conversion_of, converted


def compile(idle: IdleModule, *, verify: bool = True, dynamic: bool | None = True, **options: Any) -> Any:
    """Compile a converted model with Inductor: as one graph, once for all batch sizes but one.

    Args:
        idle: A converted model, in the mode in which it will be used; it shares its parameters with the result.
        verify: Whether to hold the compiled model against the eager one once, now, which compiles it. Only in eval
            mode: training draws random numbers.
        dynamic: Whether the batch is free, where the model leaves it so; torch compiles a batch of one image anew.
            False compiles every batch size anew, which is a little faster where there are few.
        **options: As `torch.compile` takes them, such as `mode="max-autotune"`.

    Returns:
        A module that is called like `idle`.

    Raises:
        InputError: The model was not converted; when the result is called, its inputs are not those it was traced for.
        ParityError: The compiled model does not compute what the eager one does.
    """
    idle = converted(idle)
    dynamic = dynamic and conversion_of(idle).batch_free
    compiled: Any = torch.compile(idle, fullgraph=True, dynamic=dynamic, **options)
    # A free batch makes Dynamo take numbers of layers, as the epsilon of a norm, for free too, until it begins anew.
    compiled.forward = torch._dynamo.config.patch(specialize_float=True)(compiled.forward)
    # Before Dynamo sees them, whose own error would hide what is wrong with the inputs.
    compiled.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    if verify and not idle.training:
        (args, kwargs), arrays = example_of(idle), conversion_of(idle).calls.arrays
        told = {name: expected.value for name, expected in arrays.items()}
        check_parity(idle, compiled, "compiled", (args, {**kwargs, **told}))
    return compiled


def _check_inputs(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    conversion = conversion_of(compiled)
    calls = conversion.calls
    inputs = calls.in_order(args, without_labels(kwargs, conversion.loss))
    if not calls.arrays:
        return None
    # Dynamo would take arrays for tensors, whose numbers it does not know.
    taken = dict(zip(calls.expected, inputs, strict=True))
    labels = {LABELS: kwargs[LABELS]} if LABELS in kwargs else {}
    return (), {**labels, **taken}


def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile a graph with Inductor, for inference or training, whatever its inputs ask for.

    Args:
        module: A graph that Dynamo found, or one that takes the same inputs.
        inputs: What it is called with.
    """
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, inputs)
    return compiled


def build_artifact(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Compile a program and write it, weights inside, with metadata that libtorch and `zipfile` can read.

    Raises:
        InputError: The disk is full.
        ArtifactError: It cannot be compiled.
    """
    options = {"aot_inductor.metadata": metadata}
    try:
        with path.open("w+b") as file:
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    except OSError as error:
        raise InputError(f"package: cannot write into {path.parent}: {error.strerror}; make room there") from error
    except Exception as error:  # Inductor, the C++ compiler and the archive raise many kinds
        raise ArtifactError(f"package: {type(error).__name__}: {first_line(error)}") from error


def open_artifact(path: Path) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Load the compiled code of an artifact, whose file was checked.

    Returns:
        A function of the input tensors, contiguous and in order, that returns the output tensors.
    """
    try:
        return torch._inductor.aoti_load_package(str(path)).loader.run
    except Exception as error:
        raise ArtifactError(f"load: cannot load {path}: {first_line(error)}") from error
