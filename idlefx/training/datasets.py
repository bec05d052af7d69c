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
from idlefx.training.feature_taps import classes_of, refuse_bytes
from idlefx.training.folders import (
    Reading,
    class_folder_count,
    has_loose_pictures,
    read_split,
    read_unsplit,
    split_folders,
)
from idlefx.training.loader import ImageLoader
from idlefx.training.pictures import PictureLoader, Pictures

GLYPHS_TRAIN, GLYPHS_VAL = 16_384, 2_000  # scenes
LIBRARIES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
PUBLISHED_AUGMENT = ("rand-m9-mstd0.5-inc1", 0.25)
CROP, CROPPED = "crop", (0.5, 1.0)  # share of a picture that such a crop shows
PREFIXES = (*LIBRARIES, "torch")
LABELLED_BATCH, UNLABELLED_BATCH = 64, 16  # images
REDRAWS = 4  # timm's policies ask once in a while for an image of 0 bits, which Pillow refuses: another draw is made


class Source(NamedTuple):
    """Where the data is.

    Attributes:
        name: A folder with pictures in any arrangement, or timm's name of a data set: hfds/…, wds/…, torch/…
        root: Where such a data set lies or is cached, if that is not part of its name.
        train: Name of the training split.
        val: Name of the validation split.
        augment: timm's policy of augmentation; "crop" for random crops and mirror images alone, or "none". None: the
            published policy with labels, "crop" without.
        erase: Share of the training images of which a part is erased. None: the published one with labels, else 0.
        val_share: Share of the pictures that is held out, in a folder that has no folder for that.
        val_most: Pictures that are held out there at the most, without labels.
    """

    name: str = GLYPHS
    root: str | None = None
    train: str = "train"
    val: str = "validation"
    augment: str | None = None
    erase: float | None = None
    val_share: float = 0.1
    val_most: int = 128

    def settled(self, *, labelled: bool) -> "Source":
        """With the augmentation that such data gets."""
        augment, erase = PUBLISHED_AUGMENT if labelled else (CROP, 0.0)
        return self._replace(
            augment=augment if self.augment is None else self.augment, erase=erase if self.erase is None else self.erase
        )


def open_loaders(
    source: Source,
    idle: IdleModule,
    batch_size: int | None = None,
    *,
    seed: int = 0,
    workers: int = 0,
    world: World | None = None,
) -> tuple[ImageLoader, ImageLoader]:
    """Training and validation batches of what a model takes, with labels where model and data have the same classes.

    Args:
        source: Where the data is.
        idle: The converted model; size and normalisation of the images are its own, or ImageNet's.
        batch_size: Images in a batch of one process; None: 64 with labels, 16 without.
        seed: Another seed, another order and augmentation.
        workers: Processes that read images.
        world: The processes that train together.

    Raises:
        InputError: There is no such data, no image in it, only one class, or not the classes of the model.
    """
    facts = conversion_of(idle).facts
    classes = classes_of(idle, class_folder_count(Path(source.name), source.train, source.val))
    refuse_bytes(conversion_of(idle).evaluation.graph)
    train, val, labelled, told = _open_both(source, facts, batch_size or LABELLED_BATCH, seed, classes)
    batch_size = batch_size or (LABELLED_BATCH if labelled else UNLABELLED_BATCH)
    if told and (world is None or world.leads):
        print(f"data: {told}")
    source = source.settled(labelled=labelled)
    mode = MODES.get(facts.image_size[0], "RGB")
    train.transform = partial(_prepare, mode, _transform(source, facts, training=True))
    val.transform = partial(_prepare, mode, _transform(source, facts, training=False))
    options: dict[str, Any] = {"seed": seed, "workers": workers, "world": world}
    kind = ImageLoader if labelled else PictureLoader
    if labelled:
        assert classes is not None
        options["classes"] = classes
        for dataset in (train, val):
            _check_classes(source.name, dataset, classes)
    return kind(train, batch_size, training=True, **options), kind(val, batch_size, **options)


class _Opened(NamedTuple):
    """Two data sets, whether they are read with labels, and how a folder was read, if that is to be told."""

    train: Any
    val: Any
    labelled: bool
    told: str = ""


def _open_both(source: Source, facts: ModelFacts, batch_size: int, seed: int, classes: int | None) -> _Opened:
    if source.name == GLYPHS:
        side = facts.image_size[-1]
        scenes = Glyphs("train", size=GLYPHS_TRAIN, image_size=side, seed=seed)
        return _Opened(scenes, Glyphs("val", size=GLYPHS_VAL, image_size=side), classes is not None)
    root = Path(source.name)
    if root.is_dir():
        folders = split_folders(root, source.train, source.val)
        if folders is None:
            return _of_reading(read_unsplit(root, classes, source.val_share, source.val_most))
        if classes is None or has_loose_pictures(folders[0]):
            return _of_reading(read_split(root, folders, classes))
    train, val = (_open(source, split, batch_size, seed) for split in (source.train, source.val))
    if classes is not None:
        _check_splits(source, train, val)
        if _classes(train) != _classes(val):  # a class without validation images must not shift the others
            val = _open(source, source.val, batch_size, seed, _classes(train))
    return _Opened(train, val, classes is not None)


def _of_reading(reading: Reading) -> _Opened:
    if not reading.classes:
        train, val = (Pictures(files, reading.root) for files in (reading.train, reading.val))
        return _Opened(train, val, False, reading.told)
    numbers = {name: number for number, name in enumerate(reading.classes)}
    train, val = (
        Pictures(files, reading.root, [numbers[file.relative_to(reading.root).parts[0]] for file in files], numbers)
        for files in (reading.train, reading.val)
    )
    return _Opened(train, val, True, reading.told)


def _open(source: Source, split: str, batch_size: int, seed: int, class_map: Any = None) -> Dataset[Any]:
    from timm.data import create_dataset

    prefix, _, rest = source.name.partition("/")
    root, name, options = source.root, source.name, dict[str, Any]()
    if prefix not in PREFIXES or Path(source.name).exists():
        if not Path(source.name).exists():
            raise InputError(
                f"data: there is no {source.name}; name a folder with pictures, or a data set as timm "
                f"does: {'/…, '.join(PREFIXES)}/…"
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
    if training and source.augment == CROP:
        options |= {"is_training": True, "scale": CROPPED, "color_jitter": 0.0, "re_prob": source.erase}
    elif training and source.augment != "none":
        options |= {"is_training": True, "auto_augment": source.augment, "re_prob": source.erase, "re_mode": "pixel"}
    else:
        options |= {"crop_pct": data["crop_pct"], "crop_mode": data.get("crop_mode")}
    try:
        size: Any = facts.image_size
        return create_transform(size, **options)
    except (AssertionError, ValueError, IndexError) as error:
        raise InputError(f"data: timm knows no augmentation {source.augment!r}: {error}") from error
