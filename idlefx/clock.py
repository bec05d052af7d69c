"""How long a block takes for how many tokens: a small table by device, measured once, from which time is predicted."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlefx.devices import describe
from idlefx.errors import InputError
from idlefx.records import Block, Plan
from idlefx.stopwatch import WARM_UP, race, release

TILE = 8  # the finest grain at which the tile sizes of kernels show
PARTS = 8  # token counts that are measured besides those of plans


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
        entries = json.loads(Path(path).read_text())["tables"]
        return tuple(BlockTimes(**e | {"ms": {int(n): float(ms) for n, ms in e["ms"].items()}}) for e in entries)
    except OSError as error:
        raise InputError(f"times: cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"times: {path} is no table that `bench --table` wrote: {error}") from error


def times_to_json(tables: Iterable[BlockTimes]) -> str:
    """What `read_times` reads."""
    return json.dumps({"tables": [asdict(table) for table in tables]}, indent=1)


def token_counts(plans: Sequence[Plan]) -> list[int]:
    """The numbers of tokens worth measuring: those of the plans, whole tiles above them, and some between."""
    counts: set[int] = set()
    for plan in plans:
        for step in plan:
            tokens = plan.blocks[step.block].tokens
            working = step.kept + len(plan.blocks[step.block].prefix)
            counts |= {tokens, working, min(tokens, working + -working % TILE)}
            counts |= {max(1, tokens * part // PARTS) for part in range(PARTS)}
    return sorted(counts)


def measure_times(
    block: Block, counts: Sequence[int], batch: int, weight: Tensor, mode: str, seconds: float
) -> BlockTimes:
    """Time a plain block of the size of a model's: norm, attention, norm, MLP, with as many multiply-adds.

    Args:
        block: Whose size it has.
        counts: Numbers of tokens; they take turns.
        batch: Images per call.
        weight: A tensor of the device and number type to measure.
        mode: `eager`, or a mode of `torch.compile`.
        seconds: About how long to measure each count.
    """
    plain = _PlainBlock(*size_of(block)).to(weight.device, weight.dtype).eval()
    run = plain if mode == "eager" else torch.compile(plain, dynamic=False, mode=mode)
    samples: list[list[float]] = []
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=len(counts) + 1):
        inputs = [torch.randn(batch, n, block.width, device=weight.device, dtype=weight.dtype) for n in counts]
        calls = [partial(run, x) for x in inputs]
        for once in calls * WARM_UP:
            once()
        race(calls, weight.device, samples, seconds * len(calls))
    release(weight.device)
    ms = [median(taken) for taken in zip(*samples, strict=True)]
    return BlockTimes(describe(weight), mode, batch, *size_of(block), dict(zip(counts, ms, strict=True)))


def size_of(block: Block) -> tuple[int, int, int, int]:
    """C, H, D, and the MLP width at which the block has its multiply-adds."""
    inner = block.heads * block.head_width
    rest = block.macs / max(1, block.tokens) - 2 * block.tokens * inner - 4 * block.width * inner
    return block.width, block.heads, block.head_width, max(1, round(rest / (2 * block.width)))


class _PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))
