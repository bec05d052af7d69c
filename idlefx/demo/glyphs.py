"""The data set that is drawn instead of downloaded."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import trange

from idlefx.demo.scenes import CLASSES, Scene, draw_scene
from idlefx.errors import InputError

SPLITS = ("train", "val", "test")
SMALLEST = 16  # below it, not even people can tell the glyphs apart


class DrawnScenes(NamedTuple):
    """Many scenes as tensors.

    Attributes:
        pixels: (size, 3, H, W), `uint8`.
        labels: (size,).
        masks: (size, H, W), true where the glyph is.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor


class Glyphs(Dataset[tuple[Any, int]]):
    """Scenes with one character each, over clutter: where to look matters.

    A scene depends on its number, the split and the seed alone; no scene is in two splits. The character is one of
    `classes`, drawn equally often, at a random place, size, turn and colour; the clutter is blobs, lines, marks
    that are no character of any class, and torn characters.

    An item is `(image, label)`: a PIL image, or what `transform` makes of it (timm's `create_loader` sets
    `transform`). A mirrored character is no character: train without horizontal flips.

    Args:
        split: "train", "val" or "test".
        size: How many scenes.
        image_size: Side of the images in pixels.
        seed: Another seed, other scenes.
        clutter: How much stands around the glyph: 0 for nothing, 1 for what models are measured on.
        transform: What to make of an image.
        in_memory: Draw every scene now, once, and keep it (`3 * image_size**2` bytes each).

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int,
        image_size: int = 32,
        seed: int = 0,
        clutter: float = 1.0,
        transform: Callable[[Image.Image], Any] | None = None,
        in_memory: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"glyphs: there is no split {split!r}; there are {', '.join(SPLITS)}")
        for name, value, least in (("size", size, 1), ("image_size", image_size, SMALLEST), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"glyphs: {name} is {value!r}; expected a whole number, {least} or more")
        if not isinstance(clutter, int | float) or not 0 <= clutter < math.inf:
            raise InputError(
                f"glyphs: clutter is {clutter!r}; expected 0 for none, 1 for the usual, or a number between"
            )
        self.split, self.size, self.image_size, self.seed, self.clutter = split, size, image_size, seed, clutter
        self.transform = transform
        self.classes = list(CLASSES)
        self._drawn = self.draw() if in_memory else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number = self._number(index)
        if self._drawn is None:
            image = self.scene(number).image
        else:
            image = Image.fromarray(self._drawn.pixels[number].permute(1, 2, 0).numpy())
        return (image if self.transform is None else self.transform(image)), number % len(CLASSES)

    def scene(self, index: int) -> Scene:
        """Draw one scene, with its mask."""
        number = self._number(index)
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), number])
        return draw_scene(random, number % len(CLASSES), self.image_size, self.clutter)

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Where the glyph of one scene is, (H, W)."""
        return self.scene(index).mask

    def draw(self) -> DrawnScenes:
        """Draw every scene: some thousands a second at 32 pixels."""
        side = self.image_size
        pixels = torch.empty(self.size, 3, side, side, dtype=torch.uint8)
        masks = torch.empty(self.size, side, side, dtype=torch.bool)
        bar = trange(self.size, desc=f"draw {self.split}", unit="scene", delay=2, leave=False, disable=None)
        for number in bar:
            scene = self.scene(number)
            pixels[number] = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)
            masks[number] = torch.from_numpy(scene.mask)
        return DrawnScenes(pixels, torch.arange(self.size) % len(CLASSES), masks)

    def _number(self, index: int) -> int:
        number = index + self.size if index < 0 else index
        if not 0 <= number < self.size:
            raise IndexError(f"glyphs: there is no scene {index}; there are {self.size}")
        return number
