"""Models by name: `glyph_vit` is small and comes with the package, `saliency_vit` is real and is fetched."""

from idlefx.capture.models import load_model
from idlefx.demo.model import glyph_vit
from idlefx.demo.saliency import saliency_vit

__all__ = ["glyph_vit", "load_model", "saliency_vit"]
