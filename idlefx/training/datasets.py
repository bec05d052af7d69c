"""Image data by name, as timm names it, checked before anything is computed."""

from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset, IterableDataset

from idlefx.demo.glyphs import Glyphs
from idlefx.errors import InputError, first_line
from idlefx.records import ModelFacts
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import GLYPHS
from idlefx.training.distributed import World
from idlefx.training.feature_taps import classes_of, refuse_bytes
from idlefx.training.folders import (
    TRAIN_NAMES,
    VAL_NAMES,
    Reading,
    class_folder_count,
    has_loose_pictures,
    read_split,
    read_unsplit,
    split_folders,
)
from idlefx.training.image_transforms import CROP, evaluation_transform, training_transform
from idlefx.training.loader import ImageLoader
from idlefx.training.pictures import PictureLoader, Pictures

GLYPHS_TRAIN, GLYPHS_VAL = 16_384, 2_000  # scenes
LIBRARIES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
PUBLISHED_AUGMENT = ("rand-m9-mstd0.5-inc1", 0.25)
PREFIXES = (*LIBRARIES, "torch")
ONE_CLASS = "data: {} has images of one class only; there is nothing to tell apart"
LABELLED_BATCH, UNLABELLED_BATCH = 64, 16  # images


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
    train.transform = training_transform(facts, source.augment, source.erase)
    val.transform = evaluation_transform(facts)
    options: dict[str, Any] = {"seed": seed, "workers": workers, "world": world}
    kind = ImageLoader if labelled else PictureLoader
    if labelled:
        assert classes is not None
        options["classes"] = classes
        for dataset in (train, val):
            _check_classes(source.name, dataset, classes)
    return kind(train, batch_size, training=True, **options), kind(val, batch_size, **options)


def open_labelled(
    source: Source, facts: ModelFacts, batch_size: int, *, limit: int | None, workers: int
) -> ImageLoader:
    """Batches of the held-out images and their labels.

    Args:
        source: Where the data is: of a folder that is split the validation folder, else all of its class folders.
        facts: Of the model, whose size and normalisation the images get.
        batch_size: Images in a batch.
        limit: The most images, spread evenly over all of them; None for all.
        workers: Processes that read images.

    Raises:
        InputError: There is no such data, no image in it, no folder for a class, or only one.
    """
    if source.name == GLYPHS:
        dataset: Any = Glyphs("val", size=GLYPHS_VAL, image_size=facts.image_size[-1])
    else:
        dataset = _held_out_of(Path(source.name), source, batch_size)
    if limit is not None and isinstance(dataset, IterableDataset):
        raise InputError(f"data: {source.name} is a stream, of which all images are read; leave the limit out")
    if len(class_names(dataset)) == 1:
        raise InputError(ONE_CLASS.format(source.name))
    dataset.transform = evaluation_transform(facts)
    step = 1 if limit is None else -(-len(dataset) // limit)
    return ImageLoader(dataset, batch_size, workers=workers, step=step)


def _held_out_of(root: Path, source: Source, batch_size: int) -> Any:
    if not root.is_dir():
        return _open(source, source.val, batch_size, seed=0)
    names = (source.val, *VAL_NAMES * (source.val in VAL_NAMES))
    folder = next((root / name for name in names if (root / name).is_dir()), root)
    if has_loose_pictures(folder):
        raise InputError(
            f"data: pictures lie in {folder} itself, so nothing says of which class they are; there must be a folder "
            "for each class"
        )
    dataset = _open(source._replace(name=str(folder)), "", batch_size, seed=0)
    training = next((root / name for name in (source.train, *TRAIN_NAMES) if (root / name).is_dir()), None)
    if folder != root and training:  # a class without held-out images must not shift the others
        classes = {path.name for path in training.iterdir() if path.is_dir() and not path.name.startswith(".")}
        if classes - set(class_names(dataset)):
            known = class_names(_open(source._replace(name=str(training)), "", batch_size, seed=0))
            dataset = _open(source._replace(name=str(folder)), "", batch_size, 0, known)
    return dataset


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
        if class_names(train) != class_names(val):  # a class without validation images must not shift the others
            val = _open(source, source.val, batch_size, seed, class_names(train))
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


def class_names(dataset: Any) -> dict[str, int]:
    """Classes by name, where the data set knows them."""
    found = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return found or {name: number for number, name in enumerate(getattr(dataset, "classes", ()))}


def _check_splits(source: Source, train: Any, val: Any) -> None:
    if strangers := sorted(set(class_names(val)) - set(class_names(train))):
        raise InputError(
            f"data: {source.name} has validation images of classes without training images: {', '.join(strangers[:5])}"
        )


def _check_classes(name: str, dataset: Any, classes: int) -> None:
    found = len(class_names(dataset))
    if found == 1:
        raise InputError(ONE_CLASS.format(name))
    if found and found != classes:
        raise InputError(
            f"data: {name} has {found} classes, but the model's head has {classes}; fine-tuning for idling starts "
            "from a model that was trained on these classes"
        )
