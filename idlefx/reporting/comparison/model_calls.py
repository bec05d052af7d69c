"""Call a model on a batch of images: in eval mode, where it is and in its number type, and hold what it returns."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from idlefx.capture.inputs import call
from idlefx.errors import IdleFxError, InputError, first_line
from idlefx.reporting.comparison.differences import numbers
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.named_outputs import named_outputs

Model = Callable[..., Any]


@contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Let models be in eval mode meanwhile; then each of their parts is in the mode it was in."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes.items():  # what holds others comes before them
            if part.training != training:
                part.train(training)  # a converted model has a graph for each mode


def outputs_of(
    model: Model, batch: ImageBatch, who: str, named: Callable[[Any], Mapping[str, Tensor]] = named_outputs
) -> dict[str, Tensor]:
    """What a model returns for a batch: its tensors by name, as `numbers` makes them.

    Args:
        model: The model.
        batch: Images.
        who: What the model is called in a refusal.
        named: What gives the tensors of an output their names.

    Raises:
        InputError: It fails, or returns no tensor, or something that is no finite number.
    """
    try:
        output = call(model, placed(batch.inputs, model))
    except IdleFxError:
        raise
    except Exception as error:  # whatever the user's code, or torch inside it, raises
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(batch.inputs) if isinstance(t, Tensor))
        raise InputError(
            f"compare: {who} fails on images of shape {shapes}: {type(error).__name__}: {first_line(error)}; give what "
            "it takes, images of its size and normalised, and no more of them at once (batch_size) than fit in memory"
        ) from error
    tensors = {name: numbers(tensor) for name, tensor in named(output).items()}
    if not tensors:
        raise InputError(
            f"compare: {who} returns a {type(output).__name__} without tensors; wrap it so that it returns some"
        )
    for name, tensor in tensors.items():
        _check_finite(tensor, f"output `{name}` of {who}", batch)
    return tensors


def placed(inputs: Any, model: Model) -> Any:
    """A copy of the inputs where the model is, and in its number type where they are of floating point."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    told: Any = next((tensor for tensor in tensors if tensor.is_floating_point()), model)  # an artifact says it itself
    device, dtype = (getattr(told, name, None) for name in ("device", "dtype"))

    def placed(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() and isinstance(dtype, torch.dtype) else tensor.dtype
        return tensor.to(device if isinstance(device, torch.device) else tensor.device, kind, copy=True)

    return tree_map_only(Tensor, placed, inputs)


def _check_finite(output: Tensor, what: str, batch: ImageBatch) -> None:
    if output.isfinite().all():
        return
    images = len(batch.names) if output.ndim and len(output) == len(batch.names) else 1
    bad = (~output.isfinite()).reshape(images, -1).any(1)
    raise InputError(
        f"compare: {what} holds {'NaN' if output.isnan().any() else 'infinity'}, first for image "
        f"{batch.names[int(bad.int().argmax())]}; look at this image and at the weights, and if half precision "
        "overflows, compare in float32"
    )
