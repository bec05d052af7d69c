"""The images of a user as batches, whatever they come as: tensors, a data loader, files or a folder."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from idlefx.errors import InputError
from idlefx.records import ModelFacts
from idlefx.reporting.images import Photo, read_photo

Images = Photo | Tensor | Mapping[str, Any] | Iterable[Any]
Name = int | str

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABELS = ("label", "labels")  # what data sets call them, beside the inputs of a model
PHOTO_DIMS = 3  # channels, height and width


class ImageBatch(NamedTuple):
    """Some images, ready for the model.

    Attributes:
        names: Of each image its file, or its place among all of them where it has none.
        inputs: A tensor, batch first, or the model's inputs by keyword.
    """

    names: Sequence[Name]
    inputs: Tensor | dict[str, Any]


class ImageBatches:
    """Batches of images, read one after the other.

    Args:
        images: A tensor, batch first; a folder, in which images are looked for at any depth; a file or a PIL image; or
            an iterable, such as a data set or a data loader, of batches, of single images as tensors, files or PIL
            images, of tuples or lists that begin with one of these (what follows are labels), or of dicts of keyword
            inputs.
        facts: Of the model; None where nothing is known of its images.
        batch_size: Images in a batch; an iterable that holds batches has its own.
        limit: The most images to take: of a folder spread evenly over its files, else the first ones.
        as_bytes: Whether the model takes `uint8` and normalises by itself, so that photographs are not normalised.

    Attributes:
        total: How many images there are, or None where that is not known beforehand.

    Raises:
        InputError: There is no such folder or no image in it, or `images` is nothing of all this.
    """

    def __init__(
        self,
        images: Images,
        facts: ModelFacts | None,
        batch_size: int,
        limit: int | None = None,
        *,
        as_bytes: bool = False,
    ) -> None:
        for option, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"images: {option} is {value!r}; expected a whole number from 1")
        self.facts, self.batch_size, self.limit, self.as_bytes = facts, batch_size, limit, as_bytes
        self.folder: Path | None = None
        if isinstance(images, (str, Path)) and not Path(images).is_file():
            self.folder = Path(images)
            images = find_images(self.folder)
            if limit is not None and limit < len(images):
                images = [images[place * len(images) // limit] for place in range(limit)]
        self.items = _items(images)
        indexed = isinstance(images, Tensor) or self.folder or not isinstance(images, Iterable)
        counted: Any = images if indexed else getattr(images, "dataset", None)  # of a data loader
        self.total: int | None = length_hint(counted, 0) or None
        if self.total is not None and limit is not None:
            self.total = min(self.total, limit)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batch by batch.

        Raises:
            InputError: An image cannot be read, or an item of the iterable is nothing of the kind.
        """
        taken = 0
        for batch in self._whole() if isinstance(self.items, Tensor) else self._gathered():
            if not batch.names:
                continue
            if self.limit is not None and taken + len(batch.names) >= self.limit:
                yield _first(batch, self.limit - taken)
                return
            taken += len(batch.names)
            yield batch

    def _whole(self) -> Iterator[ImageBatch]:
        """The parts of one tensor, which is a batch of all images."""
        assert isinstance(self.items, Tensor)
        if self.items.ndim < 2:
            raise InputError(f"images: expected shape (B, channels, height, width), got {tuple(self.items.shape)}")
        start = 0
        for part in self.items.split(self.batch_size):
            yield ImageBatch(range(start, start + len(part)), part)
            start += len(part)

    def _gathered(self) -> Iterator[ImageBatch]:
        """Batches as they come; single images are gathered, those of one shape in a batch."""
        single_dims = len(self.facts.image_size) if self.facts else PHOTO_DIMS
        waiting, count = list[tuple[Name, Tensor]](), 0
        for item in self.items:
            inputs = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            name, inputs = self._read(inputs, count) if isinstance(inputs, Photo) else (count, inputs)
            single = isinstance(inputs, Tensor) and inputs.ndim == single_dims
            if waiting and not (single and inputs.shape == waiting[0][1].shape):
                yield _joined(waiting)
                waiting = []
            if single:
                waiting.append((name, inputs))
                count += 1
            else:
                size = _size(inputs, count)
                yield ImageBatch(range(count, count + size), _without_labels(inputs))
                count += size
            if len(waiting) == self.batch_size:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def _read(self, photo: Photo, place: int) -> tuple[Name, Tensor]:
        if self.facts is None:
            raise InputError(
                "images: it is not known which images the model takes, so photographs cannot be made ready for it; "
                "pass tensors (B, channels, height, width), normalised"
            )
        name = place if isinstance(photo, Image.Image) else str(photo)
        if self.folder is not None and isinstance(photo, Path):
            name = str(photo.relative_to(self.folder))
        return name, read_photo(photo, self.facts, as_bytes=self.as_bytes)


def find_images(folder: str | Path) -> list[Path]:
    """The images in a folder and in the folders in it, in the order of their names; what is hidden is left out.

    Raises:
        InputError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"images: {folder} {what}; name a folder with photographs, at any depth")
    found = list[Path]()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise InputError(f"images: there is no image in {folder}; looked for at any depth are {', '.join(SUFFIXES)}")
    return sorted(found)


def _items(images: Any) -> Iterable[Any]:
    if isinstance(images, Photo | Mapping):
        return [images]
    if isinstance(images, Iterable):
        return images
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):  # a data set of torch
        return (images[place] for place in range(len(images)))
    raise InputError(f"images: {_expected()}; got a {type(images).__name__}")


def _expected() -> str:
    return "expected a tensor, a folder, files, or an iterable of images or batches such as a data loader"


def _size(inputs: Any, place: int) -> int:
    """How many images a batch holds."""
    tensors = [inputs] if isinstance(inputs, Tensor) else []
    if isinstance(inputs, Mapping):
        tensors = [value for value in _without_labels(inputs).values() if isinstance(value, Tensor)]
    largest = max(tensors, key=torch.numel, default=None)
    if largest is None or not largest.ndim:
        held = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"images: {_expected()}; behind {place} images comes {held}")
    return len(largest)


def _without_labels(inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):
        return inputs
    return {name: value for name, value in inputs.items() if name not in LABELS}


def _joined(images: Sequence[tuple[Name, Tensor]]) -> ImageBatch:
    return ImageBatch([name for name, _ in images], torch.stack([image for _, image in images]))


def _first(batch: ImageBatch, count: int) -> ImageBatch:
    """The first images of a batch."""
    size = len(batch.names)

    def shortened(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    if isinstance(batch.inputs, Tensor):
        return ImageBatch(batch.names[:count], batch.inputs[:count])
    return ImageBatch(batch.names[:count], {name: shortened(value) for name, value in batch.inputs.items()})
