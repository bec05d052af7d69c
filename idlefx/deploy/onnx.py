"""ONNX: the same program for other engines, in plain operations that all of them know."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from idlefx.capture.export import quiet
from idlefx.deploy.manifest import KEY
from idlefx.deploy.onnx_forms import in_onnx_forms
from idlefx.deploy.parity import check_parity
from idlefx.deploy.program import Program
from idlefx.errors import ArtifactError, InputError, first_line
from idlefx.graph.memory import Memory, written
from idlefx.graph.queries import source_line
from idlefx.runtime import ops


def check_libraries() -> None:
    """See whether the libraries are there that write and run ONNX.

    Raises:
        InputError: One is missing.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise InputError(f"package: {' and '.join(missing)} is not installed; pip install 'idlefx[onnx]'")


def write_onnx(portable: Program, manifest: Mapping[str, Any], path: Path) -> None:
    """Write a program as ONNX, weights inside, the manifest among its metadata.

    Raises:
        InputError: The disk is full.
        ArtifactError: An operation has no form in ONNX.
    """
    memory = Memory(portable.module.graph)
    if seen := [write for write in memory.writes if any(map(memory.is_seen_outside, written(write)))]:
        raise ArtifactError(
            f"package: the model writes into a buffer or an input (at {source_line(seen[0])}), and an ONNX file keeps "
            "nothing from one call to the next; package it as .pt2, which does, or take the line out"
        )
    try:
        with quiet(), ops.plain():
            program = torch.onnx.export(
                replace(portable, module=in_onnx_forms(portable.module)).export(),
                dynamo=True,
                input_names=portable.input_names,
                output_names=portable.output_names,
                custom_translation_table={torch.ops.aten.sort.stable: _sort},
                verbose=False,
            )
            assert program is not None
            if True in portable.free:
                inputs: Any = program.model.graph.inputs
                program.rename_axes({inputs[portable.free.index(True)].shape[0]: "batch"})
            program.model.metadata_props[KEY] = json.dumps(manifest)
            program.save(path, external_data=False)
    except OSError as error:
        raise InputError(f"package: cannot write into {path.parent}: {error.strerror}; make room there") from error
    except Exception as error:  # the exporter raises many kinds
        raise ArtifactError(f"package: torch.onnx cannot export the model: {first_line(error)}") from error


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A sort for torch.onnx, which has none that is stable: TopK is, as ONNX gives ties to the lower position."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def verify_onnx(portable: Program, path: Path) -> None:
    """Hold the file against the eager model, as onnxruntime runs it on the CPU.

    Raises:
        ArtifactError: onnxruntime does not run it.
        ParityError: It computes something else.
    """
    results = run_onnx(portable, path)
    check_parity(portable.module, lambda *_: results, "ONNX", (portable.tensors, {}))


def run_onnx(portable: Program, path: Path) -> list[torch.Tensor]:
    """What the file makes of the example inputs, as onnxruntime runs it on the CPU.

    Raises:
        ArtifactError: onnxruntime does not run it.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = zip(portable.input_names, portable.tensors, strict=True)
        found = session.run(None, {name: tensor.cpu().numpy() for name, tensor in feeds})
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ArtifactError(
            f"package: onnxruntime does not run the file: {first_line(error)}; "
            "idlefx.package(…, verify=False) writes it unchecked"
        ) from error
    return [torch.from_numpy(array).to(portable.tensors[0].device) for array in found]
