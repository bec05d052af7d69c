"""Tokens that follow, written from their definition: how they are grouped, and what a stage of blocks does to them.

Every token runs through every block, so nothing is gathered: the means of the groups stand at the places of their
workers, whose logits the sizes of the groups weigh, and tokens that follow are hidden by a size of 0.

Shapes: B images, N tokens, M of them image tokens, K of them workers, C width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlefx.zoo.reference.resting import kept_tokens

GOLDEN = 0.6180339887498949
ATTENDED = 0.1  # what the attention that a token receives counts for, beside a cosine


class Stage(NamedTuple):
    """Blocks `first` to `end` - 1 run on one grouping, with so many image tokens as workers.

    Where it joins, the groups are those of the stage before, of which some have joined others. Where attention is over
    segments of the sequence, `parts` are the workers of each.
    """

    first: int
    end: int
    kept: int
    joins: bool = False
    parts: tuple[int, ...] = ()


class Groups(NamedTuple):
    """Whom everybody follows.

    Shapes:
        leaders: (B, N), the position of the worker that each token follows; a worker's own.
        margins: (B,), the narrowest choice: by how much, in cosines, the least redundant token that idles outdoes the
            most redundant one that works, or the worker that is followed the next best one.
    """

    leaders: Tensor
    margins: Tensor


class Result(NamedTuple):
    """What the model returns, and the grouping at the first block of each stage."""

    output: Any
    groups: dict[int, Groups]

    @property
    def margin(self) -> float:
        """The narrowest choice of all: where it is a rounding error, another implementation may group differently."""
        return min((groups.margins.min().item() for groups in self.groups.values()), default=math.inf)


def stages(layers: Sequence[int], keep: float | Sequence[float], schedule: str, tokens: int, depth: int) -> list[Stage]:
    """The stages of a plan for a model of so many image tokens and blocks, in which nothing ends one early."""
    starts = len(layers)
    each = schedule == "blocks"
    keeps = [keep if each else keep ** (s + 1) for s in range(starts)] if isinstance(keep, float) else keep
    ends = [first + 1 for first in layers] if each else [*layers[1:], depth]
    return [
        Stage(first, end, kept_tokens(ratio, tokens)) for first, end, ratio in zip(layers, ends, keeps, strict=True)
    ]


def anchors(tokens: int, kept: int) -> list[int]:
    """The ranks among so many image tokens that always work, ascending."""
    count = min(-(-tokens // 6), -(-kept // 3))
    return sorted(sorted(range(tokens), key=lambda r: r * GOLDEN % 1.0)[:count])


def group(likeness: Tensor, received: Tensor | None, kept: int, prefix: tuple[int, ...]) -> Groups:
    """Choose the workers, and whom the others follow.

    Args:
        likeness: What tokens are compared by, (B, N, C).
        received: Attention that the class token pays to each token, (B, N); None without one.
        kept: Workers among the image tokens, K.
        prefix: Positions that always work and that nobody follows.
    """
    batch, count, _ = likeness.shape
    leaders = torch.arange(count).repeat(batch, 1)
    image = torch.tensor([p for p in range(count) if p not in prefix])
    if kept == len(image):
        return Groups(leaders, torch.full((batch,), math.inf))
    unit = F.normalize(likeness[:, image].double(), dim=-1)
    cosines = unit @ unit.mT

    fixed = torch.zeros(len(image), dtype=torch.bool)
    fixed[anchors(len(image), kept)] = True
    redundancy = cosines[:, :, fixed].amax(-1)
    if received is not None:
        paid = received[:, image].double()
        redundancy = redundancy - ATTENDED * paid / paid[:, ~fixed].mean(1, keepdim=True)
    redundancy[:, fixed] = -math.inf
    ordered, order = redundancy.sort(dim=1, descending=True, stable=True)
    idling = len(image) - kept
    follows = torch.zeros_like(redundancy, dtype=torch.bool).scatter(1, order[:, :idling], True)

    to_workers = cosines.masked_fill(follows[:, None], -math.inf)
    nearest = torch.where(follows, image[to_workers.argmax(-1)], image)  # the first of several
    leaders[:, image] = nearest
    best = to_workers.topk(min(2, kept), dim=-1).values
    gaps = (best[..., 0] - best[..., -1] if kept > 1 else best[..., 0] + math.inf).masked_fill(~follows, math.inf)
    return Groups(leaders, torch.minimum(gaps.amin(1), ordered[:, idling - 1] - ordered[:, idling]))


def join(before: Groups, likeness: Tensor, received: Tensor | None, kept: int, prefix: tuple[int, ...]) -> Groups:
    """Choose which groups join: the workers are grouped, and who follows one follows whom it follows.

    Args:
        before: The groups there are.
        likeness: What workers are compared by, (B, N, C); of other tokens it means nothing.
        received: Attention that the class token pays to each worker, (B, N); None without one.
        kept: Workers that are left among the image tokens, K.
        prefix: Positions that always work and that nobody follows.
    """
    leaders, margins = before.leaders.clone(), []
    for image, led in enumerate(before.leaders):
        workers = led.unique()
        among = tuple(workers.tolist().index(p) for p in prefix)
        paid = None if received is None else received[image, workers][None]
        joined = group(likeness[image, workers][None], paid, kept, among)
        goes_to = torch.zeros_like(led).scatter(0, workers, workers[joined.leaders[0]])
        leaders[image] = goes_to[led]
        margins.append(joined.margins)
    return Groups(leaders, torch.cat(margins))


def group_in_windows(likeness: Tensor, windows: Tensor, kept: int) -> Groups:
    """Choose workers in each window, and whom the others of the window follow, as if it were an image.

    Args:
        likeness: What tokens are compared by, (B, N, C).
        windows: The token in each slot of each window of all images, `image * N + position`, (B * windows, slots).
        kept: Workers in each window.
    """
    batch, count, _ = likeness.shape
    inside = group(likeness.flatten(0, 1)[windows], None, kept, ())
    leaders = torch.empty(batch * count, dtype=torch.int64)
    leaders[windows] = windows.gather(1, inside.leaders)
    images = windows[:, 0] // count
    margins = torch.stack([inside.margins[images == image].amin() for image in range(batch)])
    return Groups(leaders.view(batch, count) % count, margins)


def by_slot(groups: Groups, windows: Tensor) -> Groups:
    """The same groups, of tokens that are numbered window by window.

    Args:
        groups: Of tokens numbered by position.
        windows: As in `group_in_windows`.
    """
    batch, count = groups.leaders.shape
    slots = windows.view(batch, count) % count  # the position of the token in each slot
    numbers = slots.argsort(1)
    return Groups(numbers.gather(1, groups.leaders.gather(1, slots)), groups.margins)


def group_in_segments(
    likeness: Tensor, lengths: Sequence[int], parts: Sequence[int], before: Groups | None = None
) -> Groups:
    """Choose workers in each segment of a sequence, and whom the others of it follow, as if it were an image.

    Args:
        likeness: What tokens are compared by, (B, N, C).
        lengths: How many tokens each segment has.
        parts: Workers in each.
        before: The groups of which some join; None where groups are formed of all tokens.
    """
    leaders, margins, start = [], [], 0
    for tokens, kept in zip(likeness.split(list(lengths), 1), parts, strict=True):
        stop = start + tokens.shape[1]
        if before is None:
            inside = group(tokens, None, kept, ())
        else:
            inside = join(Groups(before.leaders[:, start:stop] - start, before.margins), tokens, None, kept, ())
        leaders.append(inside.leaders + start)
        margins.append(inside.margins)
        start = stop
    return Groups(torch.cat(leaders, 1), torch.stack(margins).amin(0))


def class_attention(cores: Iterable[tuple[Tensor, Tensor, Any]], class_token: int | None) -> Tensor | None:
    """What the class token pays to each token, (B, N): the softmax of its scaled logits' mean over all heads.

    Args:
        cores: Raw queries and keys (B, H, N, D) of each attention, and the scale of their product: a number or a
            tensor (H, 1, 1).
        class_token: Its position, if there is one.
    """
    if class_token is None:
        return None
    logits = [scale * (q[:, :, [class_token]] @ k.mT) for q, k, scale in cores]
    return torch.cat(logits, 1)[:, :, 0].mean(1).softmax(-1)


def sizes_of(leaders: Tensor) -> Tensor:
    """How many tokens each stands for, (B, N): those of its group, or none if it follows."""
    return torch.zeros(leaders.shape, dtype=torch.float64).scatter_add(
        1, leaders, torch.ones(leaders.shape, dtype=torch.float64)
    )


def means_of(x: Tensor, leaders: Tensor) -> Tensor:
    """The mean of each worker's group at its place, in doubles, (B, N, C); those that follow keep what they have."""
    sizes = sizes_of(leaders)[..., None]
    sums = torch.zeros(x.shape, dtype=torch.float64).scatter_add(1, leaders[..., None].expand_as(x), x.double())
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), x.double())


