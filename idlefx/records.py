"""The facts that cross from one stage to the next, frozen, and the tables they print."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from tabulate import tabulate


def written(gmacs: float) -> str:
    """Three digits that count, whatever the size of the model."""
    return f"{gmacs:#.3g}".removesuffix(".")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model's images and classes.

    Attributes:
        image_size: Channels, height and width of an image.
        data: timm's data configuration (mean, std, interpolation, …); None where it is not known.
        classes: Names of the classes, in the order of the logits; None where they are not known.
    """

    image_size: tuple[int, ...]
    data: Mapping[str, Any] | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Block:
    """A transformer block, as found in the graph; nodes are given by name.

    Attributes:
        index: Position in execution order, from 0.
        path: Module path in the user's model, for people.
        entry: Node of the residual stream entering the block.
        exit: Node of the residual stream leaving it.
        cores: The attention nodes inside; parallel branches have several.
        width: C, features of a token.
        heads: H, attention heads of one core.
        head_width: D, features of a head.
        attention: How the attention is spelled.
        macs: Multiply-adds of the block for one image.
        parameters: Parameters that the block reads.
        tokens: N, tokens in the sequence; 0 where the token axis could not be followed.
        token_dim: Which dimension of the stream the tokens stand in; the first of them where they stand on a grid.
        batch_dim: Which dimension of the stream the batch stands in; None where the stream is (N, C). Tokens may stand
            there too, where an image has windows that are stacked in the batch and the attention is over all of them.
        grid: Rows and columns of the tokens, where these are two dimensions of the stream; empty where they are one.
        over_image: Whether the sides of the grid are those of the image; False where the stream stands in windows.
        sequences: How many sequences like this one an image has, which stand in the batch, as windows do of which each
            is attended over by itself.
        windows: How many windows the attention is over, and how many slots each has; empty where it is over all tokens.
        segments: How many tokens each of the segments has that attention is over, one after the other, as where images
            are packed into one sequence; empty where it is over all tokens, or over windows.
        partition: A digest of which token stands in which slot of which window; empty where there are none.
        prefix: Positions of the prefix tokens, which are always kept.
        class_token: Position of the class token, if there is one: read by the head, or the only prefix token.
        affine: Whether queries and keys are affine in the normalised input, so that scores are nearly free.
        refusal: Why the block cannot idle; empty if it can.
        rest_only: Why its idle tokens can rest but not follow; empty if they can do both.
        whole_only: Why windows can idle as a whole but not some tokens in each; empty if both can.
    """

    index: int
    path: str
    entry: str
    exit: str
    cores: tuple[str, ...]
    width: int
    heads: int
    head_width: int
    attention: str
    macs: int
    parameters: int
    tokens: int = 0
    token_dim: int = 1
    batch_dim: int | None = 0
    grid: tuple[int, ...] = ()
    over_image: bool = True
    sequences: int = 1
    windows: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    partition: str = ""
    prefix: tuple[int, ...] = ()
    class_token: int | None = None
    affine: bool = False
    refusal: str = ""
    rest_only: str = ""
    whole_only: str = ""

    @property
    def can_idle(self) -> bool:
        """Whether tokens of this block may idle."""
        return not self.refusal

    @property
    def token_dims(self) -> tuple[int, ...]:
        """All dimensions of the stream that the tokens stand in."""
        return tuple(range(self.token_dim, self.token_dim + max(1, len(self.grid))))

    @property
    def shares_batch(self) -> bool:
        """Whether the first side of the grid, windows of an image, stands in the dimension of the batch."""
        return self.batch_dim in self.token_dims

    @property
    def flat_dims(self) -> tuple[int, int]:
        """Token and batch dimension of the stream as a batch of sequences.

        The sides of a grid are flattened into one dimension, and where the batch has none it gets one in front.
        """
        if self.batch_dim is None:
            return self.token_dim + 1, 0
        if self.shares_batch:
            return self.token_dims[-1], self.batch_dim
        merged = len(self.token_dims) - 1
        return self.token_dim, self.batch_dim - (merged if self.batch_dim > self.token_dim else 0)

    @property
    def image_tokens(self) -> int:
        """M, the tokens that may idle."""
        return self.tokens - len(self.prefix)

    def prefix_among(self, kept: int) -> tuple[int, ...] | None:
        """Where the prefix tokens stand among themselves and so many image tokens; None where that is not fixed."""
        before = [position - place for place, position in enumerate(self.prefix)]  # image tokens in front of each
        if not {0, self.image_tokens}.issuperset(before):
            return None
        return tuple(p if first == 0 else p - first + kept for p, first in zip(self.prefix, before, strict=True))

    @property
    def told_tokens(self) -> str:
        """How many tokens there are, and in which windows, segments or sequences, in words."""
        if self.windows:
            return f"{self.tokens} in {self.windows[0]} x {self.windows[1]}"
        if self.segments:
            return f"{self.tokens} in {len(self.segments)} segments"
        return f"{self.tokens} in each of {self.sequences}" if self.sequences > 1 else str(self.tokens or "-")

    @property
    def leading(self) -> int:
        """How many prefix tokens stand in front of all others."""
        return next((place for place, position in enumerate(self.prefix) if place != position), len(self.prefix))

    @property
    def image_positions(self) -> tuple[int, ...]:
        """Positions of the image tokens, ascending."""
        prefix = set(self.prefix)
        return tuple(p for p in range(self.tokens) if p not in prefix)


