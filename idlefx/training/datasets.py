"""Image data by name, as timm names it, checked before anything is computed."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from idlefx.capture.inputs import IMAGENET, MODES
from idlefx.demo.glyphs import Glyphs
from idlefx.errors import InputError, first_line
from idlefx.records import ModelFacts
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import GLYPHS
from idlefx.training.distributed import World
from idlefx.training.feature_taps import class_count, tap
from idlefx.training.loader import ImageLoader

GLYPHS_TRAIN, GLYPHS_VAL = 16_384, 2_000  # scenes
LIBRARIES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
PREFIXES = (*LIBRARIES, "torch")
REDRAWS = 4  # timm's policies ask once in a while for an image of 0 bits, which Pillow refuses: another draw is made


class Source(NamedTuple):
    """Where the data is.

    Attributes:
        name: A folder with training and validation images, or timm's name of a data set: hfds/…, wds/…, torch/…
        root: Where such a data set lies or is cached, if that is not part of its name.
        train: Name of the training split.
        val: Name of the validation split.
        augment: timm's policy of augmentation, or "none".
        erase: Share of the training images of which a part is erased.
    """

    name: str = GLYPHS
    root: str | None = None
    train: str = "train"
    val: str = "validation"
    augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25


def open_loaders(
    source: Source, idle: IdleModule, batch_size: int, *, seed: int = 0, workers: int = 0, world: World | None = None
) -> tuple[ImageLoader, ImageLoader]:
    """Training and validation batches of what a model takes.

    Args:
        source: Where the data is.
        idle: The converted model; size and normalisation of the images are its own, or ImageNet's.
        batch_size: Images in a batch of one process.
        seed: Another seed, another order and augmentation.
        workers: Processes that read images.
        world: The processes that train together.

    Raises:
        InputError: There is no such data, no image in it, only one class, or not the classes of the model.
    """
    facts, classes = conversion_of(idle).facts, class_count(tap(idle))
    train, val = _open_both(source, facts, batch_size, seed)
    for dataset in (train, val):
        _check_classes(source.name, dataset, classes)
    mode = MODES.get(facts.image_size[0], "RGB")
    train.transform = partial(_prepare, mode, _transform(source, facts, training=True))
    val.transform = partial(_prepare, mode, _transform(source, facts, training=False))
    options: dict[str, Any] = {"seed": seed, "workers": workers, "world": world, "classes": classes}
    return ImageLoader(train, batch_size, training=True, **options), ImageLoader(val, batch_size, **options)


def _open_both(source: Source, facts: ModelFacts, batch_size: int, seed: int) -> tuple[Any, Any]:
    if source.name == GLYPHS:
        side = facts.image_size[-1]
        scenes = Glyphs("train", size=GLYPHS_TRAIN, image_size=side, seed=seed)
        return scenes, Glyphs("val", size=GLYPHS_VAL, image_size=side)
    train, val = (_open(source, split, batch_size, seed) for split in (source.train, source.val))
    _check_splits(source, train, val)
    if _classes(train) != _classes(val):  # a class without validation images must not shift the others
        val = _open(source, source.val, batch_size, seed, _classes(train))
    return train, val


def _open(source: Source, split: str, batch_size: int, seed: int, class_map: Any = None) -> Dataset[Any]:
    from timm.data import create_dataset

    prefix, _, rest = source.name.partition("/")
    root, name, options = source.root, source.name, dict[str, Any]()
    if prefix not in PREFIXES or Path(source.name).exists():
        if not Path(source.name).exists():
            raise InputError(
                f"data: there is no {source.name}; name a folder with the folders {source.train} and {source.val}, "
                f"or a data set as timm does: {'/…, '.join(PREFIXES)}/…"
            )
        root, name, options = source.name, "", {"class_map": class_map}
    elif prefix == "wds":
        root, name = source.root or rest, "wds/"
    if prefix in LIBRARIES and prefix != "hfds":
        options |= {"is_training": split == source.train, "batch_size": batch_size, "seed": seed}
    try:
        return create_dataset(name, root=root, split=split, **options)
    except ImportError as error:
        raise InputError(f"data: {source.name} needs a package: pip install {LIBRARIES[prefix]}") from error
    except Exception as error:  # every library refuses in its own way
        raise InputError(f"data: cannot open split {split} of {source.name}: {first_line(error)}") from error


def _classes(dataset: Any) -> dict[str, int]:
    """Classes by name, where the data set knows them."""
    found = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return found or {name: number for number, name in enumerate(getattr(dataset, "classes", ()))}


def _check_splits(source: Source, train: Any, val: Any) -> None:
    folders = [getattr(getattr(dataset, "reader", None), "root", None) for dataset in (train, val)]
    if source.name.partition("/")[0] not in PREFIXES and folders[0] == folders[1]:
        raise InputError(
            f"data: {source.name} must hold the folders {source.train} and {source.val}, each with a folder for every "
            "class; others are named with --train-split and --val-split"
        )
    if strangers := sorted(set(_classes(val)) - set(_classes(train))):
        raise InputError(
            f"data: {source.name} has validation images of classes without training images: {', '.join(strangers[:5])}"
        )


def _check_classes(name: str, dataset: Any, classes: int) -> None:
    found = len(_classes(dataset))
    if found == 1:
        raise InputError(f"data: {name} has images of one class only; there is nothing to tell apart")
    if found and found != classes:
        raise InputError(
            f"data: {name} has {found} classes, but the model's head has {classes}; fine-tuning for idling starts "
            "from a model that was trained on these classes"
        )


def _prepare(mode: str, transform: Any, image: Image.Image) -> Any:
    image = image.convert(mode)
    for _ in range(REDRAWS):
        with suppress(ValueError):
            return transform(image)
    return transform(image)


def _transform(source: Source, facts: ModelFacts, training: bool) -> Any:
    from timm.data import create_transform

    data = {**IMAGENET, "interpolation": "bicubic", **(facts.data or {})}
    options: dict[str, Any] = {name: data[name] for name in ("mean", "std", "interpolation")}
    if training and source.augment != "none":
        options |= {"is_training": True, "auto_augment": source.augment, "re_prob": source.erase, "re_mode": "pixel"}
    else:
        options |= {"crop_pct": data["crop_pct"], "crop_mode": data.get("crop_mode")}
    try:
        size: Any = facts.image_size
        return create_transform(size, **options)
    except (AssertionError, ValueError, IndexError) as error:
        raise InputError(f"data: timm knows no augmentation {source.augment!r}: {error}") from error
