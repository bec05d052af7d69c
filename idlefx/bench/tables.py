"""What a bench found, as a table and in words."""

import json
from collections.abc import Sequence
from datetime import date
from statistics import median, quantiles

from tabulate import tabulate

from idlefx.bench.results import DENSE, EAGER, FIRST, IDLE, Bench, Timing, outcome, speed_up
from idlefx.utils.versions import versions

HEAD = ("mode", "batch", "model", "ms", "images/s", "peak MiB", "speed-up", "of limit", "memory")

SUMMARY = ("what", "batch", "model", "GMACs", "limit", "dense ms", "ms", "speed-up", "of limit", "verdict")

AGAINST_BEST = {"faster": "", "not told apart": ", which chance could do", "slower": ": here it does not pay"}


def render(bench: Bench) -> str:
    """The table, the limit, the machine and the verdict."""
    rows = [row for timing in bench.timings for row in _rows(bench, timing)]
    align = ("left", "right", "left", *["right"] * 6) if rows else None
    table = tabulate(rows, headers=HEAD, disable_numparse=True, colalign=align)
    limits = [
        f"limit of {name} {bench.limit(name):.2f}× = {bench.gmacs[DENSE]:.3g} / {gmacs:.3g} GMACs per image"
        for name, gmacs in bench.gmacs.items()
        if name != DENSE
    ]
    what = "a training step: forward, loss, backward, AdamW; " if bench.training else ""
    notes = f"{what}ms: median (quartiles); {'; '.join(limits)}"
    return "\n".join([bench.title, "", table, "", notes, bench.machine, verdict(bench)])


def verdict(bench: Bench) -> str:
    """In words: where idling is faster and where it does not pay, what was skipped."""
    found: dict[str, list[str]] = {"faster": [], "not told apart": [], "slower": []}
    for t in bench.timings:
        if IDLE in t.ms:
            found[outcome(t.ms[DENSE], t.ms[IDLE])].append(f"{t.mode}, batch {t.batch} ({t.speed_up():.2f}×)")
    saying = {
        "faster": "Idling is faster: ",
        "not told apart": "Idling and dense could not be told apart, time more rounds: ",
        "slower": "Idling is SLOWER, it does not pay: ",
    }
    words = [saying[kind] + "; ".join(cases) + "." for kind, cases in found.items() if cases]
    for name in bench.gmacs:
        words += [_best(bench, batch, name) for batch in _batches(bench) if name != DENSE and bench.best(batch, name)]
    words += [_of_bound(t, name) for t in bench.timings if FIRST in t.ms for name in t.ms if name not in (DENSE, FIRST)]
    words += [f"Skipped: {reason}." for reason in bench.skipped]
    words += ["Interrupted: the table holds what was measured until then."] if bench.interrupted else []
    return "\n".join(words)


def summary(benches: Sequence[Bench]) -> str:
    """One line for each model, plan and batch size, in Markdown: best compiled against best compiled dense model."""
    rows = []
    for bench in benches:
        for batch, name, dense, other in bench.finals():
            dense_ms, other_ms, limit = dense.ms[DENSE], other.ms[name], bench.limit(name)
            gained = speed_up(dense_ms, other_ms)
            rows.append(
                (bench.title, str(batch), name, f"{bench.gmacs[DENSE]:.3g} → {bench.gmacs[name]:.3g}", f"{limit:.2f}",
                 f"{median(dense_ms):.4g}", f"{median(other_ms):.4g}", f"{gained:.2f}×", f"{gained / limit:.0%}",
                 outcome(dense_ms, other_ms))
            )  # fmt: skip
    table = tabulate(rows, headers=SUMMARY, tablefmt="github", disable_numparse=True)
    title = "Best compiled against best compiled dense model (eager where nothing was compiled):"
    return f"{title}\n\n{table}" if rows else ""


def to_json(benches: Sequence[Bench]) -> str:
    """Everything that was measured, when and with what, as JSON."""
    facts = {"measured": date.today().isoformat(), "versions": versions("timm")}
    return json.dumps({**facts, "benches": [bench.to_dict() for bench in benches]}, indent=1)


def _rows(bench: Bench, timing: Timing) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, samples in timing.ms.items():
        peak, memory = timing.peak_mib.get(name), timing.memory_ratio(name)
        gained = timing.speed_up(name)
        compared = (f"{gained:.2f}×", f"{gained / bench.limit(name):.0%}", f"{memory:.2f}×" if memory else "-")
        rows.append(
            (timing.mode, str(timing.batch), name, _spread(samples), f"{timing.images_per_s(name):.1f}",
             f"{peak:.0f}" if peak else "-", *(compared if name != DENSE else ("", "", "")))
        )  # fmt: skip
    return rows


def _best(bench: Bench, batch: int, name: str) -> str:
    best = bench.best(batch, name)
    assert best is not None
    dense_ms, other_ms = best[0].ms[DENSE], best[1].ms[name]
    gained, modes = speed_up(dense_ms, other_ms), f"{best[0].mode} against {best[1].mode}"
    pays = AGAINST_BEST[outcome(dense_ms, other_ms)]
    return (
        f"Best compiled at batch {batch}: {name} is {gained:.2f}× as fast as dense ({modes}), "
        f"{gained / bench.limit(name):.0%} of its limit{pays}."
    )


def _of_bound(timing: Timing, name: str) -> str:
    reached, case = speed_up(timing.ms[FIRST], timing.ms[name]), f"{timing.mode}, batch {timing.batch}"
    return f"{case}: {name} reaches {reached:.1%} of the speed of first, which chooses nothing."


def _batches(bench: Bench) -> list[int]:
    return list(dict.fromkeys(t.batch for t in bench.timings if t.mode != EAGER))


def _spread(samples_ms: Sequence[float]) -> str:
    first, third = _quartiles(samples_ms)
    return f"{median(samples_ms):.2f} ({first:.2f}–{third:.2f})"


def _quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    first, _, third = quantiles(samples, n=4, method="inclusive")
    return first, third
