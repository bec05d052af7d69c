"""The data sets: one is drawn instead of downloaded, one is made of real pictures that were fetched."""

from idlefx.demo.glyphs import Glyphs
from idlefx.demo.photo_scenes import Scenes, scenes

__all__ = ["Glyphs", "Scenes", "scenes"]
