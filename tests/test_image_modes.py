"""Photographs of all kinds are read as the same photograph in plain RGB would be."""

import numpy as np
import pytest
import torch
from PIL import Image

import idlefx
from idlefx.capture.inputs import guess_inputs
from idlefx.demo.glyphs import Glyphs
from idlefx.demo.model import glyph_vit
from idlefx.reporting.images import read_photo

PLAIN = Glyphs("test", size=1, image_size=40).scene(0).image
TOLERANCE = 0.5 / 255 / 0.25  # half a step of 8 bits, normalised


@pytest.fixture(scope="module")
def facts():
    return guess_inputs(glyph_vit())[1]


def assert_alike(path, plain, facts):
    assert torch.allclose(read_photo(path, facts), read_photo(plain, facts), atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "1", "CMYK"])
def test_colours_are_those_of_the_picture(tmp_path, facts, mode):
    picture = PLAIN.convert(mode)
    picture.save(path := tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png"), quality=100)
    plain = Image.open(path).convert("RGB") if mode == "CMYK" else picture.convert("RGB")
    assert_alike(path, plain, facts)


def test_sixteen_bits_are_not_cut_off(tmp_path, facts):
    grey = np.asarray(PLAIN.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(path := tmp_path / "photo.png")
    assert Image.open(path).mode.startswith("I")
    assert_alike(path, Image.fromarray(grey), facts)


def test_a_photograph_taken_sideways_is_turned(tmp_path, facts):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left
    PLAIN.rotate(90, expand=True).save(path := tmp_path / "photo.png", exif=exif)
    assert_alike(path, PLAIN, facts)


def test_floating_point_numbers_have_no_known_range(tmp_path, facts):
    Image.fromarray(np.ones((9, 9), np.float32)).save(path := tmp_path / "depth.tiff")
    with pytest.raises(idlefx.InputError, match=r"depth.tiff holds floating-point numbers.*pass a tensor"):
        read_photo(path, facts)
