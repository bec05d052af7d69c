"""Models as onnxruntime runs them: packaged by `idlefx.package`, and called like the models."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from idlefx.bench.results import ONNXRUNTIME_INT8
from idlefx.deploy.artifacts import package
from idlefx.deploy.onnx_int8 import quantise
from idlefx.runtime.module import conversion_of, converted


class OnnxSession(nn.Module):
    """A packaged model in onnxruntime on the CPU, with as many threads as torch has.

    Args:
        idle: A converted model.
        path: The file that was made of it.
    """

    def __init__(self, idle: nn.Module, path: Path) -> None:
        super().__init__()
        self.source = converted(idle)
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Sessions take turns: threads of the last one would go on waiting busily while another is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the file returns, as arrays."""
        leaves = conversion_of(self.source).calls.flat(args, kwargs)
        tensors = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return self.session.run(None, dict(zip(self.names, tensors, strict=True)))


def open_sessions(idle: nn.Module, runtimes: Sequence[str], batch: int) -> dict[str, OnnxSession]:
    """A converted model on the CPU, packaged once, by how onnxruntime is to run it.

    Args:
        idle: The model.
        runtimes: `onnxruntime` for its own number type, `onnxruntime-int8` for products with weights in int8.
        batch: The most images of a call.

    Raises:
        IdleFxError: It cannot be packaged, or holds nothing to quantise.
    """
    with TemporaryDirectory() as folder:
        path = package(converted(idle), Path(folder) / "model.onnx", batch=(1, max(2, batch)), verify=False)
        paths = dict.fromkeys(runtimes, path)
        if ONNXRUNTIME_INT8 in paths:
            paths[ONNXRUNTIME_INT8] = path.with_stem("int8")
            quantise(path, paths[ONNXRUNTIME_INT8])
        return {runtime: OnnxSession(idle, file) for runtime, file in paths.items()}
