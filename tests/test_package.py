"""Artifacts: equal to the eager model, whole, telling what they are, and refused in words where they cannot run."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import idlefx
from idlefx.deploy import artifacts
from idlefx.deploy.manifest import KEY
from tests.models.small import build, images

CLASSES = [f"class {index}" for index in range(10)]
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("timm", "torchvision", "transformers", "tests"):
            raise ImportError(f"{name} was asked for")
sys.meta_path.insert(0, Refuse())
import idlefx
from safetensors.torch import load_file, save_file
artifact = idlefx.load(sys.argv[1])
save_file({"y": artifact(load_file(sys.argv[2])["x"])}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def idle():
    model = build("vit", depth=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": CLASSES, "mean": (0.1, 0.2, 0.3)}
    return idlefx.convert(model, [1], 0.5)


@pytest.fixture(scope="module")
def packaged(idle, tmp_path_factory):
    return idlefx.package(idle, tmp_path_factory.mktemp("package") / "vit.pt2", batch=(1, 6))


@pytest.fixture
def never(monkeypatch):
    """Nothing may be compiled, and nothing compiled may be loaded."""
    for name in ("build_artifact", "open_artifact", "make_program"):
        monkeypatch.setattr(artifacts, name, lambda *_: pytest.fail("it went too far"))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_artifact_equals_eager(idle, packaged, batch):
    artifact, x = idlefx.load(packaged), images(build("vit"), batch)
    assert torch.allclose(artifact(x), idle(x), atol=1e-5)
    assert torch.equal(artifact(x=x), artifact(x))


@torch.no_grad()
def test_artifact_takes_images_however_they_lie_in_memory(idle, packaged):
    artifact, x = idlefx.load(packaged), images(build("vit"), 4)
    assert torch.equal(artifact(x.to(memory_format=torch.channels_last)), artifact(x))
    assert torch.allclose(artifact(x.mT), idle(x.mT), atol=1e-5)


@torch.no_grad()
def test_artifact_runs_alone(idle, packaged, tmp_path):
    x = images(build("vit"), 3)
    save_file({"x": x}, tmp_path / "x")
    subprocess.run([sys.executable, "-c", ALONE, packaged, tmp_path / "x", tmp_path / "y"], check=True)
    assert torch.allclose(load_file(tmp_path / "y")["y"], idle(x), atol=1e-5)


def test_artifact_says_what_it_is(idle, packaged):
    artifact = idlefx.load(packaged)
    assert artifact.plan == idle.plan and str(artifact.plan) == str(idle.plan)
    told = artifact.metadata
    assert told["inputs"] == [{"name": "x", "shape": ["batch", 3, 48, 48], "dtype": "float32"}]
    assert told["outputs"] == [{"name": "output", "shape": ["batch", 10], "dtype": "float32"}]
    assert (told["batch"], told["classes"], told["data"]["mean"]) == ([1, 6], CLASSES, [0.1, 0.2, 0.3])
    assert told["versions"]["torch"] == torch.__version__


def test_packaging_leaves_the_model_and_the_directory_alone(idle, packaged):
    assert idle.training is False and next(idle.parameters()).dtype == torch.float32
    assert [file.name for file in packaged.parent.iterdir()] == ["vit.pt2"]


def refused(kind, words, call, *args, **kwargs):
    with pytest.raises(kind, match=words):
        call(*args, **kwargs)


def test_inputs_that_do_not_fit_are_refused(packaged):
    artifact = idlefx.load(packaged)
    x = images(build("vit"), 2)
    for wrong, words in [
        (x.repeat(4, 1, 1, 1), "8 images, the artifact takes 1 to 6; split the batch, or package .* batch=.1, 8."),
        (x[:0], "0 images"),
        (x[..., 1:], r"has shape \(2, 3, 48, 47\), the artifact takes \(batch, 3, 48, 48\)"),
        (x[0], r"has shape \(3, 48, 48\)"),
        (x.double(), "is float64, the artifact takes float32"),
        (x.to("meta"), "is on meta, the artifact runs on cpu"),
        (x.tolist(), "must be a tensor, got list"),
    ]:
        refused(idlefx.InputError, words, artifact, wrong)
    refused(idlefx.InputError, "missing a required argument: 'x'", artifact)


def rewritten(packaged, path, change):
    """A copy of an artifact whose manifest says something else."""
    with zipfile.ZipFile(packaged) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                metadata = json.loads(content)
                metadata[KEY] = json.dumps({**json.loads(metadata[KEY]), **change})
                content = json.dumps(metadata)
            new.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "2.3.1", "idlefx": "0"}}, r"made by torch 2\.3\.1, this is torch 2\.\d"),
        ({"device": "xpu"}, "made for xpu, which this machine lacks"),
        ({"machine": {"processor": "riscv"}}, "made for a machine with processor riscv, this one has "),
        ({"machine": {"level": "AVX1024"}}, "made for a machine with level AVX1024, this one has "),
        ({"format": 3}, "has format 3, this idlefx reads format 2"),
    ],
)
def test_artifacts_made_elsewhere_are_refused(packaged, tmp_path, never, change, words):
    refused(idlefx.ArtifactError, words, idlefx.load, rewritten(packaged, tmp_path / "other.pt2", change))


def test_artifact_of_a_lesser_processor_is_taken(idle, packaged, tmp_path):
    assert idlefx.load(rewritten(packaged, tmp_path / "a.pt2", {"machine": {"level": "DEFAULT"}})).plan == idle.plan


def test_files_that_are_no_artifact_are_refused(packaged, tmp_path, never):
    content, path = packaged.read_bytes(), tmp_path / "vit.pt2"
    for share in (0.0, 0.3, 0.9, 0.9999):
        path.write_bytes(content[: int(len(content) * share)])
        refused(idlefx.ArtifactError, "cut off or damaged", idlefx.load, path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refused(idlefx.ArtifactError, "is damaged in .*aotinductor", idlefx.load, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    refused(idlefx.ArtifactError, "was not made by idlefx.package", idlefx.load, path)
    refused(idlefx.InputError, "there is no file", idlefx.load, tmp_path / "none.pt2")
    refused(idlefx.InputError, "run it with onnxruntime", idlefx.load, "vit.onnx")


def test_what_cannot_be_packaged_is_refused_before_anything_is_compiled(idle, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "build_artifact", lambda *_: pytest.fail("it was compiled"))
    for words, path, options in [
        (r"must end in \.pt2", "vit.so", {}),
        ("name a file in a directory that exists", "none/vit.pt2", {}),
        ("device: cannot use", "vit.pt2", {"device": "cuda:77"}),
        ("dtype must be a floating point type", "vit.pt2", {"dtype": torch.int8}),
        (r"batch must be the fewest and the most images.*got \(0, 4\)", "vit.pt2", {"batch": (0, 4)}),
        (r"got 8", "vit.pt2", {"batch": 8}),
    ]:
        refused(idlefx.InputError, words, idlefx.package, idle, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_artifact_that_is_off_is_refused_and_not_left_behind(packaged, tmp_path, monkeypatch):
    other = idlefx.convert(build("vit", depth=2, seed=1), [1], 0.5)
    monkeypatch.setattr(artifacts, "build_artifact", lambda program, path, metadata: shutil.copy(packaged, path))
    refused(idlefx.ParityError, "packaged model differs", idlefx.package, other, tmp_path / "vit.pt2")
    assert not list(tmp_path.iterdir())
    assert idlefx.package(other, tmp_path / "vit.pt2", verify=False).exists()


@pytest.mark.slow
@torch.no_grad()
def test_artifact_in_half_the_bits_agrees(tmp_path):
    idle, x = idlefx.convert(build("vit", depth=2), [1], 0.5), images(build("vit"), 8)
    found = idlefx.load(idlefx.package(idle, tmp_path / "vit.pt2", dtype=torch.bfloat16))(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert ((found.float() - idle(x)).norm(dim=1) / idle(x).norm(dim=1)).median() < 2e-2
