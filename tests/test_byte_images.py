"""Models that take images as they stand in their files, uint8, and normalise them by themselves."""

import pytest
import torch
from PIL import Image
from torch import nn

import idlefx
from idlefx.analysis.image_input import image_input
from idlefx.deploy.parity import example_of
from idlefx.reporting.images import read_images
from idlefx.runtime.selections import selections
from idlefx.training.feature_taps import tap
from tests.models.small import build
from tests.support.cases import Case, relative_error, wanted


class Normalising(nn.Module):
    """A ViT behind its own normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W), uint8
        return self.vit(pixels.float() / 127.5 - 1)


BYTES = torch.randint(256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return Normalising().eval()


@pytest.fixture(scope="module")
def idle(model):
    return idlefx.convert(model, layers=[1], keep=0.5, example_inputs=BYTES[:2])


@torch.no_grad()
def test_bytes_give_what_normalised_images_give(model, idle):
    expected = wanted(model.vit, "vit", Case((1,), 0.5), BYTES.float() / 127.5 - 1).output
    assert relative_error(idle(BYTES), expected) <= 1e-5
    assert not idle(BYTES).allclose(model(BYTES), rtol=1e-3)
    with pytest.raises(idlefx.InputError, match="`pixels` is float32, but was uint8 when the model was traced"):
        idle(BYTES.float())


def test_images_are_the_largest_input_of_pixels():
    graph = torch.fx.Graph()
    for name, tensor in {
        "scale": torch.ones(3, 1, 1, 1),
        "image": BYTES,
        "mask": torch.ones(3, 99, 99, dtype=torch.bool),
        "text": torch.ones(3, 9999, dtype=torch.long),
    }.items():
        graph.placeholder(name).meta["val"] = tensor
    assert image_input(graph).name == "image"
    graph.placeholder("as_large").meta["val"] = BYTES.float()
    assert image_input(graph).name == "as_large"


def test_words_are_no_image():
    graph = torch.fx.Graph()
    graph.placeholder("words").meta["val"] = torch.ones(3, 9999, dtype=torch.long)
    with pytest.raises(idlefx.BlockError, match="no input of floating point or uint8, so no image"):
        image_input(graph)


def test_examples_are_no_images_of_one_colour(idle):
    (pixels,), _ = example_of(idle, 2)
    assert pixels.dtype == torch.uint8 and len(pixels.unique()) > 200


def test_pictures_are_drawn_from_bytes(idle, tmp_path):
    (read,) = read_images(BYTES[:1], idle.conversion.facts, as_bytes=True)
    assert read.batch.equal(BYTES[:1])
    photo = Image.fromarray(BYTES[0].permute(1, 2, 0).numpy())
    for images in (BYTES[:1], photo):
        assert idlefx.draw(idle, images, tmp_path / "tokens.png").stat().st_size > 0


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packages_take_bytes(idle, tmp_path, dtype):
    idlefx.package(idle, tmp_path / "model.pt2", dtype=dtype)
    artifact = idlefx.load(tmp_path / "model.pt2")
    assert artifact(BYTES).float().allclose(idle(BYTES), atol=1e-5 if dtype is None else 0.1)
    with pytest.raises(idlefx.InputError, match="uint8"):
        artifact(BYTES.float())


@pytest.mark.slow
@torch.no_grad()
def test_the_backend_takes_bytes(model, idle):
    torch._dynamo.reset()
    fast = torch.compile(model, backend="idlefx", options={"layers": [1], "keep": 0.5})
    assert fast(BYTES).allclose(idle(BYTES), atol=1e-5)
    assert list(selections(idle, BYTES)) == [1, 2, 3]


def test_what_needs_normalised_images_is_refused(idle, tmp_path):
    with pytest.raises(idlefx.InputError, match="finetune: the model takes uint8 images and normalises them itself"):
        tap(idle)
    with pytest.raises(idlefx.InputError, match="emit: the model takes uint8 images"):
        idlefx.emit(idle, tmp_path / "bundle")


def test_photographs_are_compared_as_bytes(model, idle, tmp_path):
    Image.fromarray(BYTES[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    found = idlefx.compare(model, {"same": idlefx.convert(model, [1], 1.0, example_inputs=BYTES[:2])}, tmp_path)
    assert found.images == 1 and found.changes["same"]["output"].cosine == pytest.approx(1.0)
