"""How often a classifier is right, dense and converted, on labelled pictures that both of them see."""

from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from idlefx.errors import InputError
from idlefx.reporting.comparison.compare import IDLE, check_models, class_counts, facts_of, takes_byte_images
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import Model, evaluating, outputs_of
from idlefx.reporting.comparison.tally import LOGITS, called
from idlefx.training.accuracy import DENSE, Accuracy, Evaluation
from idlefx.training.datasets import Source, class_names, open_labelled


def evaluate(
    model: Model,
    idle: Model | Mapping[str, Model],
    data: str | Path | Iterable[Any],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    split: str = "validation",
    root: str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Top-1 of a classifier before and after conversion, on labelled images that were not trained on.

    All models run in eval mode and without gradients, and are left as they were. For models that are no classifiers,
    and where there are no labels, there is `compare`.

    Args:
        model: The dense model.
        idle: What `convert` made of it, compiled or not, or loaded by `load`. Several, by names of your choice, are
            evaluated in one table.
        data: A folder with one folder for each class, or with such folders for training and validation, of which the
            latter is read; a data set as timm names it, hfds/… or wds/…; or an iterable of batches `(images, labels)`
            with images (B, channels, height, width) as the model takes them and labels (B,).
        batch_size: Images in a batch, unless `data` holds batches.
        limit: The most images to look at, spread evenly over a folder; of an iterable whole batches up to it.
        split: The folder or split to evaluate on.
        root: Where a named data set lies or is cached.
        workers: Processes that read images.
        progress: Whether to show a progress bar, if standard error is a terminal.

    Returns:
        Accuracy of every model.

    Raises:
        InputError: There are no such images, their classes are not those of the models, or a model fails on them.
    """
    models = dict(idle) if isinstance(idle, Mapping) else {IDLE: idle}
    check_models(model, models)
    if DENSE in models:
        raise InputError(f"evaluate: `{DENSE}` is what the dense model is called; give the converted one another name")
    facts = facts_of(model, models)
    classes, total, batches = class_counts(model, facts), None, data
    if limit is not None and limit < 1:
        raise InputError(f"data: limit is {limit}; expected a whole number from 1")
    if isinstance(data, (str, Path)):
        if facts is None:
            raise InputError("evaluate: nothing is known of the size of the model's images; give batches of them")
        if any(map(takes_byte_images, models.values())):
            raise InputError("evaluate: the model takes uint8 images and normalises them itself; give batches of such")
        loader = open_labelled(Source(str(data), root, val=split), facts, batch_size, limit=limit, workers=workers)
        classes = _agreed(str(data), len(class_names(loader.dataset)), classes)
        batches, total, limit = loader.epoch(), len(loader), None
    tally = _Tally(models, classes)
    hidden = None if progress else True
    bar = tqdm(batches, "evaluate", total, unit="batch", leave=False, disable=hidden)
    with evaluating([model, *models.values()]), torch.no_grad():
        for batch in bar:
            tally.add(model, *_labelled(batch))
            if limit is not None and tally.images >= limit:
                break
    if not tally.images:
        raise InputError("data: there are no images to evaluate on")
    return tally.evaluation()


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, if it has both."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        images, labels = batch
        if labels.shape == images.shape[:1] and len(labels) and not labels.is_floating_point():
            return images, labels
    raise InputError(
        "evaluate: a batch must be a pair of tensors, images (B, channels, height, width) and the numbers of their "
        "classes (B,)"
    )


def _agreed(name: str, there: int, classes: set[int]) -> set[int]:
    """How many classes images and model have, if either says it."""
    if there and classes and there not in classes:
        raise InputError(
            f"data: {name} has {there} classes, but the model tells {' or '.join(map(str, sorted(classes)))} apart; a "
            "folder's place among the others is its class, so there must be one for each"
        )
    return {there} if there else classes


class _Tally:
    """Counts of images so far.

    Args:
        models: Converted models by name.
        classes: How many classes they may tell apart; nothing if that is not known.
    """

    def __init__(self, models: Mapping[str, Model], classes: set[int]) -> None:
        self.models, self.classes, self.images, self.width = models, classes, 0, 0
        self.right = dict.fromkeys((DENSE, *models), 0)
        self.gained, self.lost, self.same = (dict.fromkeys(models, 0) for _ in range(3))

    def add(self, model: Model, images: Tensor, labels: Tensor) -> None:
        """Take in a batch."""
        batch = ImageBatch(range(self.images, self.images + len(labels)), images)
        dense = self._classes(outputs_of(model, batch, "the dense model"))
        labels = labels.to(dense.device)
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.width:
            raise InputError(
                f"data: there is an image of class {int(labels.max())}, but the model tells {self.width} classes "
                f"apart, 0 to {self.width - 1}"
            )
        self.right[DENSE] += int((was := dense == labels).sum())
        for name, idle in self.models.items():
            found = self._classes(outputs_of(idle, batch, called(name))).to(dense.device)
            self.right[name] += int((now := found == labels).sum())
            self.gained[name] += int((now & ~was).sum())
            self.lost[name] += int((was & ~now).sum())
            self.same[name] += int((found == dense).sum())
        self.images += len(labels)

    def _classes(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The class (B,) with the highest logit."""
        able = [
            name
            for name, output in outputs.items()
            if output.ndim == 2 and output.is_floating_point() and (not self.classes or output.shape[1] in self.classes)
        ]
        if not able:
            shapes = ", ".join(f"`{name}` {tuple(output.shape)}" for name, output in outputs.items())
            raise InputError(
                f"evaluate: the model returns no logits of {' or '.join(map(str, sorted(self.classes))) or 'all'} "
                f"classes, but {shapes}; what a model without them changes, idlefx.compare tells"
            )
        logits = outputs[next((name for name in able if LOGITS in name), able[0])]
        self.width = logits.shape[1]
        return logits.argmax(1)

    def evaluation(self) -> Evaluation:
        """The record of all of it."""
        models = {
            name: Accuracy(
                self._percent(right),
                self._percent(sqrt(right * (1 - right / self.images))),
                self._percent(gained - lost),
                self._percent(sqrt(gained + lost - (gained - lost) ** 2 / self.images)),
                self._percent(self.same.get(name, self.images)),
            )
            for name, right in self.right.items()
            for gained, lost in [(self.gained.get(name, 0), self.lost.get(name, 0))]
        }
        return Evaluation(models, self.images, self.width)

    def _percent(self, count: float) -> float:
        return 100 * count / self.images