@dataclass(frozen=True)
class BlockTable(Sequence[Block]):
    """All blocks of a model, in execution order; prints as a table.

    Attributes:
        blocks: The blocks.
        macs: Multiply-adds of the whole model for one image.
    """

    blocks: tuple[Block, ...]
    macs: int = 0

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, index: int | slice) -> Block | tuple[Block, ...]:
        return self.blocks[index]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __str__(self) -> str:
        rows = [
            (
                b.index,
                b.path or "-",
                b.told_tokens,
                len(b.prefix),
                b.width,
                b.heads,
                b.attention,
                written(b.macs / 1e9),
                f"no: {b.refusal}" if b.refusal else f"rest only: {b.rest_only}" if b.rest_only else "yes",
            )
            for b in self.blocks
        ]
        head = ["block", "path", "tokens", "prefix", "width", "heads", "attention", "GMACs", "can idle"]
        return tabulate(rows, headers=head, maxcolwidths=[None] * 8 + [60], disable_numparse=True)


@dataclass(frozen=True)
class Step:
    """What one idling block does.

    Attributes:
        block: Index of the block.
        path: Its module path.
        keep: The share of image tokens that work.
        kept: K, image tokens that work.
        tokens: M, image tokens there are.
        selector: Name of the token score.
        form: "affine" or "keys": how much of the keys the score has to compute; empty for other scores.
        opens: Whether it is decided anew here which tokens work. Where tokens follow, the blocks of a stage go on with
            the groups of the block before; the selector is empty there.
        joins: Whether what is decided here is which groups of the block before join.
        unit: What idles where attention is over windows: whole "windows", or "tokens" in each; `kept` and `tokens`
            count slots there. Empty elsewhere.
        kept_by_segment: K of each segment, where attention is over segments of the sequence; empty elsewhere.
    """

    block: int
    path: str
    keep: float
    kept: int
    tokens: int
    selector: str
    form: str = ""
    opens: bool = True
    joins: bool = False
    unit: str = ""
    kept_by_segment: tuple[int, ...] = ()

    @property
    def idles(self) -> bool:
        """Whether any token idles; a block that keeps all of them is left as it is."""
        return self.kept < self.tokens


@dataclass(frozen=True)
class Plan(Sequence[Step]):
    """What is to be done to which block, in execution order; prints as a table.

    Attributes:
        steps: One for each block that was named, directly or through its stage.
        blocks: The table that the steps refer to.
        reselect: Whether a token that idles may work again in a later block; where tokens follow, whether they part
            again.
        multiple_of: What P + K was rounded up to a multiple of.
        idle: What idle tokens do: "rest" or "follow".
    """

    steps: tuple[Step, ...]
    blocks: BlockTable
    reselect: bool = True
    multiple_of: int = 1
    idle: str = "rest"

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index: int | slice) -> Step | tuple[Step, ...]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def stages(self) -> tuple[tuple[Step, ...], ...]:
        """The steps in which tokens idle, grouped by where it is decided which of them work."""
        stages: list[list[Step]] = []
        for step in self.steps:
            if step.idles and step.opens:
                stages.append([step])
            elif step.idles:
                stages[-1].append(step)
        return tuple(map(tuple, stages))

    @property
    def chains(self) -> tuple[tuple[tuple[Step, ...], ...], ...]:
        """The stages, together with those whose groups they join."""
        chains: list[list[tuple[Step, ...]]] = []
        for stage in self.stages:
            if stage[0].joins:
                chains[-1].append(stage)
            else:
                chains.append([stage])
        return tuple(map(tuple, chains))

    def __str__(self) -> str:
        rows = [
            (s.block, s.path or "-", f"{s.keep:.3f}", self._kept(s), s.selector or "-", s.form or "-")
            for s in self.steps
        ]
        head = ["block", "path", "keep", "image tokens kept", "selector", "form"]
        table = tabulate(rows, headers=head, disable_numparse=True)
        if self.multiple_of > 1:
            table += f"\nprefix and kept tokens together are rounded up to a multiple of {self.multiple_of}"
        if self.idle == "follow":
            return f"{table}\n{self.grouping}" if self.stages else table
        return table if self.reselect else table + "\na token that idles never works again (reselect=False)"

    def _kept(self, step: Step) -> str:
        told = f"{step.kept} of {step.tokens}"
        if step.kept_by_segment:
            return f"{told}, in {len(step.kept_by_segment)} segments"
        if not step.unit:
            return told
        count, size = self.blocks[step.block].windows
        if step.unit == "windows":
            return f"{told}: {step.kept // size} of {count} windows"
        return f"{told}: {step.kept // count} of {size} in each window"

    @property
    def grouping(self) -> str:
        """Where tokens are grouped that follow, in words."""
        anew, joined = ([s[0].block for s in self.stages if s[0].joins is joins] for joins in (False, True))
        told = f"idle tokens follow the worker most like them; they are grouped anew at {_blocks(anew)}"
        return f"{told}, and groups join at {_blocks(joined)} (reselect=False)" if joined else told


def _blocks(indices: Sequence[int]) -> str:
    return f"block{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
