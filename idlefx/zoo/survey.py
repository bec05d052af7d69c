"""The rows of the compatibility table: every model converted, and compared with the model itself and the references."""

import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from idlefx.capture.inputs import guess_inputs
from idlefx.errors import IdleFxError, InputError
from idlefx.pipeline import convert, inspect
from idlefx.records import BlockTable
from idlefx.runtime.module import conversion_of
from idlefx.zoo.comparisons import (
    Comparison,
    FollowingComparison,
    compare,
    compare_following,
    largest_difference,
    run,
    worse,
)
from idlefx.zoo.entry import Entry, Inputs, images
from idlefx.zoo.models import entries

EXAMPLE_BATCH, BATCH = 2, 3
TOLERANCE = 1e-5
TIE = 1e-4
TRIES = 5  # batches for following, of which the first without a near tie is compared


@dataclass(frozen=True)
class Row:
    """What came of one model.

    Attributes:
        label: The model.
        family: Where it comes from.
        found: Blocks found.
        can_idle: Blocks that can idle.
        keep_all: Largest difference to the model when all tokens are kept; None where nothing was converted.
        resting: Largest relative difference to the reference at a random plan and another batch, where tokens rest.
        following: The same where tokens follow; None where nothing was compared, which the note explains.
        ties: Batches on which following was not compared, as rounding decides there who follows whom.
        batch: "free", or the only batch size the result takes, or "one sequence" where there is no batch.
        note: What was refused and why, or why following was not compared.
        failure: What is wrong; empty where the model converts right, or is refused for the reason expected.
        missing: Whether its library is not installed, or too old for it.
    """

    label: str
    family: str
    found: int = 0
    can_idle: int = 0
    keep_all: float | None = None
    resting: float | None = None
    following: float | None = None
    ties: int = 0
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
    batches = [inputs_of(entry, model, BATCH if free else EXAMPLE_BATCH, seed=seed) for seed in range(1, 1 + TRIES)]
    keep_all = largest_difference(run(model, batches[0]), run(everything, batches[0]), relative=False)
    answer = compare(model, idle, table, batches[0])
    if whole := [block.index for block in table if block.can_idle and block.windows]:  # tokens in them, or padded ones
        windows = convert(model, whole, keeps[0], schedule="blocks", unit="windows", example_inputs=example)
        answer = worse(answer, compare(model, windows, table, batches[0]))
    counts |= {"keep_all": keep_all, "resting": answer.error, "batch": _batch(table, free)}
    if failure := _value_failure(keep_all, answer):
        return Row(**counts, failure=failure)
    followed = _follow(model, table, draw, example, batches)
    counts |= {"following": followed.error, "ties": followed.ties}
    counts["note"] = "; ".join(filter(None, (counts["note"], _following_note(followed))))
    return Row(**counts, failure=_following_failure(followed))


def _batch(table: BlockTable, free: bool) -> str:
    if all(block.batch_dim is None for block in table):
        return "one sequence"
    return "free" if free else f"only {EXAMPLE_BATCH}"


def _follow(
    model: nn.Module, table: BlockTable, draw: random.Random, example: Inputs, batches: Sequence[Inputs]
) -> FollowingComparison:
    """Convert a model with stages that follow, or with single blocks where not all can, and compare it."""
    able = [block.index for block in table if block.can_idle and not block.rest_only]
    if not able:
        return FollowingComparison(None, reason=next(block.rest_only for block in table if block.can_idle))
    layers = sorted(draw.sample(able, draw.randint(1, max(1, len(able) - 1))))
    keeps = [round(draw.uniform(0.2, 0.9), 2) for _ in layers]
    whole = set(able) >= set(range(layers[0], len(table)))
    idle = convert(
        model, layers, keeps, schedule="stages" if whole else "blocks", idle="follow", example_inputs=example
    )
    return compare_following(model, idle, table, batches)


def _note(refusals: Sequence[str]) -> str:
    """How many blocks are refused, and why the first of them is, with the file's name only."""
    if not refusals:
        return ""
    return f"{len(refusals)} refused: {_with_short_name(refusals[0])}"


def _with_short_name(reason: str) -> str:
    """A reason that names lines of files, without the folders of those files and what is written there."""
    return re.sub(r"\(at \S*?([^/\s]+:\d+).*?(?=, behind which|$)", r"(\1)", reason)


def _following_note(followed: FollowingComparison) -> str:
    """Why following was not compared."""
    if followed.reason:
        return f"following not compared: {_with_short_name(followed.reason)}"
    return f"following not compared: near ties on all {followed.ties} batches" if followed.error is None else ""


def _blocks_failure(entry: Entry, table: BlockTable) -> str:
    refusals = [block.refusal for block in table if not block.can_idle]
    if entry.blocks not in (None, len(table)):
        return f"{len(table)} blocks found instead of {entry.blocks}: {', '.join(block.path for block in table)}"
    unexpected = [reason for reason in refusals if not entry.refused or not re.search(entry.refused, reason)]
    if unexpected:
        return f"refused unexpectedly: {unexpected[0]}"
    return "no block is refused, though this was expected" if entry.refused and not refusals else ""


def _value_failure(keep_all: float, answer: Comparison) -> str:
    if keep_all > 0:
        return f"keeping all tokens changes the output by {keep_all:.2g}"
    if answer.excess > TIE:
        return f"chooses other tokens than the rule: one is off by {answer.excess:.2g} standard deviations"
    return f"differs from the reference by {answer.error:.2g}" if not answer.error <= TOLERANCE else ""


def _following_failure(followed: FollowingComparison) -> str:
    if not followed.grouped:
        return "groups tokens in another way than the rule"
    if followed.error is None or followed.error <= TOLERANCE:
        return ""
    return f"following differs from its reference by {followed.error:.2g}"


def inputs_of(entry: Entry, model: nn.Module, batch: int, seed: int = 0) -> Inputs:
    """A batch for a model: its entry's own, or images of the guessed size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if entry.inputs is not None:
            return entry.inputs(batch)
        return tree_map_only(Tensor, lambda t: images(batch, t.shape[-1]), guess_inputs(model)[0])


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
