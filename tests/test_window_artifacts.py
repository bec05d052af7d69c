"""Models whose attention is over windows, compiled and as files that run elsewhere."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import idlefx
from idlefx.zoo.entry import images, randomise

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")]

SWIN = {"img_size": 48, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 3}
SAM = {
    "img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "window_size": 4,
    "global_attn_indexes": (1, 3), "num_classes": 0,
}  # fmt: skip
CASES = {  # name in timm, sizes, what idles, the units of the plan
    "swin, tokens": ("swin_tiny_patch4_window7_224", SWIN, "tokens", {"tokens"}),
    "swin, windows": ("swin_tiny_patch4_window7_224", SWIN, "windows", {"windows"}),
    "sam": ("samvit_base_patch16", SAM, "windows", {"windows", ""}),
}


@pytest.fixture(scope="module", params=CASES)
def idle(request):
    timm = pytest.importorskip("timm")
    name, sizes, unit, units = CASES[request.param]
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **sizes)).eval()
    module = idlefx.convert(model, layers=[1, 2], keep=0.7, unit=unit)
    assert {step.unit for step in module.plan} == units
    return module


@torch.no_grad()
def test_compiled_equals_eager_in_one_graph_for_all_batches(idle):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    fast = idlefx.compile(idle, backend=counter)
    for batch in (2, 5, 3):
        x = images(batch, 48)
        torch.testing.assert_close(fast(x), idle(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_package_equals_eager(idle, tmp_path):
    loaded = idlefx.load(idlefx.package(idle, tmp_path / "m.pt2"))
    for batch in (2, 5):
        x = images(batch, 48)
        torch.testing.assert_close(loaded(x), idle(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_onnx_equals_eager(idle, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(idlefx.package(idle, tmp_path / "m.onnx"))
    (image,) = session.get_inputs()
    for batch in (1, 5):
        x = images(batch, 48)
        (output,) = session.run(None, {image.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), idle(x), rtol=1e-4, atol=1e-4)
