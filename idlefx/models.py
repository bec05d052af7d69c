"""Models by name: `idlefx.models:glyph_vit` is the small trained one that comes with the package."""

from idlefx.capture.models import load_model
from idlefx.demo.model import glyph_vit

__all__ = ["glyph_vit", "load_model"]
