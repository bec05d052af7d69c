"""ONNX files: the same choices and results in onnxruntime, in operations that other engines know, and shell use."""

import resource

import pytest
import torch

import idlefx
from idlefx.cli.main import main
from idlefx.cli.onnx_sessions import open_sessions
from idlefx.deploy.onnx import _sort
from idlefx.runtime import ops
from tests.models.small import build, images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(path, *tensors):
    session = onnxruntime.InferenceSession(path)
    feeds = zip([i.name for i in session.get_inputs()], tensors, strict=True)
    return [torch.from_numpy(out) for out in session.run(None, {name: t.numpy() for name, t in feeds})]


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", pytest.param("registers_map", marks=pytest.mark.slow)])
def test_onnx_equals_eager_in_plain_operations(name, tmp_path):
    model = build(name)
    idle = idlefx.convert(model, [1, 3], 0.5)
    path = idlefx.package(idle, tmp_path / "m.onnx")
    for batch in (1, 7):
        x = images(model, batch)
        assert torch.allclose(run(path, x)[0], idle(x), atol=1e-4)
    written = onnx.load(path)
    assert {node.domain for node in written.graph.node} == {""} and not written.functions
    assert not {"ScatterND", "ScatterElements"} & {node.op_type for node in written.graph.node}
    assert [d.dim_param or d.dim_value for d in written.graph.input[0].type.tensor_type.shape.dim][:2] == ["batch", 3]
    assert "idlefx" in {entry.key for entry in written.metadata_props}


class Choices(torch.nn.Module):
    def forward(self, scores):
        worked, place = ops.choose_tokens(scores, (0,), 9)
        return worked, place, *ops.choose_tokens(scores, (5,), 7), *ops.choose_tokens(-scores, (0,), 4, worked)


@pytest.mark.slow
def test_onnx_gives_ties_to_the_lower_position(tmp_path):
    choices, batch = Choices().eval(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(choices, (torch.randn(2, 30),), dynamic_shapes=({0: batch},))
    table = {torch.ops.aten.sort.stable: _sort}
    torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False).save(tmp_path / "c.onnx")
    scores = torch.randint(0, 3, (50, 30), generator=torch.Generator().manual_seed(0)).float()
    assert all(torch.equal(a, b) for a, b in zip(run(tmp_path / "c.onnx", scores), choices(scores), strict=True))


def test_full_disk_leaves_no_file(tmp_path):
    idle = idlefx.convert(build("vit", depth=2), [1], 0.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(idlefx.InputError, match=r"package: cannot write into .*make room"):
            idlefx.package(idle, tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_onnxruntime_that_cannot_run_it_is_a_refusal(tmp_path):
    idle = idlefx.convert(build("vit", depth=2), [1], 0.5)
    with pytest.raises(idlefx.ArtifactError, match=r"onnxruntime does not run the file: .*verify=False"):
        idlefx.package(idle, tmp_path / "m.onnx", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_shell_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("idlefx.cli.commands.load_model", lambda *_, **__: build("vit", depth=2))
    command = ["convert", "--model", "vit", "--layers", "1", "--package"]
    assert main([*command, str(tmp_path / "m.onnx"), "--batch", "2", "4"]) == 0
    assert capsys.readouterr().out.strip().endswith("m.onnx") and (tmp_path / "m.onnx").exists()
    for path, more, words in [
        ("m.txt", [], "must end in .pt2"),
        ("none/m.pt2", [], "name a file in a directory that exists"),
        ("m.pt2", ["--device", "cuda:77"], "device: cannot use cuda:77"),
        ("m.pt2", ["--batch", "4", "2"], "batch must be the fewest and the most images"),
    ]:
        assert main([*command, str(tmp_path / path), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and "Traceback" not in error


def test_options_of_an_artifact_are_refused_where_none_is_written(capsys):
    arguments = ["convert", "--model", "test_vit", "--layers", "1", "--dtype", "bfloat16", "--batch", "1", "8"]
    assert main(arguments) == 2
    assert "no artifact is written for --dtype and --batch-size; add --package or --emit" in capsys.readouterr().err


COMMAND = ["bench", "--model", f"{__name__}:build_vit", "--layers", "1", "2", "--keep", "0.5", "--seconds", "0"]


def build_vit():
    return build("vit")


@pytest.mark.slow
def test_onnxruntime_is_timed_with_dense_and_idle_packaged_alike(capsys):
    options = ["--example-shape", "2,3,48,48", "--batch-size", "2", "--idle", "follow", "--baseline", "first"]
    assert main([*COMMAND, *options, "--runtime", "onnxruntime"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[:3] for line in shown.splitlines() if line.startswith("onnxruntime  ")]
    assert rows == [["onnxruntime", "2", name] for name in ("dense", "idle", "first")]
    assert f"onnxruntime {onnxruntime.__version__}" in shown and "Skipped" not in shown


@pytest.mark.slow
def test_both_runtimes_are_timed_in_one_table(capsys):
    options = ["--example-shape", "2,3,48,48", "--batch-size", "2", "--eager", "--baseline", "follow"]
    assert main([*COMMAND, *options, "--runtime", "torch", "onnxruntime"]) == 0
    shown = capsys.readouterr().out
    rows = [tuple(line.split()[:3]) for line in shown.splitlines() if line.startswith(("eager  ", "onnxruntime  "))]
    assert rows == [(mode, "2", name) for mode in ("eager", "onnxruntime") for name in ("dense", "idle", "follow")]


@torch.no_grad()
@pytest.mark.parametrize("idle", [pytest.param("rest", marks=pytest.mark.slow), "follow"])
def test_session_is_called_like_its_model(idle):
    model = build("vit")
    converted = idlefx.convert(model, [1, 2], 0.5, idle=idle)
    x = images(model, 3)
    (found,) = open_sessions(converted, ["onnxruntime"], batch=3)["onnxruntime"](x)
    assert torch.allclose(torch.from_numpy(found), converted(x), atol=1e-4)


def test_what_onnxruntime_cannot_time_is_refused(capsys, monkeypatch):
    assert main([*COMMAND, "--runtime", "onnxruntime", "--training", "--dtype", "bfloat16"]) == 2
    assert "float32 on the CPU; leave --training and --dtype out" in capsys.readouterr().err
    monkeypatch.setattr("idlefx.deploy.onnx.find_spec", lambda name: None if name == "onnxruntime" else name)
    assert main([*COMMAND, "--runtime", "onnxruntime"]) == 2
    assert "onnxruntime is not installed; pip install" in capsys.readouterr().err
