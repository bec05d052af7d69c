"""Draw a scene: one character over blobs, lines, marks that are no character of any class, and torn characters."""

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import get_data_path
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CLASSES = "23456789ACEFHJKLMNPRTWXY"  # without pairs that look alike when turned or skewed: 0 O D, 1 I, 2 Z, 5 S, …
MARKS = "ЖФЮЯЩБЛΣΨΞΩΓ§&@?∇∞∂♣♪☼◆"  # like characters, but of no class
FACES = ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "Serif-Italic", "SansMono", "SansMono-Bold")
FINE = 2  # scenes are drawn at this multiple of their size, then averaged

# Lengths are parts of the image's side, colours run to 255.
GLYPH_HEIGHT, MARK_HEIGHT, TORN_HEIGHT = (0.42, 0.62), (0.22, 0.42), (0.38, 0.55)
TURN = 25.0  # degrees, either way
SQUEEZE = 0.2  # how much narrower or wider than in its font a character may be
CONTRAST = 90.0  # least difference in brightness between the glyph and the mean of the ground
# How many there are of each on average at clutter 1; a scene has between none and twice as many.
BLOBS, LINES, STAMPS = 2.0, 2.0, 2.0
NOISE = 6.0  # standard deviation of the noise at clutter 1

Colour = tuple[int, int, int]


class Scene(NamedTuple):
    """One picture and where its glyph is.

    Attributes:
        image: The picture, RGB.
        mask: True where the glyph is, (H, W).
    """

    image: Image.Image
    mask: NDArray[np.bool_]


def draw_scene(random: Generator, label: int, image_size: int, clutter: float) -> Scene:
    """Draw the character `CLASSES[label]` somewhere, in some face, size, turn and colour, over clutter.

    Args:
        random: Where every choice comes from.
        label: A position in `CLASSES`.
        image_size: Side of the picture in pixels.
        clutter: 0 for a plain ground, 1 for the usual amount.
    """
    side = FINE * image_size
    canvas, ground = _ground(random, side)
    _clutter(random, canvas, clutter)
    glyph = _turned(random, CLASSES[label], side, GLYPH_HEIGHT)
    left, top = (int(random.integers(0, max(1, side - extent + 1))) for extent in glyph.size)
    canvas.paste(_colour(random, ground), (left, top), glyph)
    cover = Image.new("L", canvas.size)
    cover.paste(255, (left, top), glyph)
    noise = NOISE * clutter * random.standard_normal((image_size, image_size, 3), dtype=np.float32)
    pixels = (np.asarray(canvas.reduce(FINE)) + noise).clip(0, 255).astype(np.uint8)
    return Scene(Image.fromarray(pixels), np.asarray(cover.reduce(FINE)) >= 128)


def _ground(random: Generator, side: int) -> tuple[Image.Image, NDArray[np.float64]]:
    """A soft gradient, and its mean colour."""
    mean = random.uniform(30, 225, 3)
    coarse = (mean + random.uniform(-30, 30, (3, 3, 3))).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR), mean


def _clutter(random: Generator, canvas: Image.Image, amount: float) -> None:
    """Everything that is not the glyph; later things hide earlier ones."""
    side, pen = canvas.width, ImageDraw.Draw(canvas)
    blobs, lines, stamps = (int(random.uniform(0, 2 * amount * mean + 1)) for mean in (BLOBS, LINES, STAMPS))
    for _ in range(blobs):
        x, y, wide, high = side * random.uniform((0, 0, 0.03, 0.03), (1, 1, 0.18, 0.18))
        pen.ellipse((x - wide, y - high, x + wide, y + high), fill=_colour(random))
    for _ in range(lines):
        ends = side * random.uniform(0, 1, 4)
        pen.line([float(end) for end in ends], fill=_colour(random), width=round(side * random.uniform(0.02, 0.07)))
    for _ in range(stamps):
        if random.random() < 0.5:
            stamp = _turned(random, MARKS[random.integers(len(MARKS))], side, MARK_HEIGHT)
        else:
            stamp = _torn(random, _turned(random, CLASSES[random.integers(len(CLASSES))], side, TORN_HEIGHT))
        x, y = (int(random.uniform(-0.3 * extent, side - 0.7 * extent)) for extent in stamp.size)
        canvas.paste(_colour(random), (x, y), stamp)


def _turned(random: Generator, character: str, side: int, heights: tuple[float, float]) -> Image.Image:
    """A character of random face, size, squeeze and turn: how much of each pixel it covers, to 255."""
    height, squeeze, turn = random.uniform((heights[0], 1 - SQUEEZE, -TURN), (heights[1], 1 + SQUEEZE, TURN))
    tallest = side * heights[1]
    upright = _bitmap(character, FACES[random.integers(len(FACES))], math.ceil(tallest))
    high = side * height
    wide = min(upright.width * high / upright.height * squeeze, tallest)
    resized = upright.resize((max(1, round(wide)), max(1, round(high))), Image.Resampling.BILINEAR)
    turned = resized.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    return turned.crop(turned.getbbox())


def _torn(random: Generator, character: Image.Image) -> Image.Image:
    """Less than half of a character: its left, right, upper or lower part."""
    wide, high = character.size
    part, edge = random.uniform(0.3, 0.45), random.integers(4)
    across, down = (round(wide * part), high) if edge < 2 else (wide, round(high * part))
    left, top = (wide - across if edge == 1 else 0), (high - down if edge == 3 else 0)
    return character.crop((left, top, left + max(1, across), top + max(1, down)))


@lru_cache(maxsize=4096)
def _bitmap(character: str, face: str, height: int) -> Image.Image:
    """A character cut out at its edges, its ink about `height` pixels high."""
    path = Path(get_data_path(), "fonts", "ttf", f"DejaVu{face}.ttf")
    box = _ink(character, path, height).getbbox()
    if box is None:
        raise AssertionError(f"{path} draws nothing for {character!r}")
    ink = _ink(character, path, round(height * height / (box[3] - box[1])))
    return ink.crop(ink.getbbox())


def _ink(character: str, path: Path, type_size: int) -> Image.Image:
    image = Image.new("L", (2 * type_size, 2 * type_size))
    font = ImageFont.truetype(path, type_size)
    ImageDraw.Draw(image).text((type_size, type_size), character, fill=255, font=font, anchor="mm")
    return image


def _colour(random: Generator, ground: NDArray[np.float64] | None = None) -> Colour:
    """Any colour; on a ground, one that is clearly brighter or darker."""
    while True:
        red, green, blue = random.integers(0, 256, 3)
        if ground is None or abs(float(([red, green, blue] - ground) @ (0.299, 0.587, 0.114))) >= CONTRAST:
            return int(red), int(green), int(blue)
