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
        batch: What the model takes, (1, channels, height, width), normalised.
    """

    pixels: Pixels
    batch: Tensor


def read_images(images: Photo | Sequence[Photo] | Tensor, facts: ModelFacts) -> Iterator[ReadImage]:
    """Read, crop and normalise images one by one.

    Args:
        images: Files, PIL images, or a tensor (B, C, H, W) of the model's size: `uint8` holds pixels,
            floating point what the model takes, normalised already.
        facts: Of the model; of `data` mean, std, crop_pct, crop_mode and interpolation, or else ImageNet's.

    Raises:
        InputError: An image cannot be read or does not fit the model.
    """
    data, size = {**IMAGENET, **(facts.data or {})}, facts.image_size
    channels = size[0]
    mean, std = (_per_channel(data[key], channels) for key in ("mean", "std"))

    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1:] != tuple(size):
            wanted = ", ".join(map(str, size))
            raise InputError(f"images: expected shape (B, {wanted}), got {tuple(images.shape)}")
        for image in images.cpu():
            normal = (image / 255 - mean) / std if image.dtype == torch.uint8 else image.float()
            yield ReadImage(_shown(normal * std + mean), normal.unsqueeze(0))
        return
    if channels not in MODES:
        raise InputError(f"images: the model takes {channels} channels, a photograph has 3; pass a tensor")
    photos = [images] if isinstance(images, Photo) else images
    for photo in photos:
        seen, shown = _crop(_open(photo).convert(MODES[channels]), size, data)
        yield ReadImage(_shown(shown), ((seen - mean) / std).unsqueeze(0))


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    known = torch.tensor(values)
    return (known if len(known) == channels else known.mean().expand(channels)).view(-1, 1, 1)


def _open(photo: Photo) -> Image.Image:
    try:
        image = photo if isinstance(photo, Image.Image) else Image.open(photo)
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InputError(f"images: {photo} is no image; expected a photograph (JPEG, PNG, …)") from None
    except OSError as error:
        raise InputError(f"images: cannot read {photo}: {error.strerror or error}") from error


def _crop(photo: Image.Image, size: Sequence[int], data: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Resize the photograph and take its centre.

    Returns:
        What the model sees, (channels, height, width), and the same part of the photograph at twice the
        resolution; both between 0 and 1.

    Source: timm/data/transforms_factory.py, transforms_imagenet_eval.
    """
    _, height, width = size
    wide, high = (math.floor(n / data["crop_pct"]) for n in (width, height))
    if data.get("crop_mode") != "squash":
        ratio = min(photo.width / wide, photo.height / high)
        exact = photo.width / ratio, photo.height / ratio
        wide, high = (int(n + 1e-9) if width == height else round(n) for n in exact)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    resample = Image.Resampling[str(data.get("interpolation", "bicubic")).upper()]
    seen = photo.resize((wide, high), resample).crop((left, top, left + width, top + height))
    x, y = photo.width / wide, photo.height / high
    part = (left * x, top * y, (left + width) * x, (top + height) * y)
    return _tensor(seen), _tensor(photo.resize((ZOOM * width, ZOOM * height), resample, part))


def _tensor(photo: Image.Image) -> Tensor:
    array = np.asarray(photo, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(photo.height, photo.width, -1)).permute(2, 0, 1)


def _shown(image: Tensor) -> Pixels:
    colours = image if image.shape[0] == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    pixels: Pixels = colours.permute(1, 2, 0).clamp(0, 1).numpy()
    return pixels
