"""Measured times of a dense model and its idling twin, frozen, and the table they print."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from tabulate import tabulate


@dataclass(frozen=True)
class Timing:
    """Both models at one batch size; entry i of the two tuples comes from round i, dense first, idle next.

    Attributes:
        mode: `eager` or `compiled`.
        batch: Images per call.
        dense_ms: Milliseconds of each call of the dense model.
        idle_ms: The same of the idling model.
    """

    mode: str
    batch: int
    dense_ms: tuple[float, ...]
    idle_ms: tuple[float, ...]

    @property
    def speed_up(self) -> float:
        """How many times faster idling is: the median over rounds, which forgives a machine that drifts."""
        return median(d / i for d, i in zip(self.dense_ms, self.idle_ms, strict=True))

    @property
    def faster(self) -> bool:
        """Whether idling won in at least three rounds of four."""
        return quartiles([d / i for d, i in zip(self.dense_ms, self.idle_ms, strict=True)])[0] > 1

    def images_per_s(self, samples_ms: Sequence[float]) -> float:
        """Images per second at the median of the samples."""
        return self.batch / median(samples_ms) * 1e3


@dataclass(frozen=True)
class Bench:
    """What was measured, on what; prints as a table with a verdict in words.

    Attributes:
        machine: Device, number type, threads and versions, in words.
        dense_gmacs: Billions of multiply-adds of the dense model for one image.
        idle_gmacs: The same of the idling model.
        timings: One entry per mode and batch size.
        skipped: What could not be measured, and why.
        interrupted: Whether the user stopped it early.
    """

    machine: str
    dense_gmacs: float
    idle_gmacs: float
    timings: tuple[Timing, ...]
    skipped: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def limit(self) -> float:
        """The speed-up if time followed arithmetic: the ratio of the GMACs."""
        return self.dense_gmacs / self.idle_gmacs

    @property
    def verdict(self) -> str:
        """In words: where idling is not faster, what was skipped."""
        slow = [f"{t.mode}, batch {t.batch} ({t.speed_up:.2f}×)" for t in self.timings if not t.faster]
        words = [f"Idling is NOT faster: {'; '.join(slow)}." if slow else "Idling is faster in every case."]
        words += [f"Skipped: {reason}." for reason in self.skipped]
        words += ["Interrupted: the table holds what was measured until then."] if self.interrupted else []
        return "\n".join(words if self.timings else words[1:])

    def __str__(self) -> str:
        rows = [
            (
                t.mode,
                t.batch,
                _spread(t.dense_ms),
                _spread(t.idle_ms),
                f"{t.images_per_s(t.dense_ms):.1f}",
                f"{t.images_per_s(t.idle_ms):.1f}",
                f"{t.speed_up:.2f}×",
                f"{t.speed_up / self.limit:.0%}",
            )
            for t in self.timings
        ]
        rate = "images/s"
        head = [
            "mode",
            "batch",
            "dense ms",
            "idle ms",
            f"dense {rate}",
            f"idle {rate}",
            "speed-up",
            "of limit",
        ]
        align = ("left", *["right"] * 7) if rows else None
        table = tabulate(rows, headers=head, disable_numparse=True, colalign=align)
        gmacs = f"limit {self.limit:.2f}× = {self.dense_gmacs:.2f} / {self.idle_gmacs:.2f} GMACs per image"
        return "\n".join([table, "", f"ms: median (quartiles); {gmacs}", self.machine, self.verdict])

    def to_json(self) -> str:
        """Everything, every sample and the derived figures."""
        derived = [
            {
                "speed_up": t.speed_up,
                "share_of_limit": t.speed_up / self.limit,
                "dense_images_per_s": t.images_per_s(t.dense_ms),
                "idle_images_per_s": t.images_per_s(t.idle_ms),
            }
            for t in self.timings
        ]
        facts = asdict(self) | {"limit": self.limit, "verdict": self.verdict}
        facts["timings"] = [asdict(t) | d for t, d in zip(self.timings, derived, strict=True)]
        return json.dumps(facts, indent=1)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    first, _, third = quantiles(samples, n=4, method="inclusive")
    return first, third


def _spread(samples_ms: Sequence[float]) -> str:
    first, third = quartiles(samples_ms)
    return f"{median(samples_ms):.2f} ({first:.2f}–{third:.2f})"
