"""Put a packaged model into a model repository of the Triton Inference Server.

    python -m examples.triton_repository deit_s.onnx repository
    tritonserver --model-repository=repository

writes `repository/deit_s/1/model.onnx`, `repository/deit_s/config.pbtxt` and, where the classes have names,
`repository/deit_s/labels.txt`. Names, types, shapes and the most images of a call are what the file says of itself.

Triton joins the requests that wait into one call (dynamic batching) where the batch is free from one image on and
comes first in all inputs and outputs. Otherwise a request is a call, and holds as many images as its shape says; so it
is for `.pt2` files, as Triton's PyTorch backend does not join batches for them, and names their tensors by place. The
fields are those of protobuf/model_config.proto in github.com/triton-inference-server/common.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from idlefx.deploy.manifest import KEY, read_manifest
from idlefx.errors import InputError

TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}  # fmt: skip
PLATFORMS = {".onnx": "onnxruntime_onnx", ".pt2": "torch_aoti"}
LABELS = "labels.txt"
Tensor = dict[str, Any]  # name, dtype and shape


def write_repository(artifact: Path, repository: Path, name: str, delay_us: int = 0) -> Path:
    """Add a model to a repository.

    Args:
        artifact: What `idlefx.package` has written.
        repository: A folder; made if it is not there.
        name: What the model is to be called in it.
        delay_us: Microseconds that a request may wait for others to be joined with.

    Returns:
        The folder of the model.

    Raises:
        InputError: The file is no artifact, or there is such a model already.
    """
    told, folder = read(artifact), repository / name
    if folder.exists():
        raise InputError(f"repository: {folder} is there already; give the model another name")
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(artifact, folder / "1" / f"model{artifact.suffix}")
    (folder / "config.pbtxt").write_text(config(told, name, artifact.suffix, delay_us))
    if told["classes"]:
        (folder / LABELS).write_text("".join(f"{label}\n" for label in told["classes"]))
    return folder


def read(artifact: Path) -> dict[str, Any]:
    """What an artifact says of itself; see `idlefx.deploy.manifest.manifest_of`."""
    if artifact.suffix != ".onnx":
        return read_manifest(artifact)
    import onnx

    entries = {entry.key: entry.value for entry in onnx.load(artifact, load_external_data=False).metadata_props}
    if KEY not in entries:
        raise InputError(f"repository: {artifact} was not made by idlefx.package")
    return json.loads(entries[KEY])


def config(told: dict[str, Any], name: str, suffix: str, delay_us: int = 0) -> str:
    """The text of config.pbtxt."""
    inputs, outputs = told["inputs"], told["outputs"]
    if suffix == ".pt2":
        inputs, outputs = ordinal("INPUT", inputs), ordinal("OUTPUT", outputs)
    fewest, most = told["batch"]
    joined = suffix == ".onnx" and fewest == 1 and all(tensor["shape"][:1] == ["batch"] for tensor in inputs + outputs)
    lines = [
        f"# {fewest} to {most} images in a call",
        f"name: {json.dumps(name)}",
        f'platform: "{PLATFORMS[suffix]}"',
        f"max_batch_size: {most if joined else 0}",
        *(tensor_entry("input", tensor, joined) for tensor in inputs),
        *(tensor_entry("output", tensor, joined, told["classes"]) for tensor in outputs),
    ]
    if suffix == ".pt2":  # compiled for one kind of device
        lines.append(f"instance_group [ {{ kind: KIND_{'GPU' if told['device'] == 'cuda' else 'CPU'} }} ]")
    if joined:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
    return "\n".join(lines) + "\n"


def ordinal(kind: str, tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, named by their places."""
    return [tensor | {"name": f"{kind}__{place}"} for place, tensor in enumerate(tensors)]


def tensor_entry(kind: str, tensor: Tensor, joined: bool, classes: list[str] | None = None) -> str:
    """An input or an output; Triton adds the batch itself where it joins requests, and wants one size at least."""
    sizes = tensor["shape"][1:] if joined else tensor["shape"]
    dims = [size if isinstance(size, int) else -1 for size in sizes]
    kind_of_number = TYPES[tensor["dtype"]]
    fields = [f"name: {json.dumps(tensor['name'])}", f"data_type: TYPE_{kind_of_number}", f"dims: {dims or [1]}"]
    if not dims:
        fields.append("reshape: { shape: [ ] }")
    if classes and tensor["shape"][1:] == [len(classes)]:
        fields.append(f'label_filename: "{LABELS}"')
    return f"{kind} [\n  {{\n" + "".join(f"    {field}\n" for field in fields) + "  }\n]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a packaged model into a Triton model repository.")
    parser.add_argument("artifact", type=Path, help="a .onnx or .pt2 file of idlefx.package")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name", help="of the model; that of the file if not told")
    parser.add_argument("--delay", type=int, default=0, metavar="MICROSECONDS", help="wait so long for more requests")
    options = parser.parse_args()
    name = options.name or options.artifact.stem
    print(write_repository(options.artifact, options.repository, name, options.delay))


if __name__ == "__main__":
    main()
