"""Run converted models beside their dense one on images of the user, and say what the conversion changes."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from idlefx.analysis.image_input import takes_bytes
from idlefx.capture.inputs import guess_inputs
from idlefx.capture.wrappers import unwrapped
from idlefx.errors import InputError
from idlefx.records import ModelFacts
from idlefx.reporting.comparison.image_batches import ImageBatches, Images
from idlefx.reporting.comparison.model_calls import Model, evaluating, outputs_of
from idlefx.reporting.comparison.record import Comparison
from idlefx.reporting.comparison.tally import Tally, called
from idlefx.runtime.module import conversion_of

IDLE = "idle"  # what a converted model is called that is compared by itself


def compare(
    model: nn.Module,
    idle: Model | Mapping[str, Model],
    images: Images,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    logits: Sequence[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """What a conversion changes on images of your own; labels are not needed.

    All models run in eval mode and without gradients, on batches that are read one after the other; no output is kept,
    so the number of images does not matter to memory. Models, modes and devices are left as they were.

    An output is taken for logits, of which top-1 and KL divergence are told, if it has the shape (B, classes) and
    either its name contains "logits", as in the outputs of Hugging Face, or the model says that it has so many classes:
    by `num_classes` (timm, torchvision), `config.num_labels`, or the names of its classes. The features (B, C) of an
    encoder are none of these. For a model that says nothing, name them by `logits=`.

    Args:
        model: The dense model.
        idle: What `convert` made of it, compiled or not, or loaded by `load`; or anything else that is called like the
            model. Several, by names of your choice, are compared in one table.
        images: A tensor (B, channels, height, width); a folder, in which photographs are looked for at any depth; or a
            data set, a `DataLoader` or any iterable of batches, single images, files, PIL images, `(images, labels)`,
            or dicts of keyword inputs, whose `labels` are left out. Tensors are given to the models as they are, on the
            device and in the number type of each; photographs are cropped and normalised first, as the model's data
            configuration says.
        batch_size: Images in a batch, unless `images` holds batches.
        limit: The most images to look at: of a folder spread evenly over its files, else the first ones.
        logits: Names of the outputs (B, classes) that are logits; "output" is that of a model which returns one tensor.
            None finds them as said above.
        progress: Whether to show a progress bar, if standard error is a terminal.

    Raises:
        InputError: There are no images, or one of them cannot be read; a model fails on them; outputs hold no tensor,
            none with an entry for each image, or NaN; or a converted model returns another structure or shape.
    """
    models = dict(idle) if isinstance(idle, Mapping) else {IDLE: idle}
    check_models(model, models)
    facts = facts_of(model, models)
    batches = ImageBatches(images, facts, batch_size, limit, as_bytes=any(map(takes_byte_images, models.values())))
    tally = Tally(list(models), logits, class_counts(model, facts))
    hidden = None if progress else True  # None hides it where standard error is no terminal
    bar = tqdm(total=batches.total, desc="compare", unit="image", leave=False, disable=hidden)
    with bar, evaluating([model, *models.values()]), torch.no_grad():
        for batch in batches:
            dense = outputs_of(model, batch, "the dense model")
            for name, converted in models.items():
                tally.add(name, dense, outputs_of(converted, batch, called(name)), batch.names)
            tally.images += len(batch.names)
            bar.update(len(batch.names))
    return tally.comparison()


def check_models(model: Any, models: Mapping[str, Any]) -> None:
    """Refuse what is no model.

    Raises:
        InputError: One is not, or there is none beside the dense model.
    """
    if not models:
        raise InputError("compare: there is no converted model; give what idlefx.convert returns")
    for each in (model, *models.values()):
        if not callable(each):
            raise InputError(f"compare: a {type(each).__name__} is no model; give what idlefx.convert returns")


def facts_of(model: Any, models: Mapping[str, Any]) -> ModelFacts | None:
    """What is known of the images: of a conversion, of an artifact, or else of the library that the model is from."""
    for converted in models.values():
        if isinstance(facts := getattr(converted, "facts", None), ModelFacts):
            return facts
        with suppress(InputError):
            return conversion_of(converted).facts
    with suppress(InputError):
        return guess_inputs(unwrapped(model))[1]
    return None


def takes_byte_images(converted: Any) -> bool:
    """Whether a converted model or artifact takes `uint8` and normalises by itself."""
    with suppress(InputError):
        return takes_bytes(conversion_of(converted).evaluation.source)
    return bool(getattr(converted, "dtype", None) == torch.uint8)  # of an artifact


def class_counts(model: Any, facts: ModelFacts | None) -> set[int]:
    """How many classes the model says it has, in the words of its library."""
    with suppress(InputError):
        model = unwrapped(model)
    said = [getattr(model, "num_classes", None), getattr(getattr(model, "config", None), "num_labels", None)]
    names = facts.classes if facts else None
    return {count for count in (*said, names and len(names)) if isinstance(count, int)}
