"""Photographs, ready for the model and for the eye."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from idlefx.capture.inputs import IMAGENET, MODES
from idlefx.errors import InputError
from idlefx.records import ModelFacts

Photo = str | Path | Image.Image
Pixels = NDArray[np.float32]

ZOOM = 2  # photographs are shown at twice the resolution the model sees


class ReadImage(NamedTuple):
    """One image, twice.

    Attributes:
        pixels: What to show, (height, width, 3) between 0 and 1.
        batch: What the model takes, (1, channels, height, width): normalised, or bytes.
    """

    pixels: Pixels
    batch: Tensor


def read_images(
    images: Photo | Sequence[Photo] | Tensor, facts: ModelFacts, *, as_bytes: bool = False
) -> Iterator[ReadImage]:
    """Read, crop and normalise images one by one.

    Args:
        images: Files, PIL images, or a tensor (B, C, H, W) of the model's size: `uint8` holds pixels,
            floating point what the model takes, normalised already.
        facts: Of the model; of `data` mean, std, crop_pct, crop_mode and interpolation, or else ImageNet's.
        as_bytes: Whether the model takes `uint8` and normalises by itself.

    Raises:
        InputError: An image cannot be read or does not fit the model.
    """
    size = facts.image_size
    if isinstance(images, Tensor):
        mean, std = _statistics(facts)
        wanted = ", ".join(map(str, size))
        if len(size) != 3:
            raise InputError(f"images: the model takes no images (B, C, H, W), but inputs of shape (B, {wanted})")
        if images.ndim != 4 or images.shape[1:] != tuple(size):
            raise InputError(f"images: expected shape (B, {wanted}), got {tuple(images.shape)}")
        for image in images.cpu():
            shown = image / 255 if image.dtype == torch.uint8 else image.float() * std + mean
            normal = (shown - mean) / std if image.dtype == torch.uint8 else image.float()
            yield ReadImage(_shown(shown), (_bytes(shown) if as_bytes else normal).unsqueeze(0))
        return
    for photo in [images] if isinstance(images, Photo) else images:
        opened = _open(photo, facts)
        seen, part = _crop(opened, facts)
        larger = opened.resize((ZOOM * size[2], ZOOM * size[1]), _resampling(facts), part)
        taken = _bytes(_tensor(seen)) if as_bytes else _normal(seen, facts)
        yield ReadImage(_shown(_tensor(larger)), taken.unsqueeze(0))


def read_photo(photo: Photo, facts: ModelFacts, *, as_bytes: bool = False) -> Tensor:
    """What the model takes of one photograph, (channels, height, width): read, cropped and normalised.

    Args:
        photo: A file, or a PIL image.
        facts: As for `read_images`.
        as_bytes: Whether the model takes `uint8` and normalises by itself.

    Raises:
        InputError: It cannot be read, or the model takes no photographs.
    """
    seen, _ = _crop(_open(photo, facts), facts)
    return _bytes(_tensor(seen)) if as_bytes else _normal(seen, facts)


def _bytes(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _data(facts: ModelFacts) -> Mapping[str, Any]:
    return {**IMAGENET, **(facts.data or {})}


def _statistics(facts: ModelFacts) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (channels, 1, 1)."""
    data, channels = _data(facts), facts.image_size[0]
    mean, std = (_per_channel(data[key], channels) for key in ("mean", "std"))
    return mean, std


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    known = torch.tensor(values)
    return (known if len(known) == channels else known.mean().expand(channels)).view(-1, 1, 1)


def _open(photo: Photo, facts: ModelFacts) -> Image.Image:
    channels = facts.image_size[0]
    if len(facts.image_size) != 3 or channels not in MODES:
        takes = f"{channels} channels" if len(facts.image_size) == 3 else f"inputs of size {tuple(facts.image_size)}"
        raise InputError(f"images: the model takes {takes}, a photograph has 3 channels; pass a tensor")
    try:
        image = ImageOps.exif_transpose(photo if isinstance(photo, Image.Image) else Image.open(photo))
        return _in_bytes(image, photo).convert(MODES[channels])
    except UnidentifiedImageError:
        raise InputError(f"images: {photo} is no image; expected a photograph (JPEG, PNG, …)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as its decoder is minded
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"images: cannot read {photo}: {reason}; mend it or leave it out") from error


def _in_bytes(image: Image.Image, photo: Photo) -> Image.Image:
    """The image with 8 bits a channel; of 16 bits, which `convert` would cut off at 255, the upper ones."""
    if image.mode == "F":
        raise InputError(f"images: {photo} holds floating-point numbers, whose range is not known; pass a tensor")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))


def _crop(photo: Image.Image, facts: ModelFacts) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Resize the photograph and take its centre.

    Returns:
        What the model sees, and which part of the photograph that is: left, upper, right and lower edge.

    Source: timm/data/transforms_factory.py, transforms_imagenet_eval.
    """
    data, (_, height, width) = _data(facts), facts.image_size
    wide, high = (math.floor(n / data["crop_pct"]) for n in (width, height))
    if data.get("crop_mode") != "squash":
        ratio = min(photo.width / wide, photo.height / high)
        exact = photo.width / ratio, photo.height / ratio
        wide, high = (int(n + 1e-9) if width == height else round(n) for n in exact)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    seen = photo.resize((wide, high), _resampling(facts)).crop((left, top, left + width, top + height))
    x, y = photo.width / wide, photo.height / high
    return seen, (left * x, top * y, (left + width) * x, (top + height) * y)


def _resampling(facts: ModelFacts) -> Image.Resampling:
    return Image.Resampling[str(_data(facts).get("interpolation", "bicubic")).upper()]


def _normal(photo: Image.Image, facts: ModelFacts) -> Tensor:
    mean, std = _statistics(facts)
    return (_tensor(photo) - mean) / std


def _tensor(photo: Image.Image) -> Tensor:
    array = np.asarray(photo, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(photo.height, photo.width, -1)).permute(2, 0, 1)


def _shown(image: Tensor) -> Pixels:
    colours = image if image.shape[0] == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    pixels: Pixels = colours.permute(1, 2, 0).clamp(0, 1).numpy()
    return pixels
