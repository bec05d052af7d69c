"""The data set that is drawn instead of downloaded."""

from idlefx.demo.glyphs import Glyphs

__all__ = ["Glyphs"]
