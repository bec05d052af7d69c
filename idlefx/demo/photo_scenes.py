"""Scenes of real pictures: one photographed thing pasted into a crop of a photograph, so that its mask is known."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from idlefx.demo.photographs import KINDS, Photographs, kept_photographs
from idlefx.demo.saliency import MEAN, STD
from idlefx.errors import InputError

KIND_NAMES = tuple(KINDS)
SPLITS = ("all", "train", "test")
EVERY = 3  # of the things of a kind, and of the photographs, every third is for the split "test"
# Lengths are parts of the image's side.
THING = (70 / 224, 150 / 224)  # longer side of a thing before it is turned
CROP = (0.25, 0.5)  # side of the crop, in shorter sides of the photograph: so near, it shows few things of its own
TURN = 30.0  # degrees, either way
COVERED = 0.1  # least part of its box that a thing covers: nets and goalposts are no things to look at
LARGEST = 1200  # shorter side of a photograph in memory


class Scenes(NamedTuple):
    """Many scenes as tensors.

    Attributes:
        images: (count, 3, size, size), normalised as the real model takes them.
        masks: (count, size, size), true where the thing is.
        kinds: (count,), positions in `KIND_NAMES`.
    """

    images: Tensor
    masks: Tensor
    kinds: Tensor


def scenes(count: int, seed: int = 0, size: int = 224, split: str = "all") -> Scenes:
    """Make scenes of the pictures that `python -m idlefx.demo fetch` downloads.

    A scene depends on its number, seed, size and split alone. Every kind is drawn equally often.

    Args:
        count: How many.
        seed: Another seed, other scenes.
        size: Side of the images in pixels.
        split: "all" things and photographs, or those of "train" or "test", which have none in common.

    Raises:
        InputError: An argument is out of its range, or the pictures were not fetched.
    """
    if split not in SPLITS:
        raise InputError(f"scenes: there is no split {split!r}; there are {', '.join(SPLITS)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("size", size, 16)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"scenes: {name} is {value!r}; expected a whole number, {least} or more")
    pictures = _of_split(kept_photographs(), split)
    made = [make_scene(np.random.default_rng([seed, number]), pictures, number, size) for number in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in made])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    masks = torch.from_numpy(np.stack([mask for _, mask in made]))
    return Scenes((pixels / 255 - mean) / std, masks, torch.arange(count) % len(KIND_NAMES))


def make_scene(
    random: Generator, pictures: Photographs, number: int, size: int
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """One picture, and where its thing is, (size, size).

    Args:
        random: Where every choice comes from.
        pictures: Of what.
        number: Of the scene, which decides the kind.
        size: Side of the picture in pixels.
    """
    things = [path for path in pictures.things[KIND_NAMES[number % len(KIND_NAMES)]] if _thing(path) is not None]
    ground = _ground(pictures.grounds[random.integers(len(pictures.grounds))])
    side = int(random.uniform(*CROP) * min(ground.size))
    left, top = (int(random.integers(0, extent - side + 1)) for extent in ground.size)
    canvas = ground.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    thing = _thing(things[random.integers(len(things))])
    assert thing is not None
    scale = size * random.uniform(*THING) / max(thing.size)
    wide, high = (max(1, round(scale * extent)) for extent in thing.size)
    thing = thing.resize((wide, high), Image.Resampling.BICUBIC)
    thing = thing.rotate(random.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    x, y = (int(random.integers(0, max(1, size - extent + 1))) for extent in thing.size)
    cover = Image.new("L", canvas.size)
    cover.paste(thing.getchannel("A"), (x, y))
    canvas.paste(thing, (x, y), thing)
    return canvas, np.asarray(cover) >= 128


def _of_split(pictures: Photographs, split: str) -> Photographs:
    def part(files: list[Path]) -> list[Path]:
        return [file for place, file in enumerate(files) if split == "all" or (place % EVERY == 0) == (split == "test")]

    return Photographs({kind: part(files) for kind, files in pictures.things.items()}, part(pictures.grounds))


@lru_cache(maxsize=512)
def _thing(path: Path) -> Image.Image | None:
    """A thing, cut out at its edges; None for what is drawn in grey or covers next to nothing."""
    with Image.open(path) as file:
        if "L" in file.mode:
            return None
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    return image if np.mean(np.asarray(image)[..., 3] >= 128) >= COVERED else None


@lru_cache(maxsize=64)
def _ground(path: Path) -> Image.Image:
    with Image.open(path) as file:
        image = file.convert("RGB")
    wide, high = (extent * LARGEST / min(image.size) for extent in image.size)
    image.thumbnail((wide, high))  # never enlarges
    return image
