"""The objective without labels: every output of the converted model shall be what the dense model's is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from idlefx.capture.inputs import call
from idlefx.errors import InputError
from idlefx.pipeline import with_cut_loss
from idlefx.reporting.comparison.compare import class_counts
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import outputs_of, placed
from idlefx.reporting.comparison.named_outputs import named_outputs
from idlefx.reporting.comparison.record import OutputChange
from idlefx.reporting.comparison.tally import Tally
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import Settings
from idlefx.training.distances import DISTANCES, distance_for
from idlefx.training.gain import Gain
from idlefx.training.given_batches import Batches

SAME = 1e-4  # relative difference up to which an output is the dense model's, and has nothing to learn
TUNED = "tuned"


class Distillation:
    """For every output a distance to the dense model's, divided by what it was before training; and their mean.

    The student runs as in eval mode, without dropout and with the statistics of its norms as they are: what it shall
    be like is the dense model as it is used.

    Args:
        dense: The dense model, in eval mode.
        idle: The converted one, in eval mode.
        val: Held-out images.
        settings: How to train; of outputs that are named there, distance and weight are taken from there.
        gain: What is found on the held-out images.

    Attributes:
        kinds: Of each output that is compared, its distance.
        left_out: Outputs that are not, and why.

    Raises:
        InputError: There is no held-out image; no output can be compared; or the settings name one that is not there.
    """

    leaves_out = True

    def __init__(self, dense: nn.Module, idle: IdleModule, val: Batches, settings: Settings, gain: Gain) -> None:
        self.dense, self.idle, self.val, self.settings, self.gain = dense, idle, val, settings, gain
        self.teacher: Any = dense
        self.classes = class_counts(dense, conversion_of(idle).facts)
        self.cuts = bool(settings.w_cut) and conversion_of(idle).plan.idle == "rest"
        self.student: nn.Module = with_cut_loss(idle) if self.cuts else idle
        self.kinds, self.left_out = self._choose_distances()
        self.scales = dict.fromkeys(self.kinds, 1.0)
        self.losses = ("loss", *self.kinds, *(["cut"] if self.cuts else []))
        self.measures = ("distance", "distance_error", *(f"held-out {name}" for name in self.kinds))

    def _choose_distances(self) -> tuple[dict[str, str], dict[str, str]]:
        first = next(iter(self.val.epoch()), None)
        if first is None:
            raise InputError("data: there are no held-out images; give more pictures, or hold out a larger share")
        tally = self._tally()
        with torch.no_grad(), _speaking():
            outputs = outputs_of(self.dense, first, "the dense model")
            tally.add(TUNED, outputs, outputs_of(self.idle, first, "the converted model"), first.names)
        blocks = conversion_of(self.idle).blocks
        counts = {count for block in blocks for count in (block.tokens, block.image_tokens)}
        kinds, left_out = dict[str, str](), dict.fromkeys(tally.left_out, "it has no entry for each image")
        for name, difference in tally.differences[TUNED].items():
            if difference.exact:
                left_out[name] = "it holds whole numbers or truth values"
                continue
            found = distance_for(difference.shape, logits=difference.logits, token_counts=counts)
            kinds[name] = self.settings.distance.get(name, found)
        for name in (*self.settings.distance, *self.settings.weight):
            if name not in kinds:
                raise InputError(
                    f"settings: {name} is no output that can be tuned; such are: {', '.join(kinds) or 'none'}"
                )
        if not kinds:
            told = "; ".join(f"`{name}`: {why}" for name, why in left_out.items())
            raise InputError(f"finetune: the model has no output that can be tuned ({told}); wrap it to return some")
        return kinds, left_out

    def __str__(self) -> str:
        compared = ", ".join(f"`{name}` by {kind}" for name, kind in self.kinds.items())
        told = f"without labels: outputs shall be those of the dense model: {compared}"
        return told + "".join(f"\nleft out is `{name}`: {why}" for name, why in self.left_out.items())

    def parts(self, model: nn.Module, batch: ImageBatch, step: int, steps: int) -> list[Tensor]:
        """The weighted mean of all distances, each of them, and the token cut loss if it counts."""
        with torch.no_grad():
            dense = named_outputs(call(self.teacher, placed(batch.inputs, self.dense)))
        inputs = placed(batch.inputs, self.idle)
        device = next(self.idle.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.amp):
            output = call(model, inputs)
        output, *cut = output if self.cuts else (output,)
        student = named_outputs(output)
        if student.keys() != dense.keys() or not self.kinds.keys() <= dense.keys():
            raise InputError(
                f"finetune: for a batch the dense model returned {', '.join(dense)}, the converted one "
                f"{', '.join(student)}, and at first they returned {', '.join([*self.kinds, *self.left_out])}; tune a "
                "model that always returns the same"
            )
        distances = [
            DISTANCES[kind](student[name], dense[name].to(device).detach()).mean() for name, kind in self.kinds.items()
        ]
        total = torch.stack([self._weight(n) * d for n, d in zip(self.kinds, distances, strict=True)]).sum()
        if not total.requires_grad:
            raise InputError("finetune: no output depends on what is trained; see that parameters require gradients")
        return [total + self.settings.cut_weight(step, steps) * sum(cut), *distances, *cut]

    def _weight(self, name: str) -> float:
        """What a distance is multiplied with, so that the weighted mean is 1 before training."""
        asked = {each: self.settings.weight.get(each, 1.0) for each in self.kinds if self.scales[each]}
        return asked.get(name, 0.0) * self.scales[name] / (sum(asked.values()) or 1.0)

    def begin(self, untuned: IdleModule) -> None:
        """Look at the untuned model: what its distances are is what they are divided by."""
        values, changes = self._looked_at(untuned)
        distances = {name: sum(each) / len(each) for name, each in values.items()}
        for name, change in changes.items():
            if name in distances and (change.relative_difference or 0.0) <= SAME:
                distances[name] = 0.0
        self._divide_by(distances)
        self.gain.begin(distances, self._together(values), changes)

    @property
    def nothing_to_gain(self) -> bool:
        """Whether all outputs are the dense model's already."""
        return not any(self.scales.values())

    def look(self, model: IdleModule, step: int) -> tuple[dict[str, float], bool]:
        """Distances on the held-out images, and whether none were lower."""
        values, changes = self._looked_at(model)
        row, best = self.gain.note(step, self._together(values), changes)
        return row | {f"held-out {name}": sum(each) / len(each) for name, each in values.items()}, best

    def _divide_by(self, distances: Mapping[str, float]) -> None:
        self.scales = {name: 1 / distance if distance else 0.0 for name, distance in distances.items()}

    def _together(self, values: Mapping[str, Sequence[float]]) -> list[float]:
        """For each image the weighted mean of its distances."""
        weights = {name: self._weight(name) for name in values}
        images = zip(*values.values(), strict=True)
        return [sum(w * v for w, v in zip(weights.values(), each, strict=True)) for each in images]

    def _tally(self) -> Tally:
        return Tally([TUNED], None, self.classes)

    @torch.no_grad()
    def _looked_at(self, model: IdleModule) -> tuple[dict[str, list[float]], dict[str, OutputChange]]:
        """The distances of each output, image by image, and how they compare; over all processes."""
        world, tally = self.val.world, self._tally()
        hidden = None if world.leads else True
        values: dict[str, list[float]] = {name: [] for name in self.kinds}
        with _speaking():
            for batch in tqdm(self.val.epoch(), "evaluate", leave=False, delay=3, disable=hidden):
                dense = outputs_of(self.dense, batch, "the dense model")
                other = outputs_of(model, batch, "the converted model")
                tally.add(TUNED, dense, other, batch.names)
                tally.images += len(batch.names)
                for name, kind in self.kinds.items():
                    values[name] += DISTANCES[kind](other[name], dense[name].to(other[name].device)).tolist()
            self.val.agree()
            together = Tally.joined(world.lists([tally]))
            comparison = together.comparison()
        return {name: world.lists(each) for name, each in values.items()}, dict(comparison.changes[TUNED])

    def compile(self) -> None:
        """Compile the teacher, which itself stays as it is."""
        self.teacher = torch.compile(self.dense)

    def state(self) -> dict[str, Any]:
        """What was looked at."""
        return self.gain.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.gain.restore(state)
        self._divide_by(self.gain.distances)


@contextmanager
def _speaking() -> Iterator[None]:
    """Let what a comparison refuses be refused in the name of fine-tuning."""
    try:
        yield
    except InputError as refusal:
        raise InputError(str(refusal).replace("compare:", "finetune:", 1)) from refusal
