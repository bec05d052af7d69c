"""How far candidates are from the dense model on some pictures: the measure of `compare`, as one number."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from idlefx.errors import InputError
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import evaluating, outputs_of
from idlefx.reporting.comparison.record import Comparison, OutputChange
from idlefx.reporting.comparison.tally import Tally, called

DENSE = "the dense model"


class Scorer:
    """Holds models beside the dense one on the same pictures.

    Args:
        dense: The dense model.
        batches: The pictures.
        classes: How many classes the model says it has, by which logits are known.
        keep: Whether what the dense model returns is kept, so that it runs only once.
    """

    def __init__(
        self, dense: nn.Module, batches: Sequence[ImageBatch], classes: Collection[int] = (), *, keep: bool = False
    ) -> None:
        self.dense, self.batches, self.classes = dense, batches, set(classes)
        self.kept = list(self._run()) if keep else None

    def __call__(self, models: Mapping[str, nn.Module]) -> Comparison:
        """What the models change, all of them on one batch after the other.

        Raises:
            InputError: One fails on the pictures.
        """
        tally = Tally(list(models), None, self.classes)
        with evaluating([self.dense, *models.values()]), torch.no_grad():
            for batch, dense in zip(self.batches, self.kept or self._run(), strict=True):
                for name, model in models.items():
                    tally.add(name, dense, outputs_of(model, batch, called(name)), batch.names)
                tally.images += len(batch.names)
        return tally.comparison()

    def _run(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            with evaluating([self.dense]), torch.no_grad():
                outputs = outputs_of(self.dense, batch, DENSE)
            yield outputs

    def digest(self) -> dict[str, str]:
        """A few digits of every output, by which other pictures or weights are noticed."""
        outputs = list(self.kept or self._run())
        return {name: f"{sum(float(each[name].double().mean()) for each in outputs):.5g}" for name in outputs[0]}

    def telling(self) -> tuple[str, ...]:
        """The outputs by which plans can be judged: those that differ from picture to picture.

        Whole numbers, such as the number of the highest class, jump; they count only where there is nothing else.

        Raises:
            InputError: There is none.
        """
        outputs = list(self.kept or self._run())
        by_name = {name: [each[name] for each in outputs] for name in outputs[0]}
        varied = [name for name, parts in by_name.items() if _varies(parts, self.batches)]
        if not varied:
            raise InputError(
                f"plan images: the dense model returns the same for all of them ({', '.join(by_name)}), so no plan is "
                "better than another; give pictures of different things, made ready as the model takes them"
            )
        return tuple(name for name in varied if by_name[name][0].is_floating_point()) or tuple(varied)


def change_of(outputs: Mapping[str, OutputChange], telling: Collection[str]) -> float:
    """How much a model changes: 1 − cosine to the dense output, the mean over pictures and outputs.

    For whole numbers it is the share of values that are other ones.
    """
    likeness = [
        change.cosine if change.cosine is not None else change.same_values
        for name, change in outputs.items()
        if name in telling
    ]
    return 1 - sum(each or 0.0 for each in likeness) / len(likeness)


def worst_of(outputs: Mapping[str, OutputChange], telling: Collection[str]) -> tuple[str, OutputChange]:
    """The output whose worst picture is changed most."""
    return min(((name, outputs[name]) for name in telling), key=lambda pair: pair[1].worst)


def _varies(parts: Sequence[Tensor], batches: Sequence[ImageBatch]) -> bool:
    """Whether an output has an entry for each picture, and these are not all the same."""
    if any(part.ndim == 0 or len(part) != len(b.names) for part, b in zip(parts, batches, strict=True)):
        return False
    first = parts[0][:1]
    rows = chain.from_iterable(part.split(1) for part in parts)
    return any(row.shape != first.shape or not torch.allclose(row, first, rtol=1e-6, atol=0) for row in rows)
