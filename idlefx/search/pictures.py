"""The pictures that a plan is chosen on, and those that it is judged on afterwards: never the same."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from idlefx.errors import InputError
from idlefx.reporting.comparison.image_batches import ImageBatch, ImageBatches

FEWEST = 8  # pictures on which a plan can be chosen and judged at all
EVERY = 4  # of so many pictures one is held out
GLANCE = 16  # how many the candidates are looked at with, before the best of them are with all


@dataclass(frozen=True)
class Pictures:
    """Batches of pictures.

    Attributes:
        few: Of the calibration pictures, spread evenly.
        calibration: Those that a plan is chosen on.
        held_out: Those that have no part in the choice.
        one: A picture by itself.
    """

    few: Sequence[ImageBatch]
    calibration: Sequence[ImageBatch]
    held_out: Sequence[ImageBatch]
    one: ImageBatch

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many each of the three holds."""
        few, calibration, held_out = map(len, map(names_of, (self.few, self.calibration, self.held_out)))
        return few, calibration, held_out


def split_pictures(batches: ImageBatches) -> Pictures:
    """Read all pictures, and hold one of four out.

    Every fourth: a folder is in the order of its names, in which pictures of a kind stand together.

    Raises:
        InputError: There are fewer than 8, or one cannot be read.
    """
    singles = [single for batch in batches for single in _singles(batch)]
    if len(singles) < FEWEST:
        raise InputError(
            f"plan images: there {'is' if len(singles) == 1 else 'are'} {len(singles)}, but a plan is chosen on no "
            f"fewer than {FEWEST}, and one of {EVERY} is held out to judge it; a hundred or more tell plans apart"
        )
    held_out = singles[EVERY - 1 :: EVERY]
    calibration = [single for place, single in enumerate(singles) if place % EVERY != EVERY - 1]
    count = min(GLANCE, len(calibration))
    few = [calibration[place * len(calibration) // count] for place in range(count)]
    size = batches.batch_size
    return Pictures(_joined(few, size), _joined(calibration, size), _joined(held_out, size), singles[0])


def repeated(single: ImageBatch, batch: int) -> Any:
    """Inputs of so many times the same picture."""
    return _each(single.inputs, 1, lambda tensor: tensor.expand(batch, *tensor.shape[1:]).contiguous())


def names_of(batches: Iterable[ImageBatch]) -> list[int | str]:
    """The name of every picture, in order."""
    return [name for batch in batches for name in batch.names]


def _singles(batch: ImageBatch) -> Iterator[ImageBatch]:
    for place, name in enumerate(batch.names):
        part = slice(place, place + 1)
        yield ImageBatch([name], _each(batch.inputs, len(batch.names), lambda tensor, part=part: tensor[part]))


def _joined(singles: Sequence[ImageBatch], size: int) -> list[ImageBatch]:
    """Batches of pictures of one shape."""
    batches = list[ImageBatch]()
    for _, alike in groupby(singles, key=_shapes):
        group = list(alike)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            batches.append(ImageBatch(names_of(part), _stacked([single.inputs for single in part])))
    return batches


def _stacked(inputs: Sequence[Any]) -> Any:
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(inputs))
    by_name = {name: [each[name] for each in inputs] for name in first}
    return {name: torch.cat(values) if _has_one(values[0], 1) else values[0] for name, values in by_name.items()}


def _shapes(single: ImageBatch) -> Any:
    inputs = single.inputs
    tensors = {"": inputs} if isinstance(inputs, Tensor) else inputs
    return [(name, value.shape) for name, value in tensors.items() if isinstance(value, Tensor)]


def _each(inputs: Any, size: int, function: Any) -> Any:
    """The inputs, with something done to every tensor that has an entry for each picture."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return {name: function(value) if _has_one(value, size) else value for name, value in inputs.items()}


def _has_one(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
