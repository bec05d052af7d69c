"""Which images a comparison reads, and what it refuses: each refusal says what, where, and what to do."""

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import idlefx
from idlefx.capture.inputs import guess_inputs
from idlefx.demo.glyphs import Glyphs
from idlefx.demo.model import glyph_vit
from idlefx.reporting.images import read_images, read_photo
from tests.models.small import build, images

SCENES = Glyphs("test", size=9, image_size=40)
ORDER = [
    "a/0.png",
    "a/2.png",
    "a/4.JPEG",
    "a/6.png",
    "a/8.png",
    "b/1.png",
    "b/3.png",
    "b/5.png",
    "b/7.png",
    "grey.webp",
]


@cache
def dense() -> nn.Module:
    return glyph_vit()


def facts() -> Any:
    return guess_inputs(dense())[1]


def compare(given: Any, idle: Any = None, model: Any = None, **options: Any) -> idlefx.Comparison:
    model = dense() if model is None else model
    return idlefx.compare(model, model if idle is None else idle, given, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """Nine scenes in two folders, one of which is linked to, a grey picture beside them, and what is no image."""
    place = tmp_path / "scenes"
    for name in ORDER[:-1]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        SCENES.scene(int(name[2])).image.save(place / name)
    Image.new("L", (70, 33), 99).save(place / "grey.webp")
    (place / "labels.csv").write_text("a,b")
    (place / ".hidden").mkdir()
    for name in (".hidden.png", ".hidden/1.png"):
        (place / name).write_text("no image")
    (place / "b").rename(tmp_path / "elsewhere")
    (place / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    return place


def test_folder_is_read_in_order_and_its_files_are_named(folder):
    seen: list[Tensor] = []

    def spoiled(x: Tensor) -> Tensor:
        seen.append(x)
        logits = dense()(x)
        return torch.where((x == read_photo(folder / ORDER[6], facts())).flatten(1).all(1, True), -logits, logits)

    found = compare(folder, spoiled, batch_size=4)
    (change,) = found.changes["idle"].values()
    assert (change.worst_image, change.worst) == (ORDER[6], pytest.approx(-1))
    assert f"{ORDER[6]} (-1.00000)" in str(found)
    assert (found.images, [len(x) for x in seen]) == (10, [4, 4, 2])
    assert torch.equal(torch.cat(seen), torch.stack([read_photo(folder / name, facts()) for name in ORDER]))


@pytest.mark.parametrize("limit", [1, 4, 10, 99])
def test_limit_is_spread_over_the_folder(folder, limit):
    seen: list[Tensor] = []
    count = compare(folder, lambda x: seen.append(x) or dense()(x), limit=limit).images
    assert count == len(torch.cat(seen)) == min(limit, 10)
    if limit == 4:
        wanted = [read_photo(folder / ORDER[place], facts()) for place in (0, 2, 5, 7)]
        assert torch.equal(torch.cat(seen), torch.stack(wanted))


def test_files_and_pil_images_may_be_listed(folder):
    files = [folder / name for name in ORDER[:3]]
    opposite = lambda x: -dense()(x)  # noqa: E731
    for given, worst in ((files, str(files[0])), (list(map(str, files)), str(files[0])), (map(Image.open, files), 0)):
        (change,) = compare(given, opposite).changes["idle"].values()
        assert (change.worst_image, change.worst) == (worst, pytest.approx(-1))
    assert compare(files[0]).images == compare(Image.open(files[0])).images == 1
    assert compare(SCENES).images == 9, "a data set of images and labels"


@pytest.mark.parametrize("name", ["a/0.png", "a/4.JPEG", "grey.webp"])
def test_photographs_are_prepared_as_timm_does(folder, name):
    data = facts().data
    chosen = {key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    transform = create_transform(facts().image_size, **chosen)
    ours = read_photo(folder / name, facts())
    assert torch.allclose(ours, transform(Image.open(folder / name).convert("RGB")), atol=1e-5)
    (drawn,) = read_images(folder / name, facts())
    assert torch.equal(drawn.batch[0], ours)


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(idlefx.InputError) as error:
        compare(*args, **options)
    return str(error.value)


def test_images_that_cannot_be_read_are_named(folder):
    whole = (folder / "a" / "4.JPEG").read_bytes()
    (folder / "a" / "4.JPEG").write_bytes(whole[: len(whole) // 2])
    for given in (folder, [folder / name for name in ORDER]):
        assert "a/4.JPEG" in (told := refusal(given)) and "cannot read" in told and "mend it or leave it out" in told
    (folder / "a" / "4.JPEG").write_text("words")
    assert "a/4.JPEG is no image; expected a photograph" in refusal(folder)
    assert "no/such.png: No such file" in refusal([folder / "no" / "such.png"])


def test_folder_without_images_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "labels.csv").touch()
    told = refusal(tmp_path / "empty")
    assert told.startswith("images: there is no image in ") and "empty" in told and ".jpeg" in told
    assert "nowhere does not exist; name a folder with photographs" in refusal(str(tmp_path / "nowhere"))
    assert "labels.csv is no image" in refusal(folder / "labels.csv")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["images: there are none"]),
        (iter(()), ["images: there are none", "a generator that was read before is empty"]),
        (torch.zeros(0, 3, 32, 32), ["images: there are none"]),
        (torch.zeros(3), ["expected shape (B, channels, height, width), got (3,)"]),
        (5, ["expected a tensor, a folder", "got a int"]),
        ([torch.zeros(2, 3, 32, 32), None], ["expected a tensor", "behind 2 images comes NoneType"]),
        ([{"labels": torch.zeros(2)}], ["behind 0 images comes dict"]),
        (torch.zeros(2, 3, 30, 30), ["the dense model fails on images of shape (2, 3, 30, 30)", "give what it takes"]),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["the dense model fails", "normalised"]),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(given, words):
    told = refusal(given)
    assert all(word in told for word in words), told


def test_photographs_need_to_know_the_model():
    unknown = nn.Flatten()
    assert "it is not known which images the model takes" in refusal(SCENES, model=unknown)
    assert compare(torch.ones(2, 3, 8, 8), model=unknown).images == 2


class Answer(nn.Module):
    """A model that returns whatever a function makes of its images."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def means(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def spoil(value: float) -> Any:
    return lambda x: torch.where(x.amax((1, 2, 3))[:, None] > 1, means(x) * value, means(x))


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (lambda x: "words", means, ["the dense model returns a str without tensors", "wrap it"]),
        (means, lambda x: {}, ["the converted model `idle` returns a dict without tensors"]),
        (means, lambda x: (means(x), x), ["the converted model `idle` returns 0, 1, the dense model output"]),
        (means, lambda x: means(x)[:, :2], ["output `output` is (2, 2)", "`idle`, (2, 3)", "of the dense model"]),
        (means, lambda x: means(x).int(), ["whole numbers", "compare models that return the same"]),
        (means, spoil(torch.nan), ["`output` of the converted model `idle` holds NaN", "for image 3", "float32"]),
        (spoil(torch.inf), means, ["output `output` of the dense model holds infinity, first for image 3"]),
        (lambda x: means(x).sum(), means, ["`idle`, () numbers of the dense model"]),
        (lambda x: {"loss": x.sum()}, lambda x: {"loss": x.sum()}, ["each of 2 images: `loss` ()", "batch first"]),
        (means, lambda x: 1 / 0, ["the converted model `idle` fails", "ZeroDivisionError: division by zero"]),
        (lambda x: torch.ones(2, 3), lambda x: torch.ones(2, 3), ["2 entries for 1 images", "another batch_size"]),
    ],
)  # fmt: skip
def test_outputs_that_cannot_be_compared_are_refused(one, other, words):
    x = torch.zeros(5, 3, 4, 4)
    x[3] = 2
    told = refusal(x, Answer(other), Answer(one), batch_size=2)
    assert told.startswith("compare: ") and all(word in told for word in words), told


def test_images_are_put_where_each_model_is_in_its_number_type():
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device="meta", dtype=torch.bfloat16))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            assert (x.device.type, x.dtype, mask.device.type, mask.dtype) == (
                "meta",
                torch.bfloat16,
                "meta",
                torch.bool,
            )
            return torch.ones(len(x), 3)

    def loaded(x: Tensor, mask: Tensor) -> Tensor:
        assert x.is_meta and mask.is_meta and (x.dtype, mask.dtype) == (torch.float16, torch.bool)
        return torch.ones(len(x), 3)

    loaded.device, loaded.dtype = torch.device("meta"), torch.float16
    given = [{"x": torch.ones(2, 3, 4, 4), "mask": torch.ones(2).bool()}]
    assert compare(given, loaded, Elsewhere()).images == 2


def test_outputs_that_are_zero_have_figures():
    x = torch.zeros(2, 3, 4, 4)
    (same,) = compare(x, Answer(means), Answer(means)).changes["idle"].values()
    assert (same.cosine, same.relative_difference) == (1, None)
    (other,) = compare(x, Answer(lambda x: means(x) + 1), Answer(means)).changes["idle"].values()
    assert (other.cosine, other.relative_difference) == (0, None)
    assert "nan" not in str(compare(x, Answer(means), Answer(means)))


def test_arguments_are_refused_in_words():
    x = images(build("vit"), 2)
    assert "there is no converted model" in refusal(x, {})
    assert "a str is no model; give what idlefx.convert returns" in refusal(x, {"rest": "idle"})
    for options in ({"batch_size": 0}, {"limit": 0}, {"limit": 2.5}, {"batch_size": True}):
        ((name, value),) = options.items()
        assert f"images: {name} is {value}; expected a whole number from 1" in refusal(x, **options)
    told = refusal(torch.zeros(2, 3, 32, 32), logits=["logits"])
    assert "compare: logits='logits' is no output (B, classes); such are: output" in told
