"""The objective without labels: every output of the converted model shall be what the dense model's is."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from idlefx.capture.inputs import call
from idlefx.errors import InputError
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import placed
from idlefx.reporting.comparison.record import OutputChange
from idlefx.reporting.comparison.tally import Tally
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import Settings
from idlefx.training.gain import Gain
from idlefx.training.given_batches import Batches
from idlefx.training.lowering import Lowering
from idlefx.training.output_distances import IDLE, OutputDistances
from idlefx.training.streams import dense_with_stream
from idlefx.variants import with_cut_loss, with_stream


class Distillation:
    """The weighted mean of the distances of all outputs, and perhaps the token cut loss; measured on held-out images.

    The student runs as in eval mode, without dropout and with the statistics of its norms as they are: what it shall
    be like is the dense model as it is used.

    Args:
        dense: The dense model, in eval mode.
        idle: The converted one, in eval mode.
        val: Held-out images.
        settings: How to train; of outputs that are named there, distance and weight are taken from there.
        gain: What is found on the held-out images.

    Raises:
        InputError: There is no held-out image; no output can be compared; the settings name one that is not there; or
            they ask for the stream after the last block, which cannot be had.
    """

    leaves_out = True

    def __init__(self, dense: nn.Module, idle: IdleModule, val: Batches, settings: Settings, gain: Gain) -> None:
        self.idle, self.val, self.settings, self.gain = idle, val, settings, gain
        first = next(iter(val.epoch()), None)
        if first is None:
            raise InputError("data: there are no held-out images; give more pictures, or hold out a larger share")
        self.cuts = bool(settings.w_cut) and conversion_of(idle).plan.idle == "rest"
        # Of a model what is compared: itself, or one of the same parameters that returns its stream too.
        self.compared: Callable[[IdleModule], IdleModule] = cache(with_stream) if settings.stream else _as_it_is
        student = self.compared(idle)
        prepared = with_cut_loss if self.cuts else _as_it_is
        self.student: nn.Module = prepared(student)
        self.lowering = Lowering(student, settings.keep_from, prepared) if settings.keep_from else None
        self.dense = dense_with_stream(dense, idle, first) if settings.stream else dense
        self.teacher: Any = self.dense
        self.outputs = OutputDistances(
            self.dense, student, first, settings.distance, settings.weight, stream=settings.stream
        )
        names = list(self.outputs.kinds)
        self.losses = ("loss", *names, *(["cut"] if self.cuts else []))
        self.measures = ("distance", "distance_error", *(f"held-out {name}" for name in names))

    def __str__(self) -> str:
        return "\n".join(map(str, filter(None, (self.outputs, self.lowering))))

    def student_of(self, step: int, steps: int) -> nn.Module:
        """The student, or one with higher keep ratios as long as these fall."""
        lowered = self.lowering.student(step, steps) if self.lowering else None
        return self.student if lowered is None else lowered

    def parts(self, model: nn.Module, batch: ImageBatch, step: int, steps: int) -> list[Tensor]:
        """What is minimised, the distance of each output, and the token cut loss if it counts."""
        inputs = placed(batch.inputs, self.idle)
        device = next(self.idle.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.amp):
            output = call(model, inputs)
            output, *cut = output if self.cuts else (output,)
            distances = self.outputs.of_batch(output, batch.inputs, self.teacher)
        total = self.outputs.together(distances)
        return [total + self.settings.cut_weight(step, steps) * sum(cut), *distances.values(), *cut]

    def begin(self, untuned: IdleModule) -> None:
        """Look at the untuned model: what its distances are is what they are divided by."""
        values, changes = self._looked_at(untuned)
        before = self.outputs.before(values, changes)
        self.outputs.divide_by(before)
        self.gain.begin(before, self._together(values), changes)

    @property
    def nothing_to_gain(self) -> bool:
        """Whether all outputs are the dense model's already."""
        return not any(self.outputs.scales.values())

    def look(self, model: IdleModule, step: int) -> tuple[dict[str, float], bool]:
        """Distances on the held-out images, and whether none were lower."""
        values, changes = self._looked_at(model)
        row, best = self.gain.note(step, self._together(values), changes)
        return row | {f"held-out {name}": sum(each) / len(each) for name, each in values.items()}, best

    def _together(self, values: Mapping[str, Sequence[float]]) -> list[float]:
        """For each image the weighted sum of its distances."""
        weights, images = self.outputs.weights().values(), zip(*values.values(), strict=True)
        return [sum(weight * value for weight, value in zip(weights, each, strict=True)) for each in images]

    def _looked_at(self, looked_at: IdleModule) -> tuple[dict[str, list[float]], dict[str, OutputChange]]:
        """The distances of each output, image by image, and how they compare; over all processes."""
        world, tally, model = self.val.world, self.outputs.tally(), self.compared(looked_at)
        hidden = None if world.leads else True
        values: dict[str, list[float]] = {name: [] for name in self.outputs.kinds}
        for batch in tqdm(self.val.epoch(), "evaluate", leave=False, delay=3, disable=hidden):
            for name, each in self.outputs.of_images(model, batch, tally).items():
                values[name] += each
        self.val.agree()
        comparison = Tally.joined(world.lists([tally])).comparison()
        return {name: world.lists(each) for name, each in values.items()}, dict(comparison.changes[IDLE])

    def compile(self) -> None:
        """Compile the teacher, which itself stays as it is."""
        self.teacher = torch.compile(self.dense)

    def state(self) -> dict[str, Any]:
        """What was looked at."""
        return self.gain.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.gain.restore(state)
        self.outputs.divide_by(self.gain.distances)


def _as_it_is(model: IdleModule) -> IdleModule:
    return model
