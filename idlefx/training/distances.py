"""How far an output is from the dense model's, image by image, in the way that suits what it is."""

from collections.abc import Callable, Container, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from idlefx.runtime.cut_loss import wide

NARROW = 16  # vectors of fewer numbers are coordinates and the like, whose length matters as much as their direction


def cosine(student: Tensor, dense: Tensor) -> Tensor:
    """One minus the cosine of the vectors (B, …, C), in the mean over those of an image, (B,)."""
    return (1 - F.cosine_similarity(wide(student), wide(dense), dim=-1)).reshape(len(student), -1).mean(1)


def squared(student: Tensor, dense: Tensor) -> Tensor:
    """The mean squared difference (B,) of numbers (B, …)."""
    return F.mse_loss(wide(student), wide(dense), reduction="none").reshape(len(student), -1).mean(1)


def kl(student: Tensor, dense: Tensor) -> Tensor:
    """`Σ p_dense · (log p_dense − log p_student)` (B,) of logits (B, …, classes), in the mean over an image."""
    ours, theirs = (wide(logits).log_softmax(-1) for logits in (student, dense))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).reshape(len(student), -1).mean(1)


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "squared": squared, "kl": kl}


def distance_for(shape: Sequence[int], *, logits: bool, token_counts: Container[int]) -> str:
    """The distance that suits an output: KL for logits, cosine for features and tokens, else squared.

    Args:
        shape: Of the output for one image.
        logits: Whether it is known to be logits (classes,).
        token_counts: How many tokens the model's blocks have, with prefix and without; (N, C) with other N are maps.
    """
    if logits:
        return "kl"
    tokens = len(shape) == 2 and shape[0] in token_counts
    return "cosine" if (len(shape) == 1 or tokens) and shape[-1] >= NARROW else "squared"
