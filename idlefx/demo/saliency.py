"""A real model: DINOv2 ViT-S/14 with a decoder that says of each pixel how much it draws the eye."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlefx.demo.onnx_weights import read_weights
from idlefx.demo.weights import kept_weights
from idlefx.errors import InputError

PATCH, STORED_GRID = 14, 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Decoder(nn.Module):
    """From patch features (B, 384, h, w) to a map of logits (B, 1, 8h, 8w)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for level, (wide, narrow) in enumerate(pairwise(widths), start=1):
            self.add_module(f"upconv{level}", nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.add_module(f"bn{level}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Three times twice as large, then one channel."""
        for level in (1, 2, 3):
            upconv, norm = getattr(self, f"upconv{level}"), getattr(self, f"bn{level}")
            x = F.relu(norm(upconv(x)))
        logits: Tensor = self.final_conv(x)
        return logits


class SaliencyViT(nn.Module):
    """`forward(images)`: the class token's feature (B, 384) and the saliency of each pixel (B, 1, S, S), 0 to 1.

    The decoder does not read the class token: its feature is what a classifier or a search for like images would read.

    Args:
        image_size: Side S of the images in pixels, a multiple of 14.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        import timm

        self.backbone: Any = timm.create_model("vit_small_patch14_dinov2", img_size=image_size, num_classes=0)
        self.decoder = Decoder()
        self.grid = image_size // PATCH
        self.pretrained_cfg = {
            "architecture": "saliency_vit",
            "input_size": (3, image_size, image_size),
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features and map of normalised images (B, 3, S, S)."""
        tokens = self.backbone.forward_features(images)
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        logits = F.interpolate(self.decoder(patches), images.shape[-2:], mode="bilinear", align_corners=False)
        return {"feature": tokens[:, 0], "saliency": logits.sigmoid()}


def saliency_vit(image_size: int = 224) -> SaliencyViT:
    """The real model with its weights, which `python -m idlefx.demo fetch` downloads, in evaluation mode.

    Twelve blocks of width 384, a class token and one image token for each 14 × 14 pixels: 256 at 224 pixels; 1,369 at
    518, the size whose positions are stored. Those of other sizes are interpolated.

    Args:
        image_size: Side of the images in pixels, a multiple of 14.

    Raises:
        InputError: The weights were not fetched or are damaged, `onnx` is not installed, or the size does not fit.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < PATCH or image_size % PATCH:
        raise InputError(f"model: image_size is {image_size!r}; expected a multiple of {PATCH}, such as 224 or 518")
    weights = read_weights(kept_weights())
    weights["backbone.pos_embed"] = _resized(weights["backbone.pos_embed"], image_size // PATCH)
    model = SaliencyViT(image_size)
    counted = {name: count for name, count in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict({**weights, **counted})
    return model.eval()


def _resized(positions: Tensor, grid: int) -> Tensor:
    """Positions of the class token and of STORED_GRID² patches, (1, N, C), for another grid of patches."""
    if grid == STORED_GRID:
        return positions
    image = positions[:, 1:].transpose(1, 2).unflatten(2, (STORED_GRID, STORED_GRID))
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], image.flatten(2).transpose(1, 2)], dim=1)
