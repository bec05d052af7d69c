"""The example in C++: an artifact built here runs through libtorch and says what Python says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import idlefx
from tests.models.small import Wrapper, build, images

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no compiler"),
]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """A function that serves an artifact with these inputs."""
    folder = tmp_path_factory.mktemp("serve")
    subprocess.run(["cmake", "-S", EXAMPLES, "-B", folder, f"-DPYTHON={sys.executable}"], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)

    def call(path, *tensors):
        files = [folder / f"{place}.raw" for place in range(len(tensors))]
        for file, tensor in zip(files, tensors, strict=True):
            file.write_bytes(tensor.numpy().tobytes())
        return subprocess.run([folder / "serve", path, *files], capture_output=True, text=True)

    return call


def check_told(done, output):
    """The highest entry for each image, and its value."""
    told = re.findall(r"image \d: (\d+) \((.*)\)", done.stdout)
    score, place = output.max(1)
    assert [int(found) for found, _ in told] == place.tolist()
    assert torch.allclose(torch.tensor([float(found) for _, found in told]), score, rtol=1e-4)


@torch.no_grad()
def test_cpp_serves_what_python_computes(serve, tmp_path):
    model = build("vit", depth=2)
    idle = idlefx.convert(model, [1], 0.5)
    path = idlefx.package(idle, tmp_path / "vit.pt2", batch=(1, 4))
    x = images(model, 4)
    check_told(serve(path, x), idle(x))
    refusal = serve(path, images(model, 5))
    assert (refusal.returncode, refusal.stderr) == (2, "error: 5 images, the model takes 1 4\n")


class Chosen(Wrapper):
    """Inputs of three kinds: images, a mask with an entry for each, and weights that belong to no image."""

    def forward(self, picture, shown, weights):
        logits = super().forward(picture, weights)["logits"]
        return torch.where(shown[:, None], logits, -logits)


@torch.no_grad()
def test_cpp_takes_several_inputs(serve, tmp_path):
    model = Chosen(build("vit", depth=2)).eval()
    x, shown, weights = images(model.net, 3), torch.tensor([True, False, True]), torch.rand(3, 1, 1) + 0.5
    idle = idlefx.convert(model, [1], 0.5, example_inputs=(x[:2], shown[:2], weights))
    path = idlefx.package(idle, tmp_path / "chosen.pt2", batch=(1, 4))
    check_told(serve(path, x, shown, weights), idle(x, shown, weights))
    assert serve(path).stdout.startswith("image 0: "), "noise and ones"
    for given, words in [
        ((x, shown), "2 files, the model takes 3"),
        ((x, shown[:2], weights), "`shown` is for 2 images of 3"),
        ((x, shown, torch.rand(4)), "does not hold whole `weights` of 12 bytes"),
    ]:
        refusal = serve(path, *given)
        assert refusal.returncode == 2 and refusal.stderr.startswith("error: ") and words in refusal.stderr
