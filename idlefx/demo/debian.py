"""Pictures out of packages of Debian, which are downloaded and unpacked, but neither installed nor run."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from idlefx.demo.cache import FETCH, run_tool, sha256_of, working_folder
from idlefx.errors import InputError

DOCUMENTS = Path("usr/share/doc")  # where a package has its licence
MANIFEST = "hashes.json"


def fetch_packages(packages: Sequence[str], about: str, path: Path, collect: Callable[[Path, Path], None]) -> Path:
    """Download packages with apt, and keep what is taken out of them: whole, or not at all.

    Args:
        packages: Their names.
        about: What is in them, for the refusal.
        path: The folder that is kept; one that is there and whole stays.
        collect: Writes a folder out of the unpacked packages.

    Raises:
        InputError: There is no apt or no network, or the cache cannot be written.
    """
    if missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]:
        raise InputError(
            f"fetch: {missing[0]} is not here, and the pictures are {about}; "
            f"fetch them on Debian or Ubuntu and copy {path}"
        )
    with working_folder() as folder:
        if is_whole(path):
            return path
        remedy = "is there a network, and has `apt-get update` been run?"
        run_tool(["apt-get", "download", *packages], folder, "apt-get download", remedy)
        for package in folder.glob("*.deb"):
            run_tool(["dpkg", "-x", package.name, "unpacked"], folder, f"unpacking {package.name}", "try again")
        collect(folder / "unpacked", folder / path.name)
        if path.is_dir():
            path.replace(folder / "damaged")
        folder.joinpath(path.name).replace(path)
    return path


def check_kept(folder: Path, what: str, about: str) -> None:
    """See whether what was kept is there.

    Args:
        folder: Where it is kept.
        what: What it is, in words for the refusal, such as "the photographs are".
        about: What is in it, for the refusal.

    Raises:
        InputError: It is not there, or damaged.
    """
    command = f"`{FETCH} {folder.name}`"
    if not folder.is_dir():
        raise InputError(f"fetch: {what} not in {folder}; {command} gets {about}")
    if not is_whole(folder):
        raise InputError(f"fetch: {folder} is damaged; delete it, and {command} gets it anew")


def keep_hashes(folder: Path, names: Iterable[str]) -> None:
    """Write down what the files of a folder are, so that damage is noticed."""
    hashes = {name: sha256_of(folder / name) for name in names}
    folder.joinpath(MANIFEST).write_text(json.dumps(hashes, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether all files of a folder are there and what they were."""
    try:
        hashes = json.loads(folder.joinpath(MANIFEST).read_text())
        return all(sha256_of(folder / name) == known for name, known in hashes.items())
    except (OSError, ValueError):
        return False
