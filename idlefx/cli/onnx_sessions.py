"""Models as onnxruntime runs them: packaged by `idlefx.package`, and called like the models."""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from idlefx.deploy.artifacts import package
from idlefx.runtime.module import conversion_of, converted


class OnnxSession(nn.Module):
    """A packaged model in onnxruntime on the CPU, with as many threads as torch has.

    Args:
        idle: A converted model, on the CPU.
        batch: The most images of a call.

    Raises:
        IdleFxError: It cannot be packaged.
    """

    def __init__(self, idle: nn.Module, batch: int) -> None:
        super().__init__()
        self.source = converted(idle)
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Sessions take turns: threads of the last one would go on waiting busily while another is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with TemporaryDirectory() as folder:
            path = package(self.source, Path(folder) / "model.onnx", batch=(1, max(2, batch)), verify=False)
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the file returns, as arrays."""
        leaves = conversion_of(self.source).calls.flat(args, kwargs)
        tensors = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return self.session.run(None, dict(zip(self.names, tensors, strict=True)))
