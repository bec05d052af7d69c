"""Artifacts: a converted model as one file that runs without its source."""

from collections.abc import Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch

from idlefx.deploy.inductor import build_artifact, open_artifact
from idlefx.deploy.io_schema import fill, take
from idlefx.deploy.manifest import check_manifest, manifest_of, metadata_of, name_of, plan_of, read_manifest
from idlefx.deploy.onnx import check_libraries, run_onnx, verify_onnx, write_onnx
from idlefx.deploy.onnx_int8 import quantise
from idlefx.deploy.parity import check_parity
from idlefx.deploy.program import Program, make_program
from idlefx.errors import InputError
from idlefx.records import ModelFacts
from idlefx.runtime.module import IdleModule
from idlefx.utils.files import check_writable, whole_file


class Artifact:
    """A packaged model, called like the model that it was made of, in eval mode and without gradients.

    A tensor, tuple or list comes back as such; a dict, data class or Hugging Face output as a dict whose parts are
    attributes too, so that `output.logits` works where neither the model's source nor its library is installed.

    Attributes:
        metadata: What the file says of itself; see `idlefx.deploy.manifest.manifest_of`.
        plan: Which block keeps how many image tokens.
        facts: What is known of the model's images and classes.
        device: Where its inputs must be.
        dtype: The number type of its images.
    """

    def __init__(self, metadata: dict[str, Any], run: Any) -> None:
        self.metadata, self.plan, self._run = metadata, plan_of(metadata["plan"]), run
        classes = metadata["classes"]
        self.facts = ModelFacts(tuple(metadata["image_size"]), metadata["data"], tuple(classes) if classes else None)
        self.device: torch.device = torch.device(metadata["device"])
        self.dtype: torch.dtype = getattr(torch, metadata["dtype"])
        names = metadata["arguments"]["fields"]
        self._signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: The inputs are not those of the model, or more or fewer images than it was packaged for.
        """
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"input: {error}; the model takes {self._signature}") from error
        tensors: dict[int, torch.Tensor] = {}
        take(self.metadata["arguments"], given, "inputs", tensors)
        self._check(tensors)
        # The compiled code reads what it is given as if it lay in order, and does not look.
        flat = [tensors[place].contiguous() for place in sorted(tensors)]
        return fill(self.metadata["result"], self._run(flat))

    def _check(self, tensors: dict[int, torch.Tensor]) -> None:
        """Compare with what was packaged; compiled code would read beyond the end of a tensor that does not fit."""
        batch = None
        for place, label in enumerate(self.metadata["inputs"]):
            tensor, name = tensors[place], label["name"]
            if name_of(tensor.dtype) != label["dtype"]:
                raise InputError(f"input: `{name}` is {name_of(tensor.dtype)}, the artifact takes {label['dtype']}")
            if tensor.device.type != (home := self.metadata["device"]):
                raise InputError(f"input: `{name}` is on {tensor.device}, the artifact runs on {home}")
            sizes, wanted = list(tensor.shape), label["shape"]
            if wanted[:1] == ["batch"] and sizes and sizes[1:] == wanted[1:]:
                batch = sizes[0] if batch is None else batch
                wanted = [batch, *wanted[1:]]
            if sizes != wanted:
                raise InputError(f"input: `{name}` has shape {tuple(sizes)}, the artifact takes {_shown(wanted)}")
        fewest, most = self.metadata["batch"]
        if batch is not None and not fewest <= batch <= most:
            raise InputError(
                f"input: {batch} images, the artifact takes {fewest} to {most}; split the batch, or package the model "
                f"with batch=({min(batch, fewest)}, {max(batch, most)})"
            )

    def __repr__(self) -> str:
        told = self.metadata
        return f"Artifact({_shown(told['inputs'][0]['shape'])} {told['dtype']} on {told['device']}, {told['batch']})"


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def package(
    idle: IdleModule,
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: tuple[int, int] = (1, 1024),
    verify: bool = True,
    int8: bool = False,
) -> Path:
    """Write a converted model into one file, weights inside, that runs without Python or without its source.

    Args:
        idle: A converted model; it stays as it is, the file holds what it does in eval mode.
        path: `….pt2` for an AOTInductor artifact, which `load` and libtorch run; `….onnx` for ONNX.
        device: Where it is to run; where the model is, by default. It must be on this machine.
        dtype: Its number type; the model's by default.
        batch: Fewest and most images of a call.
        verify: Whether to hold the result against the eager model once.
        int8: Whether `….onnx` is to multiply with weights in int8, on the CPU; it is verified before it is quantised.

    Returns:
        The path.

    Raises:
        InputError: The path cannot be written, the device is absent, or an argument makes no sense; said before
            anything is compiled.
        ArtifactError: The model cannot be compiled, or holds nothing that int8 is for.
        ParityError: The compiled model does not compute what the eager one does.
    """
    path = check_path(path, int8)
    with whole_file(path) as partial:
        portable = make_program(idle, device, dtype, batch)
        write, check = WRITERS[path.suffix]
        write(portable, manifest_of(portable), partial)
        if verify:
            check(portable, partial)
        if int8:
            quantise(partial, partial)
            if verify:
                run_onnx(portable, partial)
    return path


def check_path(path: str | Path, int8: bool = False) -> Path:
    """See whether an artifact can be written there.

    Raises:
        InputError: The name has no known ending, or one of what has no int8; a library that it needs is missing; or no
            file can be made there.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise InputError(f"package: {path} must end in .pt2, for AOTInductor, or in .onnx")
    if int8 and path.suffix != ".onnx":
        raise InputError(
            f"package: int8 is of ONNX files, and {path} is none; quantise the converted model with torchao, then "
            "package it"
        )
    if path.suffix == ".onnx":
        check_libraries()
    check_writable(path)
    return path


def _write_pt2(portable: Program, manifest: dict[str, Any], path: Path) -> None:
    build_artifact(portable.export(), path, metadata_of(manifest))


def _verify_pt2(portable: Program, path: Path) -> None:
    run = open_artifact(path)
    check_parity(portable.module, lambda *tensors: run(list(tensors)), "packaged", (portable.tensors, {}))


WRITERS = {".pt2": (_write_pt2, _verify_pt2), ".onnx": (write_onnx, verify_onnx)}


def load(path: str | Path) -> Artifact:
    """Open an artifact that `package` has written, to be called like the model it was made of.

    The file holds compiled code: load those only whose origin you trust. It is checked first, before any of it runs.

    Args:
        path: A `.pt2` file.

    Raises:
        InputError: There is no such file.
        ArtifactError: It is cut off or damaged, or was made by another torch or for another device.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_manifest(manifest, path)
    return Artifact(manifest, open_artifact(path))
