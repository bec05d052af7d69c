"""The compatibility table: every model converted, and compared with the model itself and with a reference."""

import random
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from idlefx.capture.inputs import guess_inputs
from idlefx.errors import IdleFxError, InputError
from idlefx.pipeline import convert, inspect
from idlefx.records import BlockTable
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.runtime.selections import selections
from idlefx.zoo import reference as reference
from idlefx.zoo.models import Entry, Inputs, entries, images

EXAMPLE_BATCH, BATCH = 2, 3
TOLERANCE = 1e-5
TIE = 1e-4
WIDTHS = {"simple": [None] * 7 + [60], "github": None}


@dataclass(frozen=True)
class Row:
    """What came of one model.

    Attributes:
        label: The model.
        family: Where it comes from.
        found: Blocks found.
        can_idle: Blocks that can idle.
        keep_all: Largest difference to the model when all tokens are kept; None where nothing was converted.
        reference: Largest relative difference to the reference at a random plan and another batch.
        batch: "free", or the only batch size the result takes.
        note: What was refused and why.
        failure: What is wrong; empty where the model converts right, or is refused for the reason expected.
        missing: Whether its library is not installed, or too old for it.
    """

    label: str
    family: str
    found: int = 0
    can_idle: int = 0
    keep_all: float | None = None
    reference: float | None = None
    batch: str = ""
    note: str = ""
    failure: str = ""
    missing: bool = False


def check(entry: Entry) -> Row:
    """Convert a model and hold it against itself and the reference."""
    row: dict[str, Any] = {"label": entry.label, "family": entry.family}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _check(entry, entry.make(), row)
    except ImportError as missing:
        return Row(**row, note=f"not tried: {missing}", missing=True)
    except IdleFxError as refusal:
        expected = entry.refused and re.search(entry.refused, str(refusal))
        return Row(**row, note=_note([str(refusal)]), failure="" if expected else f"refused unexpectedly: {refusal}")
    except Exception as error:  # one broken model must not hide the others
        return Row(**row, failure=f"{type(error).__name__}: {error}")


def _check(entry: Entry, model: nn.Module, row: dict[str, Any]) -> Row:
    example = inputs_of(entry, model, EXAMPLE_BATCH)
    table = inspect(model, example)
    able = [block for block in table if block.can_idle]
    counts: dict[str, Any] = {**row, "found": len(table), "can_idle": len(able)}
    counts["note"] = _note([block.refusal for block in table if not block.can_idle])
    failure = _blocks_failure(entry, table)
    if failure or not able:
        return Row(**counts, failure=failure)
    draw = random.Random(entry.label)
    layers = sorted(draw.sample([b.index for b in able], max(1, len(able) - 1)))
    keeps = [round(draw.uniform(0.2, 0.9), 2) for _ in layers]
    idle = convert(model, layers, keeps, schedule="blocks", example_inputs=example)
    everything = convert(model, layers, 1.0, schedule="blocks", example_inputs=example)
    free = conversion_of(idle).batch_free
    batch = inputs_of(entry, model, BATCH if free else EXAMPLE_BATCH, seed=1)
    keep_all = largest_difference(run(model, batch), run(everything, batch), relative=False)
    answer = compare(model, idle, table, batch)
    counts |= {"keep_all": keep_all, "reference": answer.error, "batch": "free" if free else f"only {EXAMPLE_BATCH}"}
    return Row(**counts, failure=_value_failure(keep_all, answer))


def _note(refusals: Sequence[str]) -> str:
    """How many blocks are refused, and why the first of them is, with the file's name only."""
    if not refusals:
        return ""
    reason = re.sub(r"\(at \S*?([^/\s]+:\d+).*$", r"(\1)", refusals[0])
    return f"{len(refusals)} refused: {reason}"


def _blocks_failure(entry: Entry, table: BlockTable) -> str:
    refusals = [block.refusal for block in table if not block.can_idle]
    if entry.blocks not in (None, len(table)):
        return f"{len(table)} blocks found instead of {entry.blocks}: {', '.join(block.path for block in table)}"
    unexpected = [reason for reason in refusals if not entry.refused or not re.search(entry.refused, reason)]
    if unexpected:
        return f"refused unexpectedly: {unexpected[0]}"
    return "no block is refused, though this was expected" if entry.refused and not refusals else ""


@dataclass(frozen=True)
class Comparison:
    """Relative error of the output, and of the choice in standard deviations of the scores."""

    error: float
    excess: float


