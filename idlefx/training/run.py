"""The steps of a run: what is looked at, told and saved between them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any

from idlefx.errors import InputError
from idlefx.training import checkpoints
from idlefx.training.gain import Gain
from idlefx.training.given_batches import Batches
from idlefx.training.history import History
from idlefx.training.length import Length
from idlefx.training.metric_log import MetricLog, columns_for
from idlefx.training.trainer import Trainer

CHECKPOINT_SHARE = 0.01  # of the time, which writing checkpoints may take


class Run:
    """The steps of a run, and its files.

    With labels there is a checkpoint after each look at the held-out images. Without them the best weights are kept in
    memory, and written when writing takes less than a hundredth of the time since it was done last.

    Args:
        training: The student and its optimiser, which may have made some steps already.
        train: Training batches.
        length: Of the whole run.
        directory: Where the files go; None for nowhere.
        stop: Asked after each step; if it says so, a checkpoint is written and the run ends unfinished.
    """

    def __init__(
        self, training: Trainer, train: Batches, length: Length, directory: Path | None, stop: Callable[[], bool]
    ) -> None:
        self.training, self.train, self.length, self.stop = training, train, length, stop
        self.world, self.settings = training.world, training.settings
        self.writes = directory if self.world.leads else None
        self.stale = 0
        self.saved, self.cost = time.perf_counter(), 0.0
        self.written_best: Any = None

    def go(self, outcome: History | Gain, *, stale: int, tensorboard: bool) -> None:
        """Make all steps that are still to be made, and note in the outcome what came of it.

        Args:
            outcome: Of the run.
            stale: Looks since there was a better model, in a run that goes on.
            tensorboard: Whether to write for TensorBoard too.
        """
        training, objective = self.training, self.training.objective
        self.stale = stale
        metrics = MetricLog(
            self.writes, done=training.step, steps=self.length.steps, images=training.images, show=self.world.leads,
            tensorboard=tensorboard, columns=columns_for(objective.losses, objective.measures),
        )  # fmt: skip
        with metrics, training:
            if training.step == 0:
                if not self.train.labelled:
                    training.remember()
                measured = outcome.untuned if isinstance(outcome, History) else outcome.distance
                self._checkpoint({objective.measures[0]: measured}, best=True)
            try:
                self._steps(outcome, metrics)
            except BaseException:
                self._keep_best()
                raise
        outcome.finished = training.step == self.length.steps or self.gave_up
        if isinstance(outcome, Gain):
            outcome.gave_up = self.gave_up

    @property
    def gave_up(self) -> bool:
        """Whether there was no better model for so long that the run ends."""
        return 0 < self.settings.patience <= self.stale and self.training.step < self.length.steps

    def _steps(self, outcome: History | Gain, metrics: MetricLog) -> None:
        training, before = self.training, time.perf_counter()
        for epoch, batches in () if self.gave_up else self._batches():
            row: dict[str, Any] = {"epoch": epoch, **training.update(batches)}
            row["images_per_s"] = training.images / (time.perf_counter() - before)
            best, due = False, self.length.due(training.step)
            if due:
                self.train.agree()
                measures, best = training.objective.look(training.averaged, training.step)
                row |= measures
                self.stale = 0 if best else self.stale + 1
                if best and not self.train.labelled:
                    training.remember()
            stopped = self.world.any(self.stop())
            outcome.rows.append(row)
            metrics.write(row)
            ends = stopped or self.gave_up or training.step == self.length.steps
            if ends or self._may_save(due):
                self._checkpoint(row, best=best)
            if ends:
                return
            before = time.perf_counter()

    def _batches(self) -> Iterator[tuple[int, list[Any]]]:
        """For each step still to be made its epoch and its batches."""
        done, accumulate, batches = self.training.step, self.settings.accumulate, self.train.count()
        if batches is None:
            yield from self._unnumbered()
            return
        per_epoch = batches // accumulate
        while done < self.length.steps:
            epoch, place = divmod(done, per_epoch)
            taken = self.train.epoch(epoch, place * accumulate)
            for _ in range(min(per_epoch - place, self.length.steps - done)):
                done += 1
                yield epoch, list(islice(taken, accumulate))

    def _unnumbered(self) -> Iterator[tuple[int, list[Any]]]:
        """The same where it is not known how many batches an epoch has; those of earlier steps are read again."""
        done, accumulate = 0, self.settings.accumulate
        for epoch in count():
            taken, before = self.train.epoch(epoch), done
            while batches := list(islice(taken, accumulate)):
                done += 1
                if done > self.training.step:
                    yield epoch, batches
            if done == before:
                raise InputError(
                    f"data: there are no more training images after {done} steps, though the run has "
                    f"{self.length.steps}; give a list, a data set or a DataLoader, which can be read again"
                )

    def _may_save(self, due: bool) -> bool:
        if due and self.train.labelled:
            return True
        since = time.perf_counter() - self.saved
        long_ago = since >= 60 * self.settings.checkpoint_minutes
        return (due or long_ago) and self.cost <= CHECKPOINT_SHARE * since

    def _checkpoint(self, row: dict[str, Any], *, best: bool) -> None:
        if self.writes is None:
            return
        began, training = time.perf_counter(), self.training
        state = {
            "training": training.state(), "history": training.objective.state(), "length": asdict(self.length),
            "stale": self.stale,
        }  # fmt: skip
        told = {"step": training.step, **{name: row.get(name, "") for name in training.objective.measures[:1]}}
        checkpoints.save(self.writes, state, training.averaged, told, best=best and training.best is None)
        self._keep_best()
        self.saved = time.perf_counter()
        self.cost = self.saved - began

    def _keep_best(self) -> None:
        """Write the remembered weights, where they are not on the disk already."""
        best = self.training.best
        if self.writes is not None and best is not None and best is not self.written_best:
            checkpoints.save_best(self.writes, best)
            self.written_best = best
