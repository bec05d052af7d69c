"""What an artifact says of itself: plain JSON inside the file, which is read before anything in it runs."""

import json
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from idlefx.deploy.program import Program
from idlefx.errors import ArtifactError, InputError, first_line
from idlefx.records import Block, BlockTable, Plan, Step
from idlefx.runtime.module import conversion_of
from idlefx.utils.devices import present
from idlefx.utils.versions import versions

KEY = "idlefx"  # of the JSON among the metadata of the file
FORMAT = 2
CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")  # as torch names them; each has what those before it have


def manifest_of(portable: Program) -> dict[str, Any]:
    """What is to be known of a program: how it is called, what it does, where it runs, who made it.

    Returns:
        `inputs` and `outputs`, each with name, shape and dtype, the free batch being called "batch"; `classes`, the
        names of the classes, and `data`, how images are prepared, or None where they are not known; `batch`, fewest
        and most images; `image_size`, `device`, `dtype`, `machine`, `versions`; `options`, what was asked for, and
        `plan`, what came of it; `arguments` and `result` as `idlefx.deploy.io_schema` describes them.
    """
    conversion = conversion_of(portable.idle)
    images = max(portable.tensors, key=torch.numel)
    classes = conversion.facts.classes
    if not any(shape[1:] == [len(classes or ())] for shape in portable.output_shapes):
        classes = None  # the head is not the one that they belong to
    inputs = zip(portable.input_names, portable.input_shapes, portable.tensors, strict=True)
    outputs = zip(portable.output_names, portable.output_shapes, portable.results, strict=True)
    return {
        "format": FORMAT,
        "versions": versions(),
        "device": images.device.type,
        "dtype": name_of(images.dtype),
        "machine": _machine(images.device),
        "batch": list(portable.batch),
        "image_size": list(images.shape[1:]),
        "data": json.loads(json.dumps(conversion.facts.data, default=str)),
        "classes": classes and list(classes),
        "inputs": [{"name": n, "shape": s, "dtype": name_of(t.dtype)} for n, s, t in inputs],
        "outputs": [{"name": n, "shape": s, "dtype": name_of(t.dtype)} for n, s, t in outputs],
        "arguments": portable.arguments,
        "result": portable.result,
        "options": conversion.options.to_dict(),
        "plan": facts_of_plan(conversion.plan),
    }


def metadata_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The manifest as strings: the whole as JSON, and in words of their own what a program without JSON needs."""
    words = {name: " ".join(map(str, manifest[name])) for name in ("batch", "image_size")}
    words["inputs"] = "\n".join(f"{t['dtype']} {_plain(t['shape'])} {t['name']}" for t in manifest["inputs"])
    words |= {name: manifest[name] for name in ("device", "dtype")}
    return {KEY: json.dumps(manifest), **{f"{KEY}_{name}": word for name, word in words.items()}}


def _plain(shape: Sequence[int | str]) -> str:
    """A shape without spaces, such as batch,3,224,224."""
    return ",".join(str(size).replace(" ", "") for size in shape) or "scalar"


def name_of(dtype: torch.dtype) -> str:
    """A number type in plain words."""
    return str(dtype).removeprefix("torch.")


def facts_of_plan(plan: Plan) -> dict[str, Any]:
    """A plan in plain data: its steps, and the table of the blocks that they refer to."""
    return asdict(plan)


def plan_of(facts: Mapping[str, Any]) -> Plan:
    """The plan that `facts_of_plan` told."""
    blocks = tuple(Block(**_with_tuples(block)) for block in facts["blocks"]["blocks"])
    table = BlockTable(blocks, facts["blocks"]["macs"])
    steps = tuple(Step(**_with_tuples(step)) for step in facts["steps"])
    return Plan(steps, table, facts["reselect"], facts["multiple_of"], facts.get("idle", "rest"))


def _with_tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()}


def _machine(device: torch.device) -> dict[str, str]:
    """What compiled code depends on, beyond torch."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"system": platform.system(), "gpu": f"{major}.{minor}"}
    level = torch.backends.cpu.get_cpu_capability()
    return {"system": platform.system(), "processor": platform.machine(), "level": level}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact, whose file is looked through for damage; nothing in it is run.

    Raises:
        InputError: There is no such file.
        ArtifactError: It is not whole, or no artifact.
    """
    if path.suffix == ".onnx":
        raise InputError(f"load: {path} is an ONNX file; run it with onnxruntime or another engine for ONNX")
    if not path.is_file():
        raise InputError(f"load: there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            metadata = [json.loads(archive.read(name)) for name in names] if damaged is None else []
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise ArtifactError(
            f"load: {path} is cut off or damaged: {first_line(error)}; copy or package it anew"
        ) from error
    if damaged is not None:
        raise ArtifactError(f"load: {path} is damaged in {damaged}; copy or package it anew")
    told = next((each[KEY] for each in metadata if isinstance(each, dict) and KEY in each), None)
    if told is None:
        raise ArtifactError(f"load: {path} was not made by idlefx.package")
    manifest: dict[str, Any] = json.loads(told)
    return manifest


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """See whether an artifact can run here.

    Raises:
        ArtifactError: It was made by another torch, for another device or for another machine; names both.
    """
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"load: {path} has format {manifest.get('format')}, this idlefx reads format {FORMAT}; package it anew, "
            f"or install idlefx {manifest['versions']['idlefx']}"
        )
    made, here = (str(v).partition("+")[0] for v in (manifest["versions"]["torch"], torch.__version__))
    if made != here:
        raise ArtifactError(
            f"load: {path} was made by torch {made}, this is torch {here}; package it anew with torch {here}, "
            f"or install torch {made}"
        )
    try:
        device = present(manifest["device"])
    except InputError as error:
        raise ArtifactError(
            f"load: {path} was made for {manifest['device']}, which this machine lacks ({first_line(error)}); package "
            "it for a device that is here"
        ) from error
    machine = _machine(device)
    for what, wanted in manifest["machine"].items():
        found = machine.get(what, "none")
        levels = (wanted, found)
        if what == "level" and all(level in CPU_LEVELS for level in levels):
            fits = CPU_LEVELS.index(wanted) <= CPU_LEVELS.index(found)
        else:
            fits = wanted == found
        if not fits:
            raise ArtifactError(
                f"load: {path} was made for a machine with {what} {wanted}, this one has {found}; package it here"
            )
