"""Which plan for a model: from a budget, on pictures of the user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from idlefx.analysis.image_input import takes_bytes
from idlefx.bench.plot import check_chart
from idlefx.capture.export import Captured, capture
from idlefx.errors import InputError
from idlefx.graph.inference import remembering
from idlefx.options import AUTO, Idle, PlanOptions
from idlefx.pipeline import origin
from idlefx.planning.model_plan import sizes_of
from idlefx.reporting.comparison.compare import class_counts
from idlefx.reporting.comparison.image_batches import ImageBatches, Images
from idlefx.reporting.latency import BlockTimes, read_times
from idlefx.search.budget import Unit, read_budget
from idlefx.search.candidates import Candidates
from idlefx.search.chooser import Chooser
from idlefx.search.costs import Costs
from idlefx.search.frontier_plot import draw_findings
from idlefx.search.journal import Journal, journal_path
from idlefx.search.pictures import Pictures, split_pictures
from idlefx.search.proposal import Proposal
from idlefx.search.scoring import Scorer
from idlefx.search.shapes import even_taper
from idlefx.search.timing import Timing, timing_of
from idlefx.search.work import Work
from idlefx.utils.files import check_writable

TIMED = ((2, 0.16), (24, 0.5))  # blocks in a stage, and how deep: e^-0.16 is 85 %; plans of many choices and of one


def plan(
    model: nn.Module,
    images: Images,
    *,
    speedup: float | None = None,
    gmacs: float | None = None,
    ms: float | None = None,
    max_change: float | None = None,
    idle: Idle = "follow",
    by: Unit = "ms",
    times: str | Path | Sequence[BlockTimes] | None = None,
    selector: str = AUTO,
    multiple_of: int = 1,
    prefix: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    batch_size: int = 16,
    limit: int = 256,
    trials: int = 60,
    out: str | Path | None = None,
    resume: bool = False,
    plot: str | Path | None = None,
    progress: bool = True,
) -> Proposal:
    """Choose the plan that changes a model least for what it may cost; labels are not needed.

    The model is traced once and rewritten for every plan that is tried. Plans are judged by what `compare` measures,
    1 − cosine to the dense outputs, and one of four pictures is held out to say what the chosen plan changes.

    Args:
        model: The dense model; it stays untouched.
        images: As `compare` takes them; a hundred or more tell plans apart.
        speedup: How many times as fast as the dense model; `by` says by which measure. Give one budget alone.
        gmacs: Billions of multiply-adds for one image, at most.
        ms: Predicted milliseconds of a call, at most.
        max_change: The most that a plan may change; the cheapest one within it is chosen.
        idle: What idle tokens do: "follow", or "rest", which is right for a model that was trained for it.
        by: In what a speed-up, or what is cheapest, is counted: predicted "ms" on this device, or "gmacs".
        times: A table that `bench --table` wrote; measured on the spot if times are needed and it is None.
        selector: The token score, as for `convert`.
        multiple_of: As for `convert`.
        prefix: As for `convert`.
        example_inputs: As for `convert`.
        batch_size: Pictures in a call, also of those that are timed unless a table says how many.
        limit: The most pictures to read.
        trials: How many plans to try besides even tapers.
        out: A file for the plan, which `read_plan` and `--plan` read; the search is kept beside it until it is done.
        resume: Go on with a search that was stopped: the same call as before, with this.
        plot: A png, pdf or svg for the frontier and the picture that suffers most.
        progress: Whether to show a progress bar, if standard error is a terminal.

    Returns:
        The plan, for `convert(model, plan=…)`; it prints as a table of what else can be had.

    Raises:
        InputError: There are fewer than 8 pictures, all outputs are the same, the budget is none, several or out of
            reach, or the table is of another device.
        PlanError: No block can idle, nothing is faster, or nothing stays within `max_change`.
        KeyboardInterrupt: The user stopped it before a plan was tried; later on, the best until then is returned.
    """
    told = {"speedup": speedup, "gmacs": gmacs, "ms": ms, "max_change": max_change}
    budget = read_budget(told, by)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 0:
        raise InputError(f"budget: trials={trials!r} is no whole number from 0")
    kept_in = journal_path(out, resume=resume)
    for path in (out, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        check_chart(plot)
    tables = read_times(times) if isinstance(times, (str, Path)) else times
    base = PlanOptions([0], 1.0, "stages", selector, True, multiple_of, prefix, idle)
    captured = capture(model, example_inputs)
    pictures = split_pictures(_batches(images, captured, batch_size, limit))
    candidates, classes = Candidates(captured, base), class_counts(model, captured.facts)
    few, sizes = Scorer(candidates.dense, pictures.few, classes, keep=True), sizes_of(candidates.blocks)
    telling = few.telling()
    decisive = {
        "model": sizes, "options": base.to_dict(), "budget": str(budget), "trials": trials,
        "pictures": pictures.counts, "outputs": few.digest(),
    }  # fmt: skip
    journal = Journal(kept_in, decisive, resume=resume)
    hidden = None if progress else True
    with journal, remembering(), tqdm(desc="plan", unit="plan", leave=False, disable=hidden) as bar:
        timed = budget.unit == "ms" or tables is not None
        timing = _timing(candidates, pictures, batch_size, tables, journal) if timed else None
        costs = Costs(candidates, budget, Work(candidates), timing)
        findings, worst = Chooser(costs, pictures, few, telling, classes, journal, bar).choose(trials)
        journal.done = not findings.interrupted
        proposal = Proposal(**findings.chosen.options, model=origin(captured.model), sizes=sizes, findings=findings)
        if out is not None:
            proposal.write(out)
    if plot is not None:
        draw_findings(findings, worst, plot)
    return proposal


def _timing(
    candidates: Candidates, pictures: Pictures, batch: int, tables: Sequence[BlockTimes] | None, journal: Journal
) -> Timing:
    """What times are predicted from; a search that goes on has the times that it had."""
    places, blocks = len(candidates.usable), len(candidates.blocks)
    shapes = [(even_taper(places, min(1, places - 1), length), depth) for length, depth in TIMED]
    options = [s.options(s.shares(depth), candidates.usable, blocks, candidates.base) for s, depth in shapes]
    many, one = map(candidates.make, options)
    known = journal.notes.get("times")
    timing = timing_of(candidates.dense, (many, one), pictures.one, batch, tables, known)
    journal.note("times", timing.told())
    return timing


def _batches(images: Images, captured: Captured, batch_size: int, limit: int) -> ImageBatches:
    as_bytes = takes_bytes(captured.eval_graph.graph)
    return ImageBatches(images, captured.facts, batch_size, limit, as_bytes=as_bytes)
