"""int8 in ONNX files: the products that were meant and no others, rounded as they should be, and fused everywhere."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import idlefx
from examples import int8
from idlefx.cli.main import main
from idlefx.deploy.artifacts import check_path
from idlefx.deploy.onnx_int8 import products_with_weights, quantise, turn_weights
from tests.models.small import SMALL, build, images
from tests.support.cases import relative_error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DEPTH = SMALL["depth"]


def run(path, x):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def rounded(x, scale, zero, lowest, highest):
    return ((x / scale).round() + zero).clamp(lowest, highest).sub(zero) * scale


def in_int8(layer, x):
    """A linear layer on tokens (B, N, C): weights in int8 by column, tokens in uint8 between their extremes."""
    if x.ndim < 3:
        return F.linear(x, layer.weight, layer.bias)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    tokens = rounded(x, scale, (-low / scale).round(), 0, 255)
    weight = rounded(layer.weight, layer.weight.abs().amax(1, keepdim=True) / 127, 0, -127, 127)
    return F.linear(tokens, weight, layer.bias)


@torch.no_grad()
@pytest.mark.parametrize("idle", ["rest", pytest.param("follow", marks=pytest.mark.slow)])
def test_products_of_tokens_with_weights_are_in_int8(idle, tmp_path, monkeypatch):
    model = build("vit", depth=2)
    x = images(model, 5)
    converted = idlefx.convert(model, [1], 0.5, idle=idle)
    path = idlefx.package(converted, tmp_path / "m.onnx", int8=True)
    written = onnx.load(path)
    assert Counter(node.op_type for node in written.graph.node)["MatMulInteger"] == 4 * 2
    assert "idlefx" in {entry.key for entry in written.metadata_props}
    found, in_floats = run(path, x), converted(x)
    monkeypatch.setattr(torch.nn.Linear, "forward", in_int8)
    expected = converted(x)
    assert relative_error(found, expected) <= 1e-4 < 5e-3 < relative_error(in_floats, expected) < 5e-2


@pytest.mark.slow
def test_int8_is_fused_for_dense_and_idle_alike(tmp_path):
    model = build("vit")
    seen = []
    for name, keep, idle in (("dense", 1.0, "rest"), ("rest", 0.5, "rest"), ("follow", 0.5, "follow")):
        path = idlefx.package(idlefx.convert(model, [1], keep, idle=idle), tmp_path / f"{name}.onnx", int8=True)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.optimised.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        seen.append([nodes[kind] for kind in ("DynamicQuantizeMatMul", "MatMulInteger", "Gelu")])
    assert seen == [[4 * DEPTH, 0, DEPTH]] * 3


@pytest.mark.slow
def test_where_nothing_is_to_quantise_it_is_said(tmp_path):
    idle = idlefx.convert(build("vit", depth=2), [1], 0.5)
    with pytest.raises(idlefx.ArtifactError, match=r"int8 finds no product of tokens with a float32 weight"):
        idlefx.package(idle, tmp_path / "m.onnx", dtype=torch.float16, verify=False, int8=True)
    assert not list(tmp_path.iterdir())


def graph_of(kind, *weights):
    """A product of the input x (2, 4) with a weight, or of two weights."""
    values = {name: onnx.numpy_helper.from_array(torch.ones(4, 4, dtype=kind).numpy(), name) for name in weights}
    number = onnx.helper.np_dtype_to_tensor_dtype(torch.ones(1, dtype=kind).numpy().dtype)
    x, y = (onnx.helper.make_tensor_value_info(name, number, [2, 4]) for name in "xy")
    nodes = [onnx.helper.make_node("MatMul", ["a", "b"], ["weight"], "of weights")] if "a" in weights else []
    nodes.append(onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], "of x"))
    return onnx.helper.make_graph(nodes, "small", [x], [y], list(values.values()))


def test_only_products_of_what_varies_with_float32_weights_are_meant(tmp_path):
    assert products_with_weights(graph_of(torch.float32, "weight")) == ["of x"]
    assert products_with_weights(graph_of(torch.float32, "a", "b")) == [], "made of weights, as what scores tokens is"
    onnx.save(onnx.helper.make_model(graph_of(torch.float16, "weight")), tmp_path / "half.onnx")
    with pytest.raises(idlefx.ArtifactError, match=r"int8 finds no product of tokens with a float32 weight"):
        quantise(tmp_path / "half.onnx", tmp_path / "int8.onnx")
    onnx.save(onnx.helper.make_model(graph_of(torch.float32, "weight")), tmp_path / "whole.onnx")
    with pytest.raises(idlefx.InputError, match=r"cannot write into .*nowhere"):
        quantise(tmp_path / "whole.onnx", tmp_path / "nowhere" / "int8.onnx")


def test_weights_that_are_transposed_are_turned():
    graph = graph_of(torch.float32, "weight")
    graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(torch.arange(16.0).view(4, 4).numpy(), "given"))
    graph.node.insert(0, onnx.helper.make_node("Transpose", ["given"], ["weight"], "turn", perm=[1, 0]))
    assert products_with_weights(graph) == []
    turn_weights(graph)
    assert products_with_weights(graph) == ["of x"] == [node.name for node in graph.node]
    turned = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert (turned["weight"] == turned["given"].T).all()


def test_int8_is_refused_where_it_is_not_had(tmp_path, capsys):
    with pytest.raises(idlefx.InputError, match=r"int8 is of ONNX files, .* with torchao"):
        check_path(tmp_path / "m.pt2", int8=True)
    assert main(["convert", "--model", "vit", "--layers", "1", "--int8"]) == 2
    assert "--int8 is of an ONNX file; add --package" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_half_precision_is_packaged_and_runs(idle, tmp_path):
    model = build("vit")
    x = images(model, 3)
    converted = idlefx.convert(model, [1, 2], 0.5, idle=idle)
    moved = idlefx.package(converted, tmp_path / "moved.onnx", dtype=torch.float16)
    halved = idlefx.package(idlefx.convert(model.half(), [1, 2], 0.5, idle=idle), tmp_path / "halved.onnx")
    for path in (moved, halved):
        found = run(path, x.half())
        assert found.dtype == torch.float16 and relative_error(found.float(), converted(x)) <= 2e-2


def build_vit():
    return build("vit")


@pytest.mark.slow
def test_dense_and_idle_are_timed_in_both_number_types_in_one_table(capsys):
    options = ["--example-shape", "2,3,48,48", "--batch-size", "2", "--layers", "1", "--keep", "0.5", "--seconds", "0"]
    command = ["bench", "--model", f"{__name__}:build_vit", *options]
    assert main([*command, "--runtime", "onnxruntime-int8", "onnxruntime"]) == 0
    shown = capsys.readouterr().out
    rows = [tuple(line.split()[:3]) for line in shown.splitlines() if line.startswith("onnxruntime")]
    assert rows == [(mode, "2", name) for mode in ("onnxruntime", "onnxruntime-int8") for name in ("dense", "idle")]


class Named(torch.nn.Module):
    """A model that returns its output by name, as the real one does."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 48, 48)}

    def forward(self, images):
        return {"feature": self.net(images)}