def _value_failure(keep_all: float, answer: Comparison) -> str:
    if keep_all > 0:
        return f"keeping all tokens changes the output by {keep_all:.2g}"
    if answer.excess > TIE:
        return f"chooses other tokens than the rule: one is off by {answer.excess:.2g} standard deviations"
    return f"differs from the reference by {answer.error:.2g}" if not answer.error <= TOLERANCE else ""


def compare(model: nn.Module, idle: IdleModule, table: BlockTable, batch: Inputs) -> Comparison:
    """Hold a converted model against the reference on one batch.

    Raises:
        ValueError: The converted model lets another number of tokens work than its plan says.
    """

    def call() -> Any:
        return run(model, batch)

    paths = {step.block: table[step.block].path for step in idle.plan if step.idles}
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    chosen = {paths[block]: index for block, index in selections(idle, *args, **kwargs).items()}
    keeps = {paths[step.block]: step.keep for step in idle.plan if step.idles}
    tokens = reference.look(model, [block.path for block in table], lambda: _call(model, batch))
    answer = reference.idle(model, keeps, tokens, chosen, call)
    return Comparison(largest_difference(answer.output, run(idle, batch)), answer.excess)


def inputs_of(entry: Entry, model: nn.Module, batch: int, seed: int = 0) -> Inputs:
    """A batch for a model: its entry's own, or images of the guessed size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if entry.inputs is not None:
            return entry.inputs(batch)
        return tree_map_only(Tensor, lambda t: images(batch, t.shape[-1]), guess_inputs(model)[0])


def _call(model: nn.Module, batch: Inputs) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


@torch.no_grad()
def run(model: nn.Module, batch: Inputs) -> Any:
    """The model's output, without the fused kernel of `nn.MultiheadAttention`, which rounds on its own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return _call(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def largest_difference(expected: Any, actual: Any, *, relative: bool = True) -> float:
    """The largest difference between the tensors of two outputs: of norms, in relation to the norm, or of entries."""
    found = [0.0]
    for a, b in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if isinstance(a, Tensor):
            gap = (a.double() - b.double()).abs()
            size = a.double().norm() if relative and a.any() else 1.0
            found.append(float((gap.norm() if relative else gap.max()) / size))
    return max(found) if all(value == value for value in found) else float("nan")


def find(pattern: str = "", *, quick: bool = False) -> list[Entry]:
    """The entries whose label or family matches a regular expression.

    Raises:
        InputError: No entry does, or it is no regular expression.
    """
    try:
        found = [e for e in entries(quick=quick) if re.search(pattern, f"{e.label} {e.family}", re.IGNORECASE)]
    except re.error as error:
        raise InputError(f"zoo: {pattern!r} is not a regular expression: {error}") from error
    if not found:
        raise InputError(f"zoo: no model or family matches {pattern!r}; without a pattern all are tried")
    return found


def survey(models: Sequence[Entry]) -> list[Row]:
    """A row for each model, with a progress bar."""
    rows = []
    with tqdm(models, unit="model") as bar:
        for entry in bar:
            bar.set_postfix_str(entry.label)
            rows.append(check(entry))
    return rows


def render(rows: Iterable[Row], style: str = "simple") -> str:
    """The table and a line that sums it up, for a terminal or with `style="github"` as Markdown."""
    rows = list(rows)
    cells = [
        (
            row.label, row.family, row.found or "-", row.can_idle if row.found else "-",
            "-" if row.keep_all is None else f"{row.keep_all:.0e}" if row.keep_all else "0",
            "-" if row.reference is None else f"{row.reference:.0e}",
            row.batch or "-", f"FAILS: {row.failure}" if row.failure else row.note,
        )
        for row in rows
    ]  # fmt: skip
    headers = ("model", "family", "blocks", "can idle", "keep-all error", "reference error", "batch", "note")
    table: str = tabulate(cells, headers, tablefmt=style, disable_numparse=True, maxcolwidths=WIDTHS[style])
    if style == "github":  # read by people only once it is rendered
        table = re.sub(" +", " ", re.sub("-{4,}", "---", table))
    return f"{table}\n\n{_summary(rows)}\n"


def _summary(rows: Sequence[Row]) -> str:
    converted = [row for row in rows if row.reference is not None and not row.failure]
    failed = sum(bool(row.failure) for row in rows)
    missing = sum(row.missing for row in rows)
    refused = len(rows) - len(converted) - failed - missing
    parts = [f"{len(converted)} of {len(rows)} models convert", f"{refused} are refused for the reason given"]
    parts += [f"{missing} were not tried"] if missing else []
    parts += [f"{failed} FAIL"] if failed else []
    worst = max((row.reference or 0.0 for row in converted), default=0.0)
    return f"{', '.join(parts)}. Largest reference error {worst:.0e}."
