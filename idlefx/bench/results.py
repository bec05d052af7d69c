"""Measured times of a dense model and those that compete with it, frozen, and what follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from statistics import median
from typing import Any

DENSE, IDLE, EAGER = "dense", "idle", "eager"
FIRST = "first"  # the baseline that works on the first tokens, and whose time idling cannot beat
MODES = (EAGER, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ONNXRUNTIME, ONNXRUNTIME_INT8 = "onnxruntime", "onnxruntime-int8"
OTHER_ENGINES = (ONNXRUNTIME, ONNXRUNTIME_INT8)  # the modes of models that are packaged, and not run by torch
CHANCE = 0.05  # how likely as many won rounds would be among equals, at most, for a difference to count as one


@dataclass(frozen=True)
class Timing:
    """All models at one batch size in one mode.

    Attributes:
        mode: `eager`, the mode of `torch.compile`, or one of `OTHER_ENGINES`.
        batch: Images per call.
        ms: Milliseconds of each call, by model: `dense`, `idle`, and peers. Entry i of all of them, and of all modes
            of a batch size, comes from round i.
        peak_mib: The most memory that tensors took in a call, by model; None where CUDA graphs hide it.
    """

    mode: str
    batch: int
    ms: Mapping[str, tuple[float, ...]]
    peak_mib: Mapping[str, float | None] = field(default_factory=dict)

    def speed_up(self, name: str = IDLE) -> float:
        """How many times faster than the dense model: the median over rounds, which forgives a machine that drifts."""
        return speed_up(self.ms[DENSE], self.ms[name])

    def memory_ratio(self, name: str = IDLE) -> float | None:
        """Peak memory over that of the dense model."""
        ours, dense = self.peak_mib.get(name), self.peak_mib.get(DENSE)
        return ours / dense if ours and dense else None

    def images_per_s(self, name: str) -> float:
        """Images per second at the median."""
        return self.batch / median(self.ms[name]) * 1e3


@dataclass(frozen=True)
class Bench:
    """What was measured, on what; `idlefx.bench.tables.render` makes a table with a verdict in words of it.

    Attributes:
        title: The models, in words.
        machine: Device, number type, threads and versions, in words.
        gmacs: Billions of multiply-adds for one image forward, by model.
        timings: One entry per mode and batch size.
        skipped: What could not be measured, and why.
        interrupted: Whether the user stopped it early.
        training: Whether a call is a training step.
    """

    title: str
    machine: str
    gmacs: Mapping[str, float]
    timings: tuple[Timing, ...] = ()
    skipped: tuple[str, ...] = ()
    interrupted: bool = False
    training: bool = False

    def limit(self, name: str = IDLE) -> float:
        """The speed-up if time followed arithmetic: the ratio of the GMACs."""
        return self.gmacs[DENSE] / self.gmacs[name]

    def best(self, batch: int, name: str = IDLE) -> tuple[Timing, Timing] | None:
        """The fastest compiled timings of the dense model and of another one; None where there are none."""
        compiled = [t for t in self.timings if t.batch == batch and t.mode != EAGER and name in t.ms]
        if not compiled:
            return None
        dense, other = (min(compiled, key=lambda t, n=n: median(t.ms[n])) for n in (DENSE, name))  # type: ignore[misc]
        return dense, other

    def finals(self) -> list[tuple[int, str, Timing, Timing]]:
        """Batch size, name, and the timings that count: best compiled dense model against best compiled other.

        Where nothing was compiled, eager stands against eager.
        """
        found = []
        for batch in dict.fromkeys(t.batch for t in self.timings):
            eager = [t for t in self.timings if (t.batch, t.mode) == (batch, EAGER)]
            for name in self.gmacs:
                pair = self.best(batch, name) or next(((t, t) for t in eager if name in t.ms), None)
                if pair is not None and name != DENSE:
                    found.append((batch, name, *pair))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, every sample and the derived figures."""
        facts = asdict(self)
        for timing, entry in zip(self.timings, facts["timings"], strict=True):
            entry["derived"] = {
                name: {
                    "median_ms": median(timing.ms[name]),
                    "images_per_s": timing.images_per_s(name),
                    "speed_up": timing.speed_up(name),
                    "share_of_limit": timing.speed_up(name) / self.limit(name),
                    "outcome": outcome(timing.ms[DENSE], timing.ms[name]),
                    "memory_ratio": timing.memory_ratio(name),
                }
                for name in timing.ms
            }
        return facts


def speed_up(dense_ms: Sequence[float], other_ms: Sequence[float]) -> float:
    """The median ratio of calls that were made in the same round."""
    return median(d / o for d, o in zip(dense_ms, other_ms, strict=True))


def outcome(dense_ms: Sequence[float], other_ms: Sequence[float]) -> str:
    """In words: `faster`, `slower`, or `not told apart` from the dense model.

    A sign test: the model that won so many rounds that chance would seldom let one of two equals win as many. It
    asks who won a round, not by how much, so rounds that something disturbed do not decide.
    """
    rounds = [(d, o) for d, o in zip(dense_ms, other_ms, strict=True) if d != o]
    won = sum(d > o for d, o in rounds)
    if _chance(won, len(rounds)) <= CHANCE:
        return "faster"
    return "slower" if _chance(len(rounds) - won, len(rounds)) <= CHANCE else "not told apart"


def _chance(won: int, rounds: int) -> float:
    """How likely one of two equals wins so many rounds or more."""
    return sum(comb(rounds, k) for k in range(won, rounds + 1)) / 2**rounds
