"""Models whose tokens stand on a grid, as files that run elsewhere."""

import pytest
import torch

import idlefx
from tests.models import stacked
from tests.models.grids import build, pictures

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")]


def converted(kind: str, **options) -> idlefx.IdleModule:
    return idlefx.convert(build(kind, 2), layers=[0, 1], keep=0.6, example_inputs=pictures(2), **options)


@torch.no_grad()
@pytest.mark.parametrize("idle", ["rest", "follow"])
@pytest.mark.parametrize("kind", ["relative", "first"])
def test_onnx_equals_eager(kind, idle, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = converted(kind, idle=idle)
    session = onnxruntime.InferenceSession(idlefx.package(module, tmp_path / "m.onnx"))
    (image,) = session.get_inputs()
    for batch in (1, 5):
        x = pictures(batch, seed=1)
        (output,) = session.run(None, {image.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), module(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"idle": "rest"}, {"idle": "follow", "reselect": False}], ids=lambda o: o["idle"])
def test_a_package_equals_eager(options, tmp_path):
    module = converted("relative", **options)
    loaded = idlefx.load(idlefx.package(module, tmp_path / "m.pt2"))
    for batch in (2, 5):
        x = pictures(batch, seed=1)
        torch.testing.assert_close(loaded(x), module(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_windows_in_the_batch_that_attention_joins_run_elsewhere(idle, tmp_path):
    model, x = stacked.build("inside", "behind", "front", prefix=1), stacked.pictures
    module = idlefx.convert(model, layers=[0], keep=0.6, idle=idle, example_inputs=x(2))
    loaded = idlefx.load(idlefx.package(module, tmp_path / "m.pt2"))
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(idlefx.package(module, tmp_path / "m.onnx"))
    (image,) = session.get_inputs()
    for batch in (1, 5):
        wanted, images = module(x(batch, seed=1)), x(batch, seed=1)
        torch.testing.assert_close(loaded(images), wanted, atol=1e-4, rtol=1e-4)
        (output,) = session.run(None, {image.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), wanted, atol=1e-4, rtol=1e-4)
