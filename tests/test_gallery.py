"""The gallery of whole photographs: taken out of Qt resource files, kept whole or not at all; nothing is downloaded."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idlefx.cli.demo import main
from idlefx.demo import gallery
from idlefx.demo.debian import DOCUMENTS
from idlefx.demo.qt_resources import resources
from idlefx.errors import InputError


def webp(wide: int, high: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(wide).integers(0, 256, (high, wide, len(mode)), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels, mode).save(file, "webp")
        return file.getvalue()


def resource_file(version: int, files: dict[str, bytes], packed: str = "") -> bytes:
    """A resource file with one folder; `packed` names the file that says it is compressed."""
    entries, data, names = [(0, 2, 1, 1)], b"", b""
    for place, name in enumerate(["folder", *files]):
        begin = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if place == 0:
            entries.append((begin, 2, len(files), 2))
        else:
            entries.append((begin, int(name == packed), 0, len(data)))
            data += struct.pack(">I", len(files[name])) + files[name]
    time = b"\0" * (0 if version < 2 else 8)
    tree = b"".join(struct.pack(">IHII", *entry) + time for entry in entries)
    head = 24
    offsets = head, head + len(tree), head + len(tree) + len(data)
    return struct.pack(">4s4I", b"qres", version, *offsets) + b"\0" * 4 + tree + data + names


def unpacked(folder: Path) -> Path:
    """What the package unpacks to: in each album a photograph and what is none."""
    (folder / gallery.RESOURCES).mkdir(parents=True)
    for number, album in enumerate(gallery.ALBUMS):
        files = {
            "photograph.webp": webp(320 + number, 310),
            "button.webp": webp(64, 64),
            "figure.webp": webp(320, 320, "RGBA"),
            "sound.ogg": b"none",
            "broken.webp": b"RIFF",
        }
        (folder / gallery.RESOURCES / f"{album}.rcc").write_bytes(resource_file(3, files))
    (folder / DOCUMENTS / gallery.PACKAGE).mkdir(parents=True)
    (folder / DOCUMENTS / gallery.PACKAGE / "copyright").write_text("free")
    return folder


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gallery, "FEWEST", len(gallery.ALBUMS))
    gallery.collect(unpacked(tmp_path / "unpacked"), gallery.gallery_path())
    return gallery.gallery_path()


@pytest.mark.parametrize("version", [1, 3])
def test_files_of_a_resource_file_are_read_but_compressed_ones(version, tmp_path):
    file = tmp_path / "some.rcc"
    file.write_bytes(resource_file(version, {"a.txt": b"one", "b.txt": b"two", "c.txt": b""}, packed="b.txt"))
    assert dict(resources(file)) == {"/folder/a.txt": b"one", "/folder/c.txt": b""}


@pytest.mark.parametrize("content", [b"", b"other data that is no resource file", resource_file(3, {"a": b"b"})[:60]])
def test_what_is_no_resource_file_is_refused(content, tmp_path):
    file = tmp_path / "some.rcc"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"some\.rcc is no Qt resource file, or damaged"):
        dict(resources(file))


def test_gallery_holds_large_opaque_pictures_and_the_licence(kept):
    assert [path.name for path in gallery.kept_gallery()] == [f"{a} photograph.webp" for a in sorted(gallery.ALBUMS)]
    assert (kept / "licence.txt").read_text() == "free"


def test_damaged_gallery_is_refused(kept):
    next(kept.glob("*.webp")).write_bytes(b"")
    with pytest.raises(InputError, match=r"damaged; delete it, and `python -m idlefx\.demo fetch gallery` gets it"):
        gallery.kept_gallery()


def test_gallery_that_was_not_fetched_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"the gallery is not in .*`python -m idlefx\.demo fetch gallery` gets Debian"):
        gallery.kept_gallery()


def test_package_without_the_albums_is_refused(tmp_path, monkeypatch):
    folder = unpacked(tmp_path / "unpacked")
    with pytest.raises(InputError, match="has 6 photographs, 100 were expected"):
        gallery.collect(folder, tmp_path / "few")
    (folder / gallery.RESOURCES / f"{gallery.ALBUMS[0]}.rcc").unlink()
    with pytest.raises(InputError, match=r"the package of this release has no usr/share/.*clickgame\.rcc"):
        gallery.collect(folder, tmp_path / "none")


def test_without_apt_the_gallery_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["fetch", "gallery"]) == 2
    assert "apt-get is not here, and the pictures are Debian's package gcompris-qt-data" in capsys.readouterr().err