@pytest.mark.slow
def test_example_tells_times_and_changes(monkeypatch, tmp_path, capsys):
    net = build("vit")
    monkeypatch.setattr(int8, "REAL", "real")
    monkeypatch.setattr(int8, "PLANS", [{"layers": [1, 2], "keep": 0.5}] * 2)
    monkeypatch.setattr(int8, "saliency_vit", lambda: Named(net))
    monkeypatch.setattr(int8.timm, "create_model", lambda name: net)
    monkeypatch.setattr(int8, "scenes", lambda count, **_: SimpleNamespace(images=images(net, count)))
    options = ["--models", "any", "real", "--batch", "2", "--seconds", "0", "--scenes", "6"]
    monkeypatch.setattr(sys, "argv", ["int8", *options, "--results", str(tmp_path / "int8.json")])
    int8.main()
    told = json.loads((tmp_path / "int8.json").read_text())
    assert {"measured", "versions", "machine", "engine", "results"} == set(told) and "onnxruntime" in told["versions"]
    names = ["dense", "dense int8", "idle", "idle int8"]
    assert [list(result["times"][0]["ms"]) for result in told["results"]] == [names] * 2
    random, real = told["results"]
    assert "models" not in random and list(real["models"]) == names
    cosines = [real["models"][name]["feature"]["cosine"] for name in names]
    assert cosines[0] > 0.99999 > cosines[1] > cosines[2]
    shown = capsys.readouterr().out
    assert f"{cosines[3]:.4f}" in shown and told["machine"] in shown
