"""How long a block takes for how many tokens: a table by device, from which time is predicted."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from idlefx.errors import InputError
from idlefx.records import Block


@dataclass(frozen=True)
class BlockTimes:
    """Measured times of a dense block of one size on one machine.

    Attributes:
        machine: Device, number type, threads and versions, in words.
        mode: `eager`, or the mode of `torch.compile`.
        batch: Images per call.
        width: C, features of a token.
        heads: H, attention heads.
        head_width: D, features of a head.
        hidden: Features inside the MLP.
        ms: Milliseconds of a call by number of tokens.
    """

    machine: str
    mode: str
    batch: int
    width: int
    heads: int
    head_width: int
    hidden: int
    ms: Mapping[int, float]

    def at(self, tokens: int) -> float:
        """Milliseconds for so many tokens, on a straight line between the two measured counts beside it.

        Raises:
            InputError: The table ends before.
        """
        counts = sorted(self.ms)
        if not counts or not counts[0] <= tokens <= counts[-1]:
            raise InputError(
                f"times: the table covers {counts[:1]} to {counts[-1:]} tokens, not {tokens}; measure anew"
            )
        above = next(count for count in counts if count >= tokens)
        if above == tokens:
            return self.ms[tokens]
        below = max(count for count in counts if count < tokens)
        share = (tokens - below) / (above - below)
        return self.ms[below] + share * (self.ms[above] - self.ms[below])


def times_for(block: Block, tables: Sequence[BlockTimes]) -> BlockTimes:
    """The table of blocks of this size.

    Raises:
        InputError: There is none.
    """
    wanted = size_of(block)
    for table in tables:
        if (table.width, table.heads, table.head_width, table.hidden) == wanted:
            return table
    known = "; ".join(f"width {t.width}, {t.heads} heads of {t.head_width}, MLP {t.hidden}" for t in tables)
    raise InputError(
        f"times: block {block.index} has width {wanted[0]}, {wanted[1]} heads of {wanted[2]}, MLP {wanted[3]}, but "
        f"the table is for {known or 'nothing'}; measure this model with `bench --table`"
    )


def read_times(path: str | Path) -> tuple[BlockTimes, ...]:
    """What `bench --table` wrote.

    Raises:
        InputError: The file cannot be read or is none of its kind.
    """
    try:
        return times_of(Path(path).read_text())
    except OSError as error:
        raise InputError(f"times: cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"times: {path} is no table that `bench --table` wrote: {error}") from error


def times_of(text: str) -> tuple[BlockTimes, ...]:
    """The tables that `times_to_json` told."""
    entries = json.loads(text)["tables"]
    return tuple(BlockTimes(**e | {"ms": {int(n): float(ms) for n, ms in e["ms"].items()}}) for e in entries)


def times_to_json(tables: Iterable[BlockTimes]) -> str:
    """What `read_times` reads from a file, and `times_of` from here."""
    return json.dumps({"tables": [asdict(table) for table in tables]}, indent=1)


def size_of(block: Block) -> tuple[int, int, int, int]:
    """C, H, D, and the MLP width at which a block with attention over all tokens has its multiply-adds.

    Raises:
        InputError: The attention is over windows.
    """
    if block.windows:
        raise InputError(
            f"times: the attention of block {block.index} ({block.path or 'no path'}) is over windows, and tables of "
            "times are of attention over all tokens; leave the table out, and plan by multiply-adds, with "
            "by='gmacs' or --by gmacs"
        )
    inner = block.heads * block.head_width
    rest = block.macs / max(1, block.tokens) - 2 * block.tokens * inner - 4 * block.width * inner
    return block.width, block.heads, block.head_width, max(1, round(rest / (2 * block.width)))
