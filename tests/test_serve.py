"""The example in C++: an artifact built here runs through libtorch and says what Python says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import idlefx
from tests.models.small import build, images

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no compiler")
@torch.no_grad()
def test_cpp_serves_what_python_computes(tmp_path):
    build_here = ["cmake", "-S", EXAMPLES, "-B", tmp_path, f"-DPYTHON={sys.executable}"]
    subprocess.run(build_here, check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    model = build("vit", depth=2)
    idle = idlefx.convert(model, [1], 0.5)
    path = idlefx.package(idle, tmp_path / "vit.pt2", batch=(1, 4))

    def serve(x):
        (tmp_path / "x.f32").write_bytes(x.numpy().tobytes())
        return subprocess.run([tmp_path / "serve", path, tmp_path / "x.f32"], capture_output=True, text=True)

    x = images(model, 4)
    told = re.findall(r"image \d: (\d+) \((.*)\)", serve(x).stdout)
    score, place = idle(x).max(1)
    assert [int(found) for found, _ in told] == place.tolist()
    assert torch.allclose(torch.tensor([float(found) for _, found in told]), score, rtol=1e-4)

    refusal = serve(images(model, 5))
    assert (refusal.returncode, refusal.stderr) == (2, "error: 5 images, the model takes 1 4\n")
