"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from idlefx.errors import InputError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of `path` once the block has succeeded.

    Enter it before long work: a path that cannot be written is refused at once.

    Raises:
        InputError: The path cannot be written.
    """
    target, partial = Path(path), _begin(Path(path))
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """See, before longer work than a block should enclose, whether a path can be written.

    Raises:
        InputError: It cannot.
    """
    _begin(Path(path)).unlink()


def _begin(target: Path) -> Path:
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        partial.touch()
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; name a file in a directory that exists") from error
    return partial
