"""What a run tells while it trains: a progress bar, a CSV file, TensorBoard."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from idlefx.errors import InputError
from idlefx.utils.files import whole_file


def columns_for(losses: Sequence[str], measures: Sequence[str]) -> tuple[str, ...]:
    """The columns of a run with these losses, and with these measures on held-out images."""
    return ("step", "epoch", "lr", *losses, "grad_norm", "images_per_s", *measures)


COLUMNS = columns_for(("loss", "task", "cut", "kd", "feat"), ("top1",))


class MetricLog:
    """One row for each step, written as soon as it is known.

    Args:
        directory: Where `metrics.csv` goes; None for nowhere.
        done: Steps that were made before; later rows of an interrupted run are dropped.
        steps: Steps of the whole run.
        images: Images of a step.
        show: Whether to show a progress bar.
        tensorboard: Whether to write for TensorBoard too.
        columns: Of the rows, as `columns_for` names them.

    Raises:
        InputError: A file cannot be written, or TensorBoard is not installed.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        done: int,
        steps: int,
        images: int,
        show: bool,
        tensorboard: bool = False,
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        self.columns, self.shown = columns, columns[columns.index("lr") + 1 : columns.index("grad_norm")]
        self.images = images
        hidden = None if show else True  # None: hidden where nobody watches
        self.bar = tqdm(total=steps * images, initial=done * images, unit=" images", disable=hidden, leave=False)
        self.path = directory / "metrics.csv" if directory else None
        if self.path:
            self._keep(done)
        self.writer = _tensorboard(directory / "tensorboard", done) if directory and tensorboard else None

    def _keep(self, done: int) -> None:
        assert self.path is not None
        kept = []
        if done and self.path.exists():
            with self.path.open(newline="") as file:
                kept = list(csv.DictReader(file))[:done]
        with whole_file(self.path) as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Tell one step."""
        self.bar.set_postfix({name: f"{row[name]:.3g}" for name in self.shown}, refresh=False)
        self.bar.update(self.images)
        if self.path:
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            except OSError as error:
                raise InputError(f"metrics: cannot write {self.path}: {error.strerror}") from error
        if self.writer:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()


def _tensorboard(directory: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard: it is not installed; pip install tensorboard, or do without") from error
    return SummaryWriter(str(directory), purge_step=done + 1)
