"""The real model on real pictures, where they can be had."""

import pytest
import torch

import idlefx
from idlefx.demo.photo_scenes import scenes
from idlefx.demo.photographs import fetch_photographs
from idlefx.demo.saliency import saliency_vit
from idlefx.demo.weights import fetch_weights
from idlefx.errors import InputError
from idlefx.zoo.reference import Tokens
from tests.oracles import following, following_zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights():
    try:
        return fetch_weights()
    except InputError as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(scope="module")
def sixteen():
    try:
        fetch_photographs()
    except InputError as refusal:
        pytest.skip(str(refusal))
    return scenes(16)


@torch.no_grad()
def test_model_is_that_of_the_package(weights):
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_image": images.numpy()})
    actual = saliency_vit()(images)["saliency"]
    assert torch.allclose(actual, torch.from_numpy(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_model_sees_the_things_in_the_scenes(weights, sixteen):
    seen = saliency_vit()(sixteen.images)["saliency"][:, 0] > 0.5
    both, either = (f(seen, sixteen.masks).sum((1, 2)) for f in (torch.logical_and, torch.logical_or))
    assert (both / either).mean() > 0.6  # 0.71 of 180 scenes


@torch.no_grad()
def test_following_is_that_of_the_reference_and_near_the_dense_model(weights, sixteen):
    model, images = saliency_vit(), sixteen.images
    dense = model(images)
    idle = idlefx.convert(model, layers=[3, 6, 9], keep=0.7, idle="follow")
    found = idle(images)
    paths = [f"backbone.blocks.{index}" for index in range(12)]
    plan = following.stages([3, 6, 9], 0.7, "stages", 256, 12)
    tokens = dict.fromkeys(paths, Tokens((0,), 0))
    expected = following_zoo.run(model, paths, plan, tokens, lambda: model(images))
    margins = torch.stack([groups.margins for groups in expected.groups.values()]).amin(0)
    clear = margins > 1e-5  # the others may be grouped in another way
    assert clear.sum() >= 8
    for name, value in expected.output.items():
        assert (found[name] - value)[clear].norm() <= 1e-5 * value[clear].norm()
    likeness = torch.cosine_similarity(found["feature"], dense["feature"])
    assert likeness.mean() > 0.99 and likeness.min() > 0.95
    assert (found["saliency"] - dense["saliency"]).abs().mean() < 0.03


@torch.no_grad()
def test_positions_as_stored_serve_a_larger_image(weights):
    small, large = saliency_vit(224), saliency_vit(518)
    assert large.backbone.pos_embed.shape == (1, 1 + 37 * 37, 384)
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 518)
    shrunk = torch.nn.functional.interpolate(image, 224, mode="bilinear", antialias=True)
    features = [model(x)["feature"] for model, x in ((large, image), (small, shrunk))]
    assert torch.cosine_similarity(*features) > 0.5
