"""What a conversion saves, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from torch import fx

from idlefx.analysis.macs import count_macs
from idlefx.graph.notes import made_for, only_made_for
from idlefx.records import written
from idlefx.reporting.latency import BlockTimes, read_times, times_for
from idlefx.runtime.module import IdleModule, conversion_of, converted
from idlefx.runtime.weights import unchanged


@dataclass(frozen=True)
class BlockReport:
    """One block: what it keeps and what it costs for one image.

    Attributes:
        block: Index.
        path: Module path.
        kept: Image tokens that work.
        tokens: Image tokens there are.
        dense_gmacs: Multiply-adds before, in units of 1e9.
        idle_gmacs: After, the selector head counted in.
        choosing_gmacs: Of these, the selector head.
        parameters: Parameters that the block reads.
        dense_ms: Predicted milliseconds before, if a table of times was given.
        idle_ms: After, without choosing and gathering.
    """

    block: int
    path: str
    kept: int
    tokens: int
    dense_gmacs: float
    idle_gmacs: float
    choosing_gmacs: float
    parameters: int
    dense_ms: float | None = None
    idle_ms: float | None = None


@dataclass(frozen=True)
class Report:
    """A conversion as a whole; prints as a table.

    Attributes:
        blocks: Every block, idling or not.
        dense_gmacs: Multiply-adds of the model before, in units of 1e9.
        idle_gmacs: After.
        parameters: Parameters of the model; the conversion adds none.
        batch_free: Whether the batch size is free.
        clock: Where, how and for which batch size times are predicted; empty if they are not.
        meanwhile: What idle tokens do, and what that asks of the user; empty if there is nothing to say.
    """

    blocks: tuple[BlockReport, ...]
    dense_gmacs: float
    idle_gmacs: float
    parameters: int
    batch_free: bool
    clock: str = ""
    meanwhile: str = ""

    @property
    def ratio(self) -> float:
        """The speed-up that the multiply-adds allow."""
        return self.dense_gmacs / self.idle_gmacs

    def _times(self) -> list[tuple[float | None, float | None]]:
        return [(b.dense_ms, b.idle_ms) for b in self.blocks]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (str(b.block), b.path or "-", f"{b.kept} of {b.tokens}" if b.tokens else "-", written(b.dense_gmacs),
             written(b.idle_gmacs), written(b.choosing_gmacs) if b.choosing_gmacs else "", _millions(b.parameters))
            for b in self.blocks
        ]  # fmt: skip
        rest = self.dense_gmacs - sum(b.dense_gmacs for b in self.blocks)
        rows.append(("rest", "", "", written(rest), written(rest), "", ""))
        rows.append(
            ("all", "", "", written(self.dense_gmacs), written(self.idle_gmacs), "", _millions(self.parameters))
        )
        head = ["block", "path", "kept", "dense GMACs", "idle GMACs", "of these choosing", "parameters"]
        if self.clock:
            head += ["dense ms", "idle ms"]
            total = tuple(sum(ms or 0.0 for ms in column) for column in zip(*self._times(), strict=True))
            times = [*self._times(), (None, None), total]
            rows = [(*row, *map(_ms, pair)) for row, pair in zip(rows, times, strict=True)]
        saved = 100 * (1 - self.idle_gmacs / self.dense_gmacs)
        text = tabulate(rows, headers=head, disable_numparse=True, stralign="right")
        text += (
            f"\n{written(self.dense_gmacs)} GMACs → {written(self.idle_gmacs)} GMACs (−{saved:.0f} %), "
            f"a speed-up of {self.ratio:.2f} at most; a multiply-add counts as one"
        )
        if self.clock:
            text += f"\nms: predicted for the blocks, choosing and gathering not counted; {self.clock}"
        if not self.batch_free:
            text += "\nthe batch size is fixed to the example's by the model's own code"
        return f"{text}\n{self.meanwhile}" if self.meanwhile else text


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _ms(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else ""


def report(idle: IdleModule, times: str | Path | Sequence[BlockTimes] | None = None) -> Report:
    """Kept tokens, multiply-adds for one image and parameters of a converted model, per block and in total.

    Args:
        idle: A converted model.
        times: A table that `python -m idlefx bench --table FILE` measured, from which times are predicted too.

    Raises:
        InputError: The table cannot be read, or is for blocks of another size.
    """
    tables = read_times(times) if isinstance(times, (str, Path)) else times
    idle = converted(idle)
    conversion = conversion_of(idle)
    steps = {step.block: step for step in conversion.plan}
    graph = conversion.evaluation.graph
    rows, machine = [], ""
    for block in conversion.blocks:
        step = steps.get(block.index)
        macs, choosing = block.macs, 0
        if step is not None and step.idles:
            nodes = made_for(graph, block.index)
            macs = count_macs(nodes)
            if step.opens:
                choosing = count_macs(_head(nodes, only_made_for(graph, block.index, "index")))
        kept = step.kept if step is not None else block.image_tokens
        before = after = None
        if tables is not None and block.tokens:
            clock = times_for(block, tables)
            before, after = clock.at(block.tokens), clock.at(kept + len(block.prefix))
            machine = f"{clock.machine}, {clock.mode}, batch {clock.batch}"
        rows.append(
            BlockReport(
                block.index, block.path, kept, block.image_tokens, block.macs / 1e9, macs / 1e9, choosing / 1e9,
                block.parameters, before, after,
            )
        )  # fmt: skip
    dense = conversion.blocks.macs / 1e9
    total = dense + sum(row.idle_gmacs - row.dense_gmacs for row in rows)
    parameters = sum(parameter.numel() for parameter in idle.parameters())
    return Report(tuple(rows), dense, total, parameters, conversion.batch_free, machine, _meanwhile(idle))


def _meanwhile(idle: IdleModule) -> str:
    """What idle tokens do; for those that rest only as long as nobody has trained the model for it."""
    conversion = conversion_of(idle)
    if not conversion.plan.stages:
        return ""
    if conversion.plan.idle == "follow":
        return conversion.plan.grouping
    if unchanged(idle, conversion.weights):
        may_follow = not any(conversion.blocks[step.block].rest_only for step in conversion.plan)
        remedy = "; idle='follow' needs none" if may_follow else ""
        return f"idle tokens rest, which wants fine-tuning (python -m idlefx.finetune){remedy}"
    return ""


def _head(nodes: list[fx.Node], index: fx.Node) -> list[fx.Node]:
    """The nodes that the choice of tokens depends on."""
    needed = {index}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]
