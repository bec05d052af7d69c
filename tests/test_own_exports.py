"""What users do with a converted model besides calling it: own exporters, `torch.vmap`, forward-mode derivatives."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import idlefx
from tests.models.small import build, images
from tests.support.messages import refusal, says


@pytest.fixture(scope="module", params=[0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def idle(request):
    return idlefx.convert(build("vit", depth=2), layers=[1], keep=request.param)


@pytest.fixture(scope="module")
def x():
    return images(build("vit", depth=2), 4)


@torch.no_grad()
def test_torch_onnx_exports_it_with_a_free_batch(idle, x, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(idle, (x,), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in (x, x[:3].flip(0)):
        found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), idle(inputs), atol=1e-4)


@torch.no_grad()
def test_ties_of_scores_are_broken_the_same_way_for_onnx(monkeypatch):
    from idlefx.runtime import ops

    scores = torch.randint(0, 3, (4, 17)).float()
    wanted = ops.choose_tokens(scores, (0,), 5)
    asked = []

    def topk(self, count, dim):  # as ONNX does it, ties to the lower position
        asked.append(count)
        return torch.sort(self, dim=dim, descending=True, stable=True)

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.Tensor, "topk", topk)
    found = ops.choose_tokens(scores, (0,), 5)
    assert asked and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_the_old_exporters_are_spoken_of(idle, x, tmp_path):
    path = str(tmp_path / "model.onnx")
    words = refusal(torch.onnx.export, idle, (x,), path, dynamo=False)
    assert says(words, "dynamo=False", "dynamo=True", r"idlefx\.package")
    with pytest.warns(UserWarning, match="torch.jit.trace writes the batch size of its example"):
        traced = torch.jit.trace(idle, x, check_trace=False)
    assert torch.allclose(traced(x.flip(0)), idle(x.flip(0)), atol=1e-5)


@torch.no_grad()
def test_vmap_does_each_image_by_itself(idle, x):
    wanted = idle(x)
    assert torch.allclose(torch.vmap(lambda image: idle(image[None])[0])(x), wanted, atol=1e-5)
    pairs = torch.stack([x, x.flip(0)], dim=1)
    assert torch.allclose(torch.vmap(idle)(pairs)[:, 0], wanted, atol=1e-5)
    weights = torch.stack([idle.get_parameter("head.bias"), idle.get_parameter("head.bias") + 1])
    several = torch.vmap(lambda bias: torch.func.functional_call(idle, {"head.bias": bias}, (x,)))(weights)
    assert torch.allclose(several[1], wanted + 1, atol=1e-5)


def test_forward_mode_derivatives_are_those_of_reverse_mode(idle, x):
    direction = images(build("vit", depth=2), 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has none
        found = torch.func.jvp(idle, (x,), (direction,))[1]
        wanted = torch.autograd.functional.jvp(idle, x, direction)[1]
    assert torch.allclose(found, wanted, atol=1e-4) and wanted.abs().max() > 0.1
