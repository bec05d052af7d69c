"""The drawn data set, and the small model trained on it."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.data import create_loader, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset

import idlefx
from idlefx.capture.inputs import guess_inputs
from idlefx.capture.models import load_model
from idlefx.demo.glyphs import CLASSES, SPLITS, Glyphs
from idlefx.demo.model import GLYPH_VIT, glyph_vit
from idlefx.demo.scenes import FACES, MARKS, _bitmap
from idlefx.errors import InputError

SAMPLE = 48


def digest(glyphs, index):
    return hashlib.sha256(np.asarray(glyphs.scene(index).image).tobytes()).hexdigest()


def digests(*args, **options):
    glyphs = Glyphs(*args, size=SAMPLE, **options)
    return [digest(glyphs, index) for index in range(SAMPLE)]


def accuracy(model, drawn):
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = torch.cat([model((batch / 255 - mean) / std) for batch in drawn.pixels.split(128)])
    return (logits.argmax(1) == drawn.labels).float().mean().item()


def test_same_seed_draws_the_same_scenes():
    assert digests("train") == digests("train")
    assert digests("train", seed=1) == digests("train", seed=1)


def test_another_process_draws_the_same_scene():
    code = (
        "import hashlib; from idlefx.data import Glyphs; "
        "print(hashlib.sha256(Glyphs('val', size=9).scene(7).image.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == digest(Glyphs("val", size=9), 7)


def test_scene_does_not_depend_on_the_size_of_the_set():
    assert digest(Glyphs("val", size=10), 9) == digest(Glyphs("val", size=1000), 9)
    assert digest(Glyphs("val", size=10), -1) == digest(Glyphs("val", size=10), 9)


def test_no_scene_is_drawn_twice_in_any_split_or_seed():
    scenes = [scene for split in SPLITS for seed in (0, 1) for scene in digests(split, seed=seed)]
    assert len(set(scenes)) == len(scenes) == len(SPLITS) * 2 * SAMPLE


def test_every_class_is_drawn_equally_often():
    labels = Glyphs("train", size=5 * len(CLASSES)).draw().labels
    assert labels.bincount().tolist() == [5] * len(CLASSES)
    assert [Glyphs("train", size=50)[index][1] for index in range(50)] == labels[:50].tolist()


def test_drawn_set_is_the_scenes_one_by_one():
    glyphs, kept = (Glyphs("val", size=SAMPLE, in_memory=stored) for stored in (False, True))
    drawn = glyphs.draw()
    for index in range(SAMPLE):
        image, label = glyphs[index]
        kept_image, kept_label = kept[index]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(drawn.pixels[index], pixels)
        assert torch.equal(torch.from_numpy(np.array(kept_image)).permute(2, 0, 1), pixels)
        assert drawn.labels[index] == label == kept_label
        assert np.array_equal(drawn.masks[index].numpy(), glyphs.mask(index))


def test_glyph_is_inside_its_mask_and_nothing_outside():
    """Without clutter the ground is smooth: what is far from the ground's colour is the glyph."""
    plain = Glyphs("val", size=SAMPLE, image_size=64, clutter=0)
    brightness = np.array([0.299, 0.587, 0.114])
    for index in range(SAMPLE):
        scene = plain.scene(index)
        picture = np.asarray(scene.image).astype(float) @ brightness
        ground = np.median(picture[~scene.mask])
        assert abs(np.median(picture[scene.mask]) - ground) > 40
        far = np.abs(picture - ground) > 55
        grown = np.zeros_like(scene.mask)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                grown |= np.roll(scene.mask, (down, right), (0, 1))
        assert not (far & ~grown).any()


