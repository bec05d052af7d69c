"""Which token stands where after movement: a table of places, and the windows that attention makes of it."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

NOBODY = -1  # stands at places that padding made


@dataclass(frozen=True)
class Partition:
    """Places on a grid of any number of sides, and the token that stands at each.

    Attributes:
        sides: Sizes of the grid.
        where: The token at each place, by rows, as 64-bit numbers; `NOBODY` at places without one. Bytes, as their
            hash is remembered.
    """

    sides: tuple[int, ...]
    where: bytes = field(repr=False)

    @classmethod
    def of(cls, places: Tensor) -> "Partition":
        """The partition whose tokens are given as a tensor with the sizes of the grid."""
        return cls(tuple(places.shape), places.to(torch.int64).contiguous().numpy().tobytes())

    @cached_property
    def places(self) -> Tensor:
        """The token at each place, with the sizes of the grid."""
        return torch.frombuffer(bytearray(self.where), dtype=torch.int64).view(self.sides)

    @property
    def is_padded(self) -> bool:
        """Whether some places have no token."""
        return bool((self.places == NOBODY).any())


@dataclass(frozen=True)
class Windows:
    """The windows that attention is over: some sides of a partition say which window, the others which slot in it.

    Attributes:
        partition: Which token stands at which place.
        slots: Sides of the slots.
    """

    partition: Partition
    slots: tuple[int, ...]

    @property
    def which(self) -> tuple[int, ...]:
        """The sides that say which window."""
        return tuple(side for side in range(len(self.partition.sides)) if side not in self.slots)

    @property
    def order(self) -> tuple[int, ...]:
        """All sides, those that say which window first."""
        return (*self.which, *self.slots)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return math.prod(self.partition.sides[side] for side in self.which)

    @property
    def size(self) -> int:
        """How many slots a window has."""
        return math.prod(self.partition.sides[side] for side in self.slots)

    @property
    def tokens(self) -> Tensor:
        """The token in each slot of each window (windows, slots)."""
        return self.partition.places.permute(self.order).reshape(self.count, self.size)

    @property
    def digest(self) -> str:
        """A short name for which token stands in which slot: the same for windows that are the same."""
        return hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest()[:16]

    @property
    def runs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The same as runs of tokens that follow one another: where each begins, and its first token or `NOBODY`."""
        flat = self.tokens.flatten()
        padding = flat == NOBODY
        follows = (flat[1:] == flat[:-1] + 1) & ~padding[:-1] | padding[1:] & padding[:-1]
        begins = [0, *((~follows).nonzero().flatten() + 1).tolist()]
        return tuple(begins), tuple(flat[begins].tolist())
