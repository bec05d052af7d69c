"""What must change at a node when only some of the tokens are there."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from idlefx.analysis.layouts import Dim, Layout, Runs


class Axis(NamedTuple):
    """Where tokens stand in an output.

    Attributes:
        dim: The dimension, or the first of a grid's.
        runs: The tokens.
        grid: Sizes of the dimensions from `dim` on that are a grid's; empty where it is one.
    """

    dim: int
    runs: Runs
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Read:
    """An operand that is read by token position and does not shrink by itself: take the working tokens' part.

    Attributes:
        operand: The node, mostly one from outside the region.
        axes: Where the tokens stand in the output.
        rank: Rank of the output that the operand is broadcast to.
        batch_dim: Where the output's batch stands; None without one.
        copies: How many entries of that dimension belong to one image, where heads are merged into the batch.
    """

    operand: fx.Node
    axes: tuple[Axis, ...]
    rank: int
    batch_dim: int | None
    copies: int = 1


@dataclass(frozen=True)
class Resize:
    """A size given as a literal: argument `arg`, entry `entry`, is the size of `dim`."""

    arg: int
    entry: int
    dim: Dim


@dataclass(frozen=True)
class Cut:
    """Bounds on the token axis: argument `arg` is a place along an axis made of `runs`."""

    arg: int
    place: int
    runs: Runs


@dataclass(frozen=True)
class WholeGrid:
    """An operation that treats each row or column of a grid in a way of its own, and each token by itself.

    It gets the working tokens at their places in the whole grid, and of what it gives they are taken again.

    Attributes:
        operand: The node that holds the tokens.
        before: Its layout.
        after: That of the result.
        grid: Sizes of the grid.
    """

    operand: fx.Node
    before: Layout
    after: Layout
    grid: tuple[int, ...]


@dataclass(frozen=True)
class ReadPlaces:
    """An operand that is read by window or by slot, and does not shrink by itself.

    Attributes:
        operand: The node.
        output: Layout of the output that the operand is broadcast to.
        along: Dimensions of the output in which the operand has an entry for each place.
        computed: Whether the operand is computed of the tokens, and shrinks in other dimensions by itself.
    """

    operand: fx.Node
    output: Layout
    along: tuple[int, ...]
    computed: bool


@dataclass(frozen=True)
class WholeWindows:
    """An operation that needs every slot of a window, such as a product with a matrix for each row of it.

    Attributes:
        sides: The sides of the partition that must be whole.
    """

    sides: tuple[int, ...]


@dataclass(frozen=True)
class Rearrange:
    """The end of a chain of movement: working tokens are gathered in the order of windows, so it is one reshape.

    Attributes:
        source: The node at the start of the chain.
        before: Its layout.
        after: That of the end.
    """

    source: fx.Node
    before: Layout
    after: Layout


Edit = Read | Resize | Cut | WholeGrid | ReadPlaces | WholeWindows | Rearrange
