"""Tiny pictures whose class is their colour, and a tiny model for them."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import idlefx
from idlefx.training.config import Settings
from idlefx.training.loader import ImageLoader

MODEL = f"{__name__}:vit"  # as the shell and emitted scripts name it
CLASSES, SIDE = 4, 16
PLAIN = Settings(epochs=2, lr=1e-3, mixup=0.0, cutmix=0.0, smoothing=0.0)
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])


def picture(label: int, number: int) -> Image.Image:
    noise = np.random.default_rng([label, number]).integers(-50, 50, (SIDE, SIDE, 3))
    return Image.fromarray((COLOURS[label % CLASSES] + noise).clip(0, 255).astype(np.uint8))


class Colours(Dataset):
    """Pictures (3, 16, 16) that are seen with some noise, as augmentation would add."""

    def __init__(self, size: int = 48, noise: float = 0.3) -> None:
        self.size, self.noise = size, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        label = index % CLASSES
        clean = torch.from_numpy(np.array(picture(label, index // CLASSES))).permute(2, 0, 1) / 127.5 - 1
        return clean + self.noise * torch.randn(clean.shape), label


def folder(root: Path, classes: Sequence[str] = "abcd", train: int = 12, val: int = 4) -> Path:
    """Write pictures as `train/a/0.png`, `validation/d/3.png`."""
    for split, count in (("train", train), ("validation", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture(label, number).save(root / split / name / f"{number}.png")
    return root


def vit(**options: Any) -> nn.Module:
    """Three blocks, 16 image tokens and a class token; the same weights every time."""
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "patch_size": 4, "embed_dim": 24, "num_heads": 2, "depth": 3, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **(shape | options)).eval()


@cache
def _converted(**options: Any) -> tuple[nn.Module, idlefx.IdleModule]:
    dense = vit(**options)
    return dense, idlefx.convert(dense, layers=[1], keep=0.5)


def models(**options: Any) -> tuple[nn.Module, idlefx.IdleModule]:
    """A dense model and its idling twin, fresh."""
    return deepcopy(_converted(**options))


def batches(size: int = 48, batch_size: int = 8, **options: Any) -> tuple[ImageLoader, ImageLoader]:
    """Training and validation batches."""
    return ImageLoader(Colours(size), batch_size, training=True, **options), ImageLoader(Colours(24, 0.0), batch_size)
