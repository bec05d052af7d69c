"""Which outputs are compared with the dense model's, how, and how much each of them counts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idlefx.capture.inputs import call
from idlefx.errors import InputError
from idlefx.reporting.comparison.compare import class_counts
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import outputs_of, placed
from idlefx.reporting.comparison.named_outputs import named_outputs
from idlefx.reporting.comparison.record import OutputChange
from idlefx.reporting.comparison.tally import Tally
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.distances import DISTANCES, distance_for
from idlefx.training.streams import STREAM, named_with_stream

SAME = 1e-4  # relative difference up to which an output is the dense model's, and has nothing to learn
IDLE = "idle"


class OutputDistances:
    """For every output a distance to the dense model's, divided by what it was before training.

    Args:
        dense: The dense model, in eval mode.
        idle: The converted one, in eval mode.
        first: Images, by which the outputs are known.
        distance: Of outputs that are named here the distance, instead of the one that suits its shape.
        weight: How much outputs count that are named here; the others count 1.
        stream: Whether both models return the stream after the last block beside their outputs (`with_stream`).

    Attributes:
        kinds: Of each output that is compared, its distance.
        left_out: Outputs that are not, and why.

    Raises:
        InputError: No output can be compared, or one is named that is not there.
    """

    def __init__(
        self,
        dense: nn.Module,
        idle: IdleModule,
        first: ImageBatch,
        distance: Mapping[str, str],
        weight: Mapping[str, float],
        *,
        stream: bool = False,
    ) -> None:
        self.dense, self.idle, self.weight = dense, idle, dict(weight)
        self.named = named_with_stream if stream else named_outputs
        self.classes = class_counts(dense, conversion_of(idle).facts)
        tally = self.tally()
        with torch.no_grad(), speaking_of_finetuning():
            outputs = outputs_of(dense, first, "the dense model", self.named)
            tally.add(IDLE, outputs, outputs_of(idle, first, "the converted model", self.named), first.names)
        blocks = conversion_of(idle).blocks
        counts = {count for block in blocks for count in (block.tokens, block.image_tokens)}
        self.kinds, self.left_out = dict[str, str](), dict.fromkeys(tally.left_out, "it has no entry for each image")
        for name, difference in tally.differences[IDLE].items():
            if difference.exact:
                self.left_out[name] = "it holds whole numbers or truth values"
            else:
                suits = distance_for(difference.shape, logits=difference.logits, token_counts=counts)
                if stream and name == STREAM:  # which may stand on a grid
                    suits = "cosine"
                self.kinds[name] = distance.get(name, suits)
        for name in (*distance, *weight):
            if name not in self.kinds:
                raise InputError(
                    f"settings: {name} is no output that can be tuned; such are: {', '.join(self.kinds) or 'none'}"
                )
        if not self.kinds:
            told = "; ".join(f"`{name}`: {why}" for name, why in self.left_out.items())
            raise InputError(f"finetune: the model has no output that can be tuned ({told}); wrap it to return some")
        self.scales = dict.fromkeys(self.kinds, 1.0)

    def __str__(self) -> str:
        compared = ", ".join(f"{self._told(name)} by {kind}" for name, kind in self.kinds.items())
        told = f"without labels: outputs shall be those of the dense model: {compared}"
        return told + "".join(f"\nleft out is `{name}`: {why}" for name, why in self.left_out.items())

    def _told(self, name: str) -> str:
        last = " (after the last block, token by token)" if self.named is named_with_stream and name == STREAM else ""
        return f"`{name}`{last}"

    def tally(self) -> Tally:
        """An empty one, for the outputs of these models."""
        return Tally([IDLE], None, self.classes)

    def divide_by(self, before: Mapping[str, float]) -> None:
        """Take down what the distances are before training; those of 0 count no more."""
        self.scales = {name: 1 / distance if distance else 0.0 for name, distance in before.items()}

    def weights(self) -> dict[str, float]:
        """What distances are multiplied with, so that their sum is 1 before training."""
        asked = {name: self.weight.get(name, 1.0) for name in self.kinds if self.scales[name]}
        total = sum(asked.values()) or 1.0
        return {name: asked.get(name, 0.0) * self.scales[name] / total for name in self.kinds}

    def of_batch(self, output: Any, inputs: Any, teacher: Any = None) -> dict[str, Tensor]:
        """The distances, in the mean over a batch.

        Args:
            output: Of the student.
            inputs: The batch, for the dense model.
            teacher: What is run in the place of the dense model, such as a compiled one.

        Raises:
            InputError: The outputs have other names than before.
        """
        with torch.no_grad():
            dense = self.named(call(teacher or self.dense, placed(inputs, self.dense)))
        student = self.named(output)
        if student.keys() != dense.keys() or not self.kinds.keys() <= dense.keys():
            raise InputError(
                f"finetune: for a batch the dense model returned {', '.join(dense)}, the converted one "
                f"{', '.join(student)}, and at first they returned {', '.join([*self.kinds, *self.left_out])}; tune a "
                "model that always returns the same"
            )
        return {
            name: DISTANCES[kind](student[name], dense[name].to(student[name].device)).mean()
            for name, kind in self.kinds.items()
        }

    def together(self, distances: Mapping[str, Tensor]) -> Tensor:
        """Their weighted sum, 1 before training.

        Raises:
            InputError: It depends on nothing that is trained.
        """
        total = torch.stack([weight * distances[name] for name, weight in self.weights().items()]).sum()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise InputError("finetune: no output depends on what is trained; see that parameters require gradients")
        return total

    @torch.no_grad()
    def of_images(self, model: nn.Module, batch: ImageBatch, tally: Tally) -> dict[str, list[float]]:
        """The distances of a model, image by image, and its outputs into a tally.

        Raises:
            InputError: A model fails, or its outputs are not alike, or hold what is no finite number.
        """
        with speaking_of_finetuning():
            dense = outputs_of(self.dense, batch, "the dense model", self.named)
            other = outputs_of(model, batch, "the converted model", self.named)
            tally.add(IDLE, dense, other, batch.names)
        tally.images += len(batch.names)
        return {
            name: DISTANCES[kind](other[name], dense[name].to(other[name].device)).tolist()
            for name, kind in self.kinds.items()
        }

    def before(self, values: Mapping[str, list[float]], changes: Mapping[str, OutputChange]) -> dict[str, float]:
        """The distances before training, from those of each image; 0 for what is the dense model's already."""
        means = {name: sum(each) / len(each) for name, each in values.items()}
        same = {name for name, change in changes.items() if (change.relative_difference or 0.0) <= SAME}
        return {name: 0.0 if name in same else mean for name, mean in means.items()}


@contextmanager
def speaking_of_finetuning() -> Iterator[None]:
    """Let what a comparison refuses be refused in the name of fine-tuning."""
    try:
        yield
    except InputError as refusal:
        raise InputError(str(refusal).replace("compare:", "finetune:", 1)) from refusal
