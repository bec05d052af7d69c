"""How a folder of pictures is read: with labels or without, and which of them are held out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from idlefx.errors import InputError
from idlefx.reporting.comparison.image_batches import SUFFIXES, find_images

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("validation", "val", "valid", "eval", "evaluation")
LEAST = 2  # held-out pictures: a standard error needs two


class Reading(NamedTuple):
    """Which pictures a folder gives, and what they are taken for.

    Attributes:
        root: The folder.
        train: Files to train on.
        val: Files that are held out.
        classes: Names of the classes, which are those of the folders; empty if the pictures are read without labels.
        told: In words.
    """

    root: Path
    train: list[Path]
    val: list[Path]
    classes: tuple[str, ...]
    told: str


def split_folders(root: Path, train: str, val: str) -> tuple[Path, Path] | None:
    """The folders of a data set that is split already, also by other usual names; None if there are none.

    Raises:
        InputError: There is only one of them.
    """
    found = [
        next((root / name for name in (asked, *usual) if (root / name).is_dir()), None)
        for asked, usual in ((train, TRAIN_NAMES * (train in TRAIN_NAMES)), (val, VAL_NAMES * (val in VAL_NAMES)))
    ]
    if found[0] and found[1]:
        return found[0], found[1]
    if found[0] or found[1]:
        raise InputError(
            f"data: {root} must hold the folders {train} and {val}, or neither of them; others are named with "
            "--train-split and --val-split"
        )
    return None


def class_folder_count(root: Path, train: str, val: str) -> int | None:
    """How many folders there are to be classes, in the training folder if the data is split; None without a folder."""
    if not root.is_dir():
        return None
    split = split_folders(root, train, val)
    return sum(path.is_dir() and not path.name.startswith(".") for path in (split[0] if split else root).iterdir())


def has_loose_pictures(folder: Path) -> bool:
    """Whether pictures lie in the folder itself, beside folders of classes or without such."""
    return any(path.name.lower().endswith(SUFFIXES) and path.is_file() for path in folder.iterdir())


def read_split(root: Path, folders: tuple[Path, Path], classes: int | None) -> Reading:
    """The pictures of a data set that is split already, without labels.

    Args:
        root: The folder.
        folders: In it, to train on and to be held out.
        classes: How many classes the model tells apart; None if it is no classifier.

    Raises:
        InputError: There is no picture in one of them.
    """
    train, val = map(find_images, folders)
    why = "the model is no classifier" if classes is None else f"there are pictures in {folders[0]} itself"
    return Reading(root, train, val, (), f"{_counted(train, val)}, read without labels, as {why}")


def read_unsplit(root: Path, classes: int | None, share: float, most: int) -> Reading:
    """The pictures of a folder in any arrangement, of which a fixed share is held out.

    A folder of class folders and nothing else is read with labels, if the model tells as many classes apart.

    Args:
        root: The folder.
        classes: How many classes the model tells apart; None if it is no classifier.
        share: Of the pictures, to be held out.
        most: Pictures to hold out at the most, where they have no labels.

    Raises:
        InputError: There is no picture, or none would be held out or left to train on.
    """
    files = find_images(root)
    folders = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
    loose = sum(path.parent == root for path in files)
    if classes is not None and folders and not loose and len(folders) == classes:
        train, val = held_out(files, root, share, len(files))
        told = f"{_split(train, val)}; read with the labels of {classes} folders"
        return Reading(root, train, val, tuple(folders), told)
    if not folders:
        why = "there are no class folders"
    elif loose:
        why = f"{loose} pictures lie beside {len(folders)} folders"
    elif classes is None:
        why = "the model is no classifier"
    else:
        why = f"there are {len(folders)} folders, but the model tells {classes} classes apart"
    told = f"read without labels, as {why}"
    if len(folders) == 1 and not loose:
        told += f"; all of them are of one kind, {folders[0]}, and so tell nothing of others"
    train, val = held_out(files, root, share, most)
    return Reading(root, train, val, (), f"{_split(train, val)}; {told}")


def held_out(files: Sequence[Path], root: Path, share: float, most: int) -> tuple[list[Path], list[Path]]:
    """Files to train on and files that are held out, chosen by their names below `root`, so that it is always the same.

    Raises:
        InputError: There are too few of them.
    """
    count = min(most, max(LEAST, round(share * len(files))))
    if not share or count < LEAST or len(files) < 2 * LEAST or count >= len(files):
        raise InputError(
            f"data: of {len(files)} pictures in {root} a share of {share:g}, at the most {most}, is to be held out, "
            f"which must leave pictures to train on and be at least {LEAST}; give more pictures, or another --val-share"
        )

    def place(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    chosen = set(sorted(files, key=place)[:count])
    return [path for path in files if path not in chosen], [path for path in files if path in chosen]


def _counted(train: Sequence[Path], val: Sequence[Path]) -> str:
    return f"{len(train):,} pictures to train on, {len(val):,} held out"


def _split(train: Sequence[Path], val: Sequence[Path]) -> str:
    return f"{_counted(train, val)}, which are always the same ones"
