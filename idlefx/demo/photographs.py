"""Real pictures: photographed things, cut out and sorted by kind, and photographs to paste them into, from Debian."""

import shutil
from pathlib import Path
from typing import NamedTuple

from idlefx.demo.cache import cache_folder
from idlefx.demo.debian import DOCUMENTS, check_kept, fetch_packages, keep_hashes
from idlefx.errors import InputError

LICENCES = {  # as the packages' own files say, which are kept beside the pictures
    "tuxpaint-stamps-default": "GPL 2, 161 MB",
    "mate-backgrounds": "GPL 2 or later, 47 MB",
    "plasma-workspace-wallpapers": "GPL 2 or later, 94 MB",
}
ABOUT = f"Debian's packages {', '.join(f'{name} ({about})' for name, about in LICENCES.items())} through apt"
STAMPS = Path("usr/share/tuxpaint/stamps")
KINDS = {  # folders with five or more photographed things
    "birds": "animals/birds", "fish": "animals/fish", "insects": "animals/insects", "mammals": "animals/mammals",
    "sea mammals": "animals/mammals/aquatic", "bovines": "animals/mammals/bovines",
    "rodents": "animals/mammals/rodents", "fruit": "food/fruit", "vegetables": "food/vegetables",
    "string instruments": "hobbies/music/string", "household": "household", "tools": "household/tools",
    "flowers": "plants/flowers", "trees": "plants/trees", "sports": "sports",
}  # fmt: skip
NATURE = Path("usr/share/backgrounds/mate/nature")
WALLPAPERS = Path("usr/share/wallpapers")
PHOTOGRAPHED = (  # the others are drawn
    "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
    "OneStandsOut", "Path", "summer_1am",
)  # fmt: skip
SIZES = ("1600x1200.jpg", "2560x1600.jpg")  # in which a wallpaper is taken: the first that it has


class Photographs(NamedTuple):
    """The files.

    Attributes:
        things: Of each kind, things on a transparent ground.
        grounds: Photographs.
    """

    things: dict[str, list[Path]]
    grounds: list[Path]


def photographs_path() -> Path:
    """Where the pictures are kept."""
    return cache_folder() / "photographs"


def kept_photographs() -> Photographs:
    """The pictures, as they were fetched.

    Raises:
        InputError: They are not there, or damaged.
    """
    folder = photographs_path()
    check_kept(folder, "the photographs are", ABOUT)
    things = {kind: sorted(folder.joinpath("things", kind).iterdir()) for kind in KINDS}
    return Photographs(things, sorted(folder.joinpath("grounds").iterdir()))


def fetch_photographs() -> Path:
    """Download the packages with apt, nothing of which is installed or run, and keep the pictures.

    Raises:
        InputError: There is no apt or no network, or the cache cannot be written.
    """
    return fetch_packages([*LICENCES], ABOUT, photographs_path(), collect)


def collect(unpacked: Path, folder: Path) -> None:
    """Copy the pictures out of the unpacked packages, with their licences and a list of hashes.

    Raises:
        InputError: A picture is not where it is looked for.
    """
    copies = {f"licences/{name}.txt": unpacked / DOCUMENTS / name / "copyright" for name in LICENCES}
    for kind, place in KINDS.items():
        copies |= {f"things/{kind}/{p.name}": p for p in sorted((unpacked / STAMPS / place).glob("*.png"))}
    copies |= {f"grounds/{p.name}": p for p in sorted((unpacked / NATURE).glob("*.jpg"))}
    for name in PHOTOGRAPHED:
        images = unpacked / WALLPAPERS / name / "contents" / "images"
        copies[f"grounds/{name}.jpg"] = next((images / s for s in SIZES if (images / s).is_file()), images / SIZES[0])
    for name, source in copies.items():
        if not source.is_file():
            raise InputError(f"fetch: the packages of this release have no {source.relative_to(unpacked)}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    keep_hashes(folder, copies)
