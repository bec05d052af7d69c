"""How long a block takes for how many tokens: a small table by device, measured once, from which time is predicted."""

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlefx.bench.timer import WARM_UP, release, time_in_turn
from idlefx.records import Block, Plan
from idlefx.reporting.latency import BlockTimes, size_of
from idlefx.utils.devices import machine_in_words

TILE = 8  # the finest grain at which the tile sizes of kernels show
PARTS = 8  # token counts that are measured besides those of plans


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
        time_in_turn(calls, weight.device, samples, seconds * len(calls))
    release(weight.device)
    ms = [median(taken) for taken in zip(*samples, strict=True)]
    return BlockTimes(machine_in_words(weight), mode, batch, *size_of(block), dict(zip(counts, ms, strict=True)))


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
