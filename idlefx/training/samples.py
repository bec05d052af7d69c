"""Single images, read and augmented so that what comes out follows from seed, epoch and image alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from idlefx.training.seeding import seeded


class Sample(NamedTuple):
    """One image and its class, and which images were passed over to find it.

    Attributes:
        image: (C, H, W), or None if none could be read.
        label: Its class.
        unreadable: Index of each image that was passed over, and why.
    """

    image: Tensor | None
    label: int
    unreadable: tuple[tuple[int, str], ...] = ()


class IndexedSamples(Dataset[Sample]):
    """The images of one epoch, by index.

    Args:
        dataset: Images and labels.
        place: Seed and epoch.
        attempts: How many images in a row to try before giving up.
    """

    def __init__(self, dataset: Any, place: Sequence[int], attempts: int) -> None:
        self.dataset, self.place, self.attempts = dataset, place, attempts

    def __getitem__(self, index: int) -> Sample:
        unreadable: list[tuple[int, str]] = []
        for attempt in range(self.attempts):
            at = (index + attempt) % len(self.dataset)
            with seeded(*self.place, at):
                try:
                    image, label = _read(self.dataset, at)
                except _Unreadable as why:
                    unreadable.append((at, str(why)))
                    continue
                return Sample(image, label, tuple(unreadable))
        return Sample(None, 0, tuple(unreadable))


class StreamedSamples(IterableDataset[Sample]):
    """The images of one epoch of a stream, in its own order.

    Args:
        stream: Images and labels; timm's readers share them among processes and workers.
        place: Seed, epoch and process.
    """

    def __init__(self, stream: Any, place: Sequence[int]) -> None:
        self.stream, self.place = stream, place

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        place = (*self.place, worker.id if worker else 0)
        images, count = iter(self.stream), 0
        while True:
            with seeded(*place, count):
                item = next(images, None)
            if item is None:
                return
            yield Sample(item[0], int(item[1]))
            count += 1


class _Unreadable(Exception):
    """An image that cannot be read; says why."""


def _read(dataset: Any, index: int) -> tuple[Tensor, int]:
    """An item; timm's data sets would put another one in the place of an unreadable one without saying so."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        image, label = dataset[index]
        return image, int(label)
    try:
        file, label = reader[index][:2]
        with file:
            image = Image.open(file).convert(dataset.input_img_mode)
    except Exception as error:  # a damaged file raises whatever its decoder meets
        raise _Unreadable(str(error) or type(error).__name__) from error
    return dataset.transform(image), int(label)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    """Images (B, C, H, W) and labels (B,) of the samples that have an image, and what was unreadable."""
    found = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    images = torch.stack([image for image, _ in found]) if found else torch.empty(0)
    labels = torch.tensor([label for _, label in found], dtype=torch.long)
    return images, labels, [one for sample in samples for one in sample.unreadable]
