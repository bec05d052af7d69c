"""A converted model and its teacher as one module that returns a loss, for training loops of somebody else."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from idlefx.errors import InputError
from idlefx.reporting.comparison.image_batches import ImageBatches
from idlefx.reporting.comparison.model_calls import evaluating
from idlefx.runtime.module import IdleModule, conversion_of, converted
from idlefx.training.output_distances import IDLE, OutputDistances
from idlefx.training.streams import dense_with_stream
from idlefx.variants import with_stream


class Taught(nn.Module):
    """Called like the model, it returns `{"loss": …, "output": …}`: how far all outputs are from the dense model's.

    The loss is the one that `finetune` minimises without labels: for every output a distance that suits its shape,
    divided by what it is before training, so that their mean begins at 1. Trained are the weights of the converted
    model; the dense one is held out of parameters, state and modes.

    Args:
        dense: The dense model; it is only called, in eval mode.
        idle: What `convert` made of a copy of it.
        images: Some to begin with, as `compare` takes them: a tensor, a dict of keyword inputs, a loader.
        limit: The most images to look at in the beginning.
        distance: "cosine", "squared" or "kl" for outputs that are named here.
        weight: How much outputs count that are named here.
        stream: Whether the tokens after the last block are compared too, as an output named `stream`. What is trained
            then is `taught.idle`, which shares the parameters of `idle`; move both models to their device before.

    Raises:
        InputError: There are no images, the outputs cannot be compared, or are the dense model's already.
    """

    def __init__(
        self,
        dense: nn.Module,
        idle: IdleModule,
        images: Any,
        *,
        limit: int = 32,
        distance: Mapping[str, str] | None = None,
        weight: Mapping[str, float] | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.idle = with_stream(idle) if stream else converted(idle)
        self.stream = stream
        batches = ImageBatches(images, conversion_of(idle).facts, limit, limit)
        with evaluating([dense, self.idle]):
            first = next(iter(batches), None)
            if first is None:
                raise InputError("finetune: there are no images to begin with")
            if stream:
                dense = dense_with_stream(dense, idle, first)
            self._teacher = (dense,)  # in a tuple, where a module does not look for modules
            self.outputs = OutputDistances(dense, self.idle, first, distance or {}, weight or {}, stream=stream)
            tally = self.outputs.tally()
            values = self.outputs.of_images(self.idle, first, tally)
        self.outputs.divide_by(self.outputs.before(values, tally.comparison().changes[IDLE]))
        if not any(self.outputs.scales.values()):
            raise InputError("finetune: the outputs are those of the dense model already; there is nothing to tune")

    def train(self, mode: bool = True) -> "Taught":
        """Remember the mode; the model itself runs as in eval mode, as the dense one does."""
        self.training = mode
        self.idle.eval()
        return self

    def forward(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """The loss of a batch, and what the converted model returns for it."""
        (dense,) = self._teacher
        output = self.idle(*args, **inputs)
        with evaluating([dense]):
            distances = self.outputs.of_batch(output, inputs or args)
        loss: Tensor = self.outputs.together(distances)
        return {"loss": loss, "output": output[0] if self.stream else output}
