"""Whole photographs: animals, monuments, musicians and the sea, out of a package of Debian."""

import io
import shutil
from pathlib import Path

from PIL import Image

from idlefx.demo.cache import cache_folder
from idlefx.demo.debian import DOCUMENTS, check_kept, fetch_packages, keep_hashes
from idlefx.demo.qt_resources import resources
from idlefx.errors import InputError

PACKAGE = "gcompris-qt-data"
ABOUT = f"Debian's package {PACKAGE} (44 MB; GPL 3 or later and free licences of single pictures) through apt"
RESOURCES = Path("usr/share/gcompris-qt/rcc")
ALBUMS = (  # the resource files in which large pictures are photographs
    "clickgame", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals", "explore_world_music",
)  # fmt: skip
SHORTEST = 300  # pixels of the shorter side: smaller ones are buttons and figures
FEWEST = 100


def gallery_path() -> Path:
    """Where the photographs are kept."""
    return cache_folder() / "gallery"


def kept_gallery() -> list[Path]:
    """The files, as they were fetched.

    Raises:
        InputError: They are not there, or damaged.
    """
    folder = gallery_path()
    check_kept(folder, "the gallery is", ABOUT)
    return sorted(folder.glob("*.webp"))


def fetch_gallery() -> Path:
    """Download the package with apt, nothing of which is installed or run, and keep the photographs.

    Raises:
        InputError: There is no apt or no network, or the cache cannot be written.
    """
    return fetch_packages([PACKAGE], ABOUT, gallery_path(), collect)


def collect(unpacked: Path, folder: Path) -> None:
    """Take the photographs out of the unpacked package, with its licence and a list of hashes.

    Raises:
        InputError: There are none where they are looked for.
    """
    folder.mkdir(parents=True)
    licence = unpacked / DOCUMENTS / PACKAGE / "copyright"
    names = []
    for album in ALBUMS:
        file = unpacked / RESOURCES / f"{album}.rcc"
        if not file.is_file() or not licence.is_file():
            missing = (file if licence.is_file() else licence).relative_to(unpacked)
            raise InputError(f"fetch: the package of this release has no {missing}")
        for name, content in resources(file):
            if name.endswith(".webp") and _is_photograph(content):
                names.append(f"{album} {Path(name).name}")
                folder.joinpath(names[-1]).write_bytes(content)
    if len(names) < FEWEST:
        raise InputError(f"fetch: the package of this release has {len(names)} photographs, {FEWEST} were expected")
    shutil.copyfile(licence, folder / "licence.txt")
    keep_hashes(folder, [*names, "licence.txt"])


def _is_photograph(content: bytes) -> bool:
    """Whether a picture is large, and opaque everywhere: figures to be moved about are not."""
    try:
        image = Image.open(io.BytesIO(content))
        opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    except (OSError, SyntaxError):
        return False
    return min(image.size) >= SHORTEST and opaque
