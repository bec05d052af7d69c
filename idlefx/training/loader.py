"""Batches of a data set that follow from seed, epoch and place alone, whatever ran before."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from idlefx.errors import InputError
from idlefx.training.distributed import World
from idlefx.training.samples import IndexedSamples, StreamedSamples, collate
from idlefx.training.seeding import seeded

UNREADABLE_LIMIT = 0.01  # share of the images; more of them stop the run


class ImageLoader:
    """The batches of one process.

    In training the order follows from seed and epoch, the augmentation of an image from seed, epoch and image; every
    process gets as many batches of the same size. In evaluation every image is seen once, in order.

    Args:
        dataset: Images (C, H, W) and labels: any data set of torch, or one of timm, whose images are read one by one
            so that those that cannot be read are known.
        batch_size: Images in a batch of this process.
        training: Whether to shuffle, to fill batches up, and to put the next image in the place of an unreadable one.
        seed: Another seed, another order.
        workers: Processes that read images.
        world: The processes that share the data set.
        classes: How many classes the model knows; labels beyond are refused.
        step: In evaluation, how far apart the images are that are seen; 1 for all of them.

    Attributes:
        unreadable: Index of each image that could not be read, and why.

    Raises:
        InputError: There are fewer images than a training step needs.
    """

    labelled = True

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        training: bool = False,
        seed: int = 0,
        workers: int = 0,
        world: World | None = None,
        classes: int | None = None,
        step: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.training, self.seed, self.workers, self.step = (
            dataset, batch_size, training, seed, workers, step,
        )  # fmt: skip
        self.world, self.classes = world or World(), classes
        self.streams = isinstance(dataset, IterableDataset)
        if self.streams:  # a reader in this process would go on where the last epoch ended
            self.workers = max(1, workers)
            dataset.set_loader_cfg(num_workers=self.workers)
        self.unreadable: dict[int, str] = {}
        if training and len(self) == 0:
            raise InputError(
                f"data: {len(self.dataset)} training images are fewer than the {batch_size * self.world.size} of one "
                "step; ask for a smaller --batch-size"
            )

    def __len__(self) -> int:
        images = len(self.dataset)
        if not self.streams:
            images = images // self.world.size if self.training else len(self._share)
        return images // self.batch_size if self.training else -(-images // self.batch_size)

    def count(self) -> int:
        """How many batches an epoch has."""
        return len(self)

    @property
    def _share(self) -> range:
        return range(self.world.rank * self.step, len(self.dataset), self.world.size * self.step)

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of one epoch, on the device of this process.

        Args:
            number: Which epoch, from 0.
            skip: How many batches to leave out at the beginning.

        Raises:
            InputError: A label is none of the model's classes, or too many images cannot be read.
        """
        for images, labels, unreadable in self._stream(number, skip) if self.streams else self._drawn(number, skip):
            self._note(unreadable)
            if self.classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
                raise InputError(
                    f"data: there is an image of class {int(labels.max())}, but the model's head has {self.classes} "
                    f"classes, 0 to {self.classes - 1}"
                )
            if len(labels):
                device = self.world.device
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _drawn(self, number: int, skip: int) -> Iterable[Any]:
        indices: Sequence[int] = self._share
        if self.training:
            order: Any = DistributedSampler(
                self.dataset, self.world.size, self.world.rank, seed=self.seed, drop_last=True
            )
            order.set_epoch(number)
            indices = list(order)
        batches = list(BatchSampler(indices, self.batch_size, drop_last=self.training))[skip:]
        images = IndexedSamples(self.dataset, (self.seed, number), self.limit + 1 if self.training else 1)
        return DataLoader(images, batch_sampler=batches, **self._options())

    def _stream(self, number: int, skip: int) -> Iterable[Any]:
        """What is to be skipped is read all the same: a stream has no places to jump to."""
        self.dataset.set_epoch(number)
        with seeded(self.seed, number):
            shuffling = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        images = StreamedSamples(self.dataset, (self.seed, number, self.world.rank))
        loader = DataLoader(images, self.batch_size, drop_last=self.training, generator=shuffling, **self._options())
        return islice(loader, skip, None)

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.workers,
            "collate_fn": collate,
            "pin_memory": self.world.device.type == "cuda",
            "worker_init_fn": _leave_interrupts_to_the_run,
        }

    def agree(self) -> None:
        """Tell all processes which images could not be read; all of them must do so.

        Raises:
            InputError: Together they are too many.
        """
        self.unreadable.update(self.world.gather(self.unreadable.items()))
        self._check()

    def _note(self, unreadable: Iterable[tuple[int, str]]) -> None:
        for index, why in unreadable:
            if index not in self.unreadable:
                self.unreadable[index] = why
                tqdm.write(f"data: left out {self.name(index)}: {why}")
                self._check()

    def _check(self) -> None:
        if len(self.unreadable) > self.limit:
            first = ", ".join(self.name(index) for index in list(self.unreadable)[:5])
            raise InputError(
                f"data: {len(self.unreadable)} of {len(self.dataset)} images cannot be read, more than "
                f"{UNREADABLE_LIMIT:.0%}; mend or remove them: {first}{', …' if len(self.unreadable) > 5 else ''}"
            )

    @property
    def limit(self) -> int:
        """How many images may be unreadable."""
        return int(UNREADABLE_LIMIT * len(self.dataset))

    def name(self, index: int) -> str:
        """The file of an image, or its number."""
        filename = getattr(self.dataset, "filename", None)
        return str((filename and filename(index, absolute=True)) or f"image {index}")


def _leave_interrupts_to_the_run(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
