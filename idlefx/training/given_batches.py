"""Batches that a user gives, as an iterable or a data loader of tensors, tuples or dicts; labels are left out."""

import math
from collections.abc import Iterator, Sized
from itertools import count
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from idlefx.errors import InputError
from idlefx.records import ModelFacts
from idlefx.reporting.comparison.image_batches import ImageBatch, ImageBatches, Images
from idlefx.reporting.images import Photo
from idlefx.training.distributed import World
from idlefx.training.loader import ImageLoader
from idlefx.training.seeding import seeded


class Batches(Protocol):
    """Batches of one process, epoch by epoch.

    Attributes:
        labelled: Whether they hold images and labels, else they are `ImageBatch`.
        batch_size: Images in a batch.
        world: The processes that share them.
    """

    labelled: bool
    batch_size: int
    world: World

    def count(self) -> int | None:
        """How many batches an epoch has; None if that is not known."""

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Any]:
        """The batches of one epoch, without so many at its beginning."""

    def agree(self) -> None:
        """Tell all processes what could not be read."""


class GivenBatches:
    """An iterable of batches, read anew in every epoch.

    All random numbers that are drawn while a batch is made follow from seed, epoch and place, so a loader that draws
    in its own process gives a resumed run what an unbroken one got. Several processes take turns with the batches,
    unless a `DistributedSampler` shares them out.

    Args:
        images: Whatever `compare` takes.
        facts: Of the model.
        world: The processes that train together.
        batch_size: Images in a batch, where `images` holds single ones.
        seed: Of the run.
        once: Whether one epoch is enough.

    Raises:
        InputError: It is nothing of the kind, or can be read only once though it must be read again, or several
            processes share it and nobody knows how long it is.
    """

    labelled = False

    def __init__(
        self,
        images: Images,
        facts: ModelFacts,
        *,
        world: World | None = None,
        batch_size: int = 16,
        seed: int = 0,
        once: bool = False,
    ) -> None:
        self.given: Any = images
        self.facts = facts
        self.world, self.seed = world or World(), seed
        self.sampler = getattr(images, "sampler", None)
        self.sharded = self.world.size == 1 or isinstance(self.sampler, DistributedSampler)
        if isinstance(images, Iterator) and not once:
            raise InputError(
                "data: the held-out images are read many times, but a generator can be read only once; give a list, a "
                "data set or a DataLoader"
            )
        self.batch_size = getattr(images, "batch_size", None) or batch_size
        if self.world.size > 1 and self.count() is None:
            raise InputError(
                f"data: {self.world.size} processes share the batches, and their number is not known; give a "
                "DataLoader or a list"
            )

    def count(self) -> int | None:
        """How many batches an epoch of this process has; None if that is not known."""
        whole = self._batches().total
        if isinstance(self.given, Sized) and not isinstance(self.given, (str, Tensor)):
            try:
                whole = len(self.given)
            except TypeError:  # a loader of a stream
                return None
            if isinstance(self.given, DataLoader) or not self._is_single(self.given):
                return whole if self.sharded else whole // self.world.size
        if whole is None:
            return None
        whole = math.ceil(whole / self.batch_size)
        return whole if self.sharded else whole // self.world.size

    def _batches(self) -> ImageBatches:
        return ImageBatches(self.given, self.facts, self.batch_size)

    def _is_single(self, items: Any) -> bool:
        """Whether a data set or list holds single images, and no batches."""
        first = items[0] if len(items) else None
        first = first[0] if isinstance(first, (tuple, list)) and first else first
        dims = len(self.facts.image_size)
        return isinstance(first, Photo) or (isinstance(first, Tensor) and first.ndim == dims)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[ImageBatch]:
        """The batches of one epoch, without so many at its beginning."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(number)
        batches, mine = iter(self._batches()), 0
        for place in count():
            with seeded(self.seed, number, place):
                batch = next(batches, None)
            if batch is None:
                return
            if self.sharded or place % self.world.size == self.world.rank:
                mine += 1
                if mine > skip:
                    yield batch

    def agree(self) -> None:
        """Nothing is left out of what is given."""


def as_batches(images: Any, facts: ModelFacts, **options: Any) -> Batches:
    """What yields batches epoch by epoch as it is, and anything else as `GivenBatches`."""
    return images if isinstance(images, ImageLoader) else GivenBatches(images, facts, **options)
