"""What a picture goes through before a model sees it: its size and normalisation, and in training augmentation."""

from contextlib import suppress
from functools import partial
from typing import Any

from PIL import Image

from idlefx.capture.inputs import IMAGENET, MODES
from idlefx.errors import InputError
from idlefx.records import ModelFacts

CROP, CROPPED = "crop", (0.5, 1.0)  # share of a picture that such a crop shows
REDRAWS = 4  # timm's policies ask once in a while for an image of 0 bits, which Pillow refuses: another draw is made


def training_transform(facts: ModelFacts, augment: str | None, erase: float | None) -> Any:
    """A picture to a tensor (C, H, W), augmented.

    Args:
        facts: Of the model: size and normalisation are its own, or ImageNet's.
        augment: timm's policy, "crop" for random crops and mirror images alone, or "none".
        erase: Share of the pictures of which a part is erased.

    Raises:
        InputError: timm knows no such policy.
    """
    if augment == "none":
        return evaluation_transform(facts)
    if augment == CROP:
        options: dict[str, Any] = {"scale": CROPPED, "color_jitter": 0.0, "re_prob": erase}
    else:
        options = {"auto_augment": augment, "re_prob": erase, "re_mode": "pixel"}
    try:
        return _transform(facts, is_training=True, **options)
    except (AssertionError, ValueError, IndexError) as error:
        raise InputError(f"data: timm knows no augmentation {augment!r}: {error}") from error


def evaluation_transform(facts: ModelFacts) -> Any:
    """A picture to a tensor (C, H, W), as the model's library evaluates it."""
    data = _data(facts)
    return _transform(facts, crop_pct=data["crop_pct"], crop_mode=data.get("crop_mode"))


def _transform(facts: ModelFacts, **options: Any) -> Any:
    from timm.data import create_transform

    data, size = _data(facts), facts.image_size
    own = {name: data[name] for name in ("mean", "std", "interpolation")}
    mode = MODES.get(size[0], "RGB")
    return partial(_prepare, mode, create_transform(size, **own, **options))  # type: ignore[arg-type]


def _data(facts: ModelFacts) -> dict[str, Any]:
    return {**IMAGENET, "interpolation": "bicubic", **(facts.data or {})}


def _prepare(mode: str, transform: Any, image: Image.Image) -> Any:
    image = image.convert(mode)
    for _ in range(REDRAWS):
        with suppress(ValueError):
            return transform(image)
    return transform(image)
