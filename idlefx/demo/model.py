"""A small Vision Transformer that comes with its weights."""

from pathlib import Path

from torch import nn

from idlefx.capture.models import load_weights
from idlefx.demo.scenes import CLASSES

GLYPH_VIT = Path(__file__).with_name("glyph_vit.safetensors")  # its header says how it was trained


def glyph_vit(pretrained: bool = True) -> nn.Module:
    """A small Vision Transformer that names the glyph in the scenes of `idlefx.data.Glyphs`.

    Twelve blocks of width 64, a class token and 64 image tokens: patches of 4 in images (B, 3, 32, 32).

    Args:
        pretrained: Whether it comes with the weights that examples/train_glyphs.py trained; random ones otherwise.

    Raises:
        InputError: The shipped weights are missing.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        32, 4, num_classes=len(CLASSES), embed_dim=64, depth=12, num_heads=4, weight_init="jax"
    )
    model.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": "glyph_vit",
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(CLASSES),
        "label_names": list(CLASSES),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if pretrained:
        load_weights(model, GLYPH_VIT)
    return model.eval()
