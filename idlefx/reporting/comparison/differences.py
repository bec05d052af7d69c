"""How far outputs of one model are from those of another, summed up batch by batch: no output is kept."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from idlefx.reporting.comparison.image_batches import Name
from idlefx.reporting.comparison.record import OutputChange


def numbers(output: Tensor) -> Tensor:
    """A copy in double precision, so that the next call of a model may write where this output lies.

    Where the device has no doubles, in single precision; complex numbers become pairs, and whole numbers stay.
    """
    real = torch.view_as_real(output) if output.is_complex() else output
    if not real.is_floating_point():
        return real.clone()
    return real.to(torch.float32 if real.device.type == "mps" else torch.float64, copy=True)


class Difference:
    """One output of a converted model beside that of the dense one; it holds a few sums, however many images come.

    Args:
        shape: Of the output, without its batch.
        exact: Whether it holds whole numbers or truth values, which are equal or not.
        logits: Whether it is logits (B, classes).
    """

    def __init__(self, shape: Sequence[int], *, exact: bool, logits: bool) -> None:
        self.shape, self.exact, self.logits = tuple(shape), exact, logits
        self.images = 0
        self.likeness = self.squared_gap = self.squared_dense = self.same_top1 = self.kl = 0.0
        self.worst: tuple[float, Name] = (math.inf, "")

    def add(self, dense: Tensor, other: Tensor, names: Sequence[Name]) -> None:
        """Take in a batch.

        Args:
            dense: Of the dense model, (B, …), as `numbers` makes them.
            other: Of the converted one, alike, though it may be on another device.
            names: Of the images.
        """
        a, b = (each.reshape(len(each), -1) for each in (dense, other.to(dense.device)))
        likeness = (a == b).sum(1) / a.shape[1] if self.exact else self._add_numbers(a, b)
        self.images += len(names)
        self.likeness += float(likeness.sum())
        lowest = int(likeness.argmin())
        self.worst = min(self.worst, (float(likeness[lowest]), names[lowest]), key=lambda pair: pair[0])

    def _add_numbers(self, a: Tensor, b: Tensor) -> Tensor:
        """Take in numbers (B, …) of floating point, and return the cosine of each image, (B,)."""
        squared_a, squared_b = (a * a).sum(1), (b * b).sum(1)
        self.squared_dense += float(squared_a.sum())
        self.squared_gap += float(((b - a) ** 2).sum())
        if self.logits:
            self.same_top1 += int((a.argmax(1) == b.argmax(1)).sum())
            log_a, log_b = a.log_softmax(1), b.log_softmax(1)
            self.kl += float((log_a.exp() * (log_a - log_b)).sum())
        length = (squared_a * squared_b).sqrt()
        cosine = ((a * b).sum(1) / length).clamp(-1, 1)
        both_zero = (squared_a == 0) & (squared_b == 0)
        return torch.where(length > 0, cosine, both_zero.to(cosine.dtype))

    def join(self, other: "Difference") -> None:
        """Take in what another process saw of the same output."""
        for name in ("images", "likeness", "squared_gap", "squared_dense", "same_top1", "kl"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = min(self.worst, other.worst, key=lambda pair: pair[0])

    def change(self) -> OutputChange:
        """What all images together come to."""
        likeness = self.likeness / self.images
        relative = math.sqrt(self.squared_gap / self.squared_dense) if self.squared_dense else None
        return OutputChange(
            self.shape,
            cosine=None if self.exact else likeness,
            relative_difference=None if self.exact else relative,
            worst_image=self.worst[1],
            worst=self.worst[0],
            same_values=likeness if self.exact else None,
            same_top1=self.same_top1 / self.images if self.logits else None,
            kl_nats=max(0.0, self.kl / self.images) if self.logits else None,
        )
