"""The folder that keeps what was downloaded, and ways to fill it: whole or not at all."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from idlefx.errors import InputError

FETCH = "python -m idlefx.demo fetch"


def cache_folder() -> Path:
    """Where downloads are kept: `idlefx` in XDG_CACHE_HOME, or else where the platform keeps caches."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if named:
        return Path(named) / "idlefx"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "idlefx"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "idlefx" / "Cache"
    return Path.home() / ".cache" / "idlefx"


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder beside what is kept, so that moving a result there is one step; it is gone afterwards.

    Raises:
        InputError: The cache cannot be written, or the disk is full.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
            yield Path(folder)
    except OSError as error:
        raise InputError(
            f"fetch: cannot write {error.filename or cache}: {error.strerror}; "
            "make room, or name another folder with the environment variable XDG_CACHE_HOME"
        ) from error


def run_tool(command: Sequence[str], folder: Path, wanted: str, remedy: str) -> None:
    """Run somebody else's program in a folder.

    Args:
        command: The program and its arguments.
        folder: Where it runs.
        wanted: What it is to do, for the refusal.
        remedy: What to do where it fails, for the refusal.

    Raises:
        InputError: It fails, with the last error that it tells.
    """
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if ran.returncode:
        lines = [line.strip() for line in f"{ran.stdout}\n{ran.stderr}".splitlines() if line.strip()]
        errors = [line for line in lines if line.upper().startswith(("ERROR", "E:"))]
        said = (errors or lines or [f"it ended with {ran.returncode}"])[-1]
        raise InputError(f"fetch: {wanted} failed: {said}; {remedy}")


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
