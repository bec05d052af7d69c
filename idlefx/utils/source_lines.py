"""Whose file a frame of the Python stack is in: the user's own, a library's, or torch's."""

import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_MODEL_LIBRARIES = ("timm", "torchvision", "transformers", "einops")
_INSTALLED = ("/site-packages/", "/dist-packages/")
_GENERATED = (
    "<string>", "<frozen", "<eval_with_key>", f"{Path(__file__).parents[1] / 'capture'}/",
)  # fmt: skip  # code without a file, and what calls the user's model while it is traced


def innermost(files: Sequence[str]) -> int | None:
    """Which frame of a stack is the innermost one that is the user's own.

    Args:
        files: Paths of the files that the frames are in, the outermost first.

    Returns:
        The place of the last file that belongs to no installed package; where there is none, of the last that
        belongs to no library which models are made of; else of the last outside torch; None if all is torch.
    """
    outside_torch = [at for at, file in enumerate(files) if not (_is_in(file, "torch") or file.startswith(_GENERATED))]
    of_packages = [at for at in outside_torch if not _is_in(files[at], *_MODEL_LIBRARIES)]
    own = [at for at in of_packages if not _is_installed(files[at])]
    return next((group[-1] for group in (own, of_packages, outside_torch) if group), None)


def _is_in(file: str, *packages: str) -> bool:
    return any(file.startswith(folder) for package in packages for folder in _folders(package))


def _is_installed(file: str) -> bool:
    return any(part in file for part in _INSTALLED) or file.startswith(sysconfig.get_paths()["stdlib"] + "/")


@cache
def _folders(package: str) -> tuple[str, ...]:
    """Where a package is, without importing it; a folder of the user's that bears its name is none of these."""
    spec = find_spec(package)
    places = (spec.submodule_search_locations if spec is not None else None) or []
    return tuple(f"{Path(place)}/" for place in places)
