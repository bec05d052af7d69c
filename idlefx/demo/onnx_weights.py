"""Read the weights of the real model out of its ONNX file, by timm's names."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from idlefx.errors import InputError

RENAMED = (  # from Hugging Face's names of DINOv2
    ("backbone.embeddings.patch_embeddings.projection.", "backbone.patch_embed.proj."),
    ("backbone.embeddings.cls_token", "backbone.cls_token"),
    ("backbone.encoder.layer.", "backbone.blocks."),
    ("backbone.layernorm.", "backbone.norm."),
    (".attention.attention.query.", ".attn.qkv."),
    (".attention.output.dense.", ".attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of backbone and decoder; positions (1, 1 + 37 * 37, C), as they are stored.

    Raises:
        InputError: The library that reads ONNX is not installed.
    """
    if find_spec("onnx") is None:
        raise InputError("fetch: onnx, which reads the weights, is not installed; pip install 'idlefx[demo]'")
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    named = {name: tensor for name, tensor in stored.items() if not name.startswith("onnx::")}
    for node in graph.node:  # the matrices have no names of their own, but the nodes that multiply by them
        if node.op_type == "MatMul" and node.input[1] in stored:
            named[node.name.strip("/").replace("/", ".").removesuffix("MatMul") + "weight"] = stored[node.input[1]].T
    places = [stored[next(name for name in stored if name.startswith(kind))] for kind in ("onnx::Concat", "onnx::Resh")]
    return {**_by_timm_names(named), "backbone.pos_embed": torch.cat(places, dim=1)}


def _by_timm_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renamed, and queries, keys and values of a block in one."""
    weights = {}
    for name, tensor in named.items():
        if any(part in name for part in (".attention.key.", ".attention.value.")):
            continue
        if ".attention.query." in name:
            tensor = torch.cat([named[name.replace(".query.", part)] for part in (".query.", ".key.", ".value.")])
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        weights[name] = tensor.contiguous()
    return weights