class Passage:
    """The stream of one stage under way: enter with `open`, then send it `through` one block after the other."""

    def __init__(self, groups: Groups, x: Tensor) -> None:
        self.groups, self.sizes = groups, sizes_of(groups.leaders)
        self.expected = x
        self._index = groups.leaders[..., None].expand_as(x)
        self._entry, self._means = x, means_of(x, groups.leaders)
        self._stream = self._means.to(x.dtype)

    @property
    def stream(self) -> Tensor:
        """What the workers have by now at their places, (B, N, C)."""
        return self._stream

    def through(self, x: Tensor, block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Run one more block of the stage, `block(stream, sizes)`; what it returns is restored for all tokens.

        Args:
            x: The model's stream in front of the block (B, N, C), to see that nobody wrote it between two blocks.
            block: What the block makes of the stream, with these sizes of the keys.

        Raises:
            ValueError: Somebody did: the stage should have ended there.
        """
        if x.shape != self.expected.shape or not torch.equal(x, self.expected):
            raise ValueError("something writes the stream between two blocks of a stage, which has to end there")
        worked = block(self._stream, self.sizes)
        self._stream = torch.where(self.sizes[..., None] > 0, worked, self._entry)
        gain = (worked.double() - self._means).gather(1, self._index)
        self.expected = (self._entry.double() + gain).to(x.dtype)
        return self.expected