@pytest.mark.parametrize("image_size", [32, 57])
def test_mask_covers_a_part_of_the_image(image_size):
    masks = Glyphs("train", size=4 * SAMPLE, image_size=image_size).draw().masks
    share = masks.flatten(1).float().mean(1)
    assert masks.dtype == torch.bool and masks.shape == (4 * SAMPLE, image_size, image_size)
    assert share.min() > 0.01 and share.max() < 0.4
    often = masks.float().mean(0)
    assert often[image_size // 2, image_size // 2] > 0.08
    middles = torch.stack([mask.nonzero().float().mean(0) for mask in masks]) / image_size
    assert (middles.std(0) > 0.1).all(), "glyphs are not everywhere"


def test_clutter_adds_what_is_not_the_glyph():
    def edges(clutter):
        drawn = Glyphs("train", size=SAMPLE, clutter=clutter).draw()
        steps = drawn.pixels.float().diff(dim=3).abs().mean(1)
        off = ~(drawn.masks[:, :, 1:] | drawn.masks[:, :, :-1])
        return (steps * off).sum() / off.sum()

    none, half, full = (edges(clutter) for clutter in (0, 0.5, 1))
    assert none < 0.7 * half < 0.7 * full


def test_one_scene_looks_alike_at_every_resolution():
    small, large = (Glyphs("val", size=SAMPLE, image_size=side, clutter=0) for side in (32, 96))
    for index in range(0, SAMPLE, 7):
        seen, expected = large.scene(index), small.scene(index)
        shrunk = np.asarray(seen.image.resize((32, 32), 4)).astype(float)
        assert np.abs(shrunk - np.asarray(expected.image)).mean() < 6


def test_every_face_draws_every_character_in_its_own_way():
    for face in FACES:
        shapes = {_bitmap(character, face, 40).tobytes() for character in CLASSES + MARKS}
        assert len(shapes) == len(CLASSES) + len(MARKS)  # a face that lacks characters draws one box for all of them
    assert not set(CLASSES) & set(MARKS)


@pytest.mark.parametrize("workers", [0, 2])
def test_timm_loads_it(workers):
    model = glyph_vit()
    glyphs = Glyphs("val", size=20, in_memory=bool(workers))
    size = resolve_model_data_config(model)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    options = {key: size[key] for key in keys}
    loader = create_loader(
        glyphs,
        batch_size=8,
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=False,
        device="cpu",
        **options,
    )
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]
    mean, std = (torch.tensor(size[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    drawn = glyphs.draw()
    assert torch.allclose(images, (drawn.pixels / 255 - mean) / std, atol=1e-5)
    assert torch.equal(labels, drawn.labels)


def test_transform_makes_the_items():
    glyphs = Glyphs("val", size=3, transform=lambda image: torch.from_numpy(np.array(image)).float().mean())
    assert isinstance(glyphs, Dataset)
    means, labels = next(iter(DataLoader(glyphs, batch_size=3)))
    assert means.shape == (3,) and labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "training"}, ["split", "'training'", "train, val, test"]),
        ({"size": 0}, ["size", "0", "1 or more"]),
        ({"size": 2.5}, ["size", "2.5", "whole number"]),
        ({"image_size": 8}, ["image_size", "8", "16 or more"]),
        ({"image_size": True}, ["image_size", "True", "whole number"]),
        ({"seed": -1}, ["seed", "-1", "0 or more"]),
        ({"clutter": -0.1}, ["clutter", "-0.1"]),
        ({"clutter": float("nan")}, ["clutter", "nan"]),
        ({"clutter": float("inf")}, ["clutter", "inf"]),
        ({"clutter": "much"}, ["clutter", "'much'"]),
    ],
)
def test_bad_arguments_are_refused_in_words(options, words):
    with pytest.raises(InputError) as caught:
        Glyphs(**{"split": "train", "size": 4, **options})
    assert all(word in str(caught.value) for word in words)


def test_scene_beyond_the_end_is_refused():
    glyphs = Glyphs("train", size=4)
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"no scene {index}; there are 4"):
            glyphs[index]
    assert len(list(DataLoader(glyphs, batch_size=None, collate_fn=lambda item: item))) == 4


def test_shipped_model_names_the_glyphs_nobody_showed_it():
    drawn = Glyphs("test", size=512, seed=1).draw()
    assert accuracy(glyph_vit(), drawn) >= 0.95
    assert accuracy(glyph_vit(pretrained=False), drawn) < 0.2


def test_shipped_model_tells_how_it_was_trained():
    assert GLYPH_VIT.stat().st_size <= 6_000_000
    told = json.loads(GLYPH_VIT.with_suffix(".json").read_text())
    with safe_open(GLYPH_VIT, "pt") as weights:
        header = weights.metadata()
    assert header.pop("format") == "pt"
    assert header == {name: text if isinstance(text, str) else json.dumps(text) for name, text in told.items()}
    assert "examples/train_glyphs.py" in told["command"]
    assert {"python", "torch", "timm"} <= set(told["versions"])
    assert 95 <= told["accuracy_percent"] < 100
    assert told["machine"] and told["date"] and told["scenes_seen"] > 100_000


def test_shipped_model_is_found_by_name_and_knows_its_inputs():
    model = load_model("idlefx.models:glyph_vit")
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    images, facts = guess_inputs(model)
    assert images.shape == (2, 3, 32, 32)
    assert facts.data["mean"] == (0.5, 0.5, 0.5) and facts.data["std"] == (0.25, 0.25, 0.25)
    assert model(images).shape == (2, len(CLASSES))


def test_shipped_model_idles():
    table = idlefx.inspect(glyph_vit())
    assert [block.image_tokens for block in table] == [64] * 12
    idle = idlefx.convert(glyph_vit(), layers=[3, 6, 9], keep=0.7)
    drawn = Glyphs("test", size=64).draw()
    images = (drawn.pixels / 255 - 0.5) / 0.25
    with torch.inference_mode():
        moved = idle(images) - glyph_vit()(images)
    assert moved.shape == (64, len(CLASSES)) and moved.abs().max() > 0.1


def test_missing_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("idlefx.demo.model.GLYPH_VIT", tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        glyph_vit()
