"""What a run minimises and measures: the part of fine-tuning that differs with and without labels."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from idlefx.runtime.module import IdleModule

Batch = TypeVar("Batch", contravariant=True)


class Objective(Protocol[Batch]):
    """Losses of a batch, and how well a model does on held-out images."""

    @property
    def losses(self) -> Sequence[str]:
        """Names of what `parts` returns; the first is what is minimised."""

    @property
    def measures(self) -> Sequence[str]:
        """Names of what `look` tells."""

    @property
    def student(self) -> nn.Module:
        """What is run in the place of the converted model, with its parameters."""

    def student_of(self, step: int, steps: int) -> nn.Module:
        """What is run in this step: the student, or one of the same parameters in which fewer tokens idle.

        Args:
            step: From 0.
            steps: Of the whole run.
        """

    @property
    def leaves_out(self) -> bool:
        """Whether the losses may leave trained parameters without a gradient."""

    def parts(self, model: nn.Module, batch: Batch, step: int, steps: int) -> list[Tensor]:
        """The losses of a batch, scalars in the order of `losses`.

        Args:
            model: The student, perhaps wrapped or compiled.
            batch: Of the training images.
            step: From 0.
            steps: Of the whole run.
        """

    def begin(self, untuned: IdleModule) -> None:
        """Look at the dense model and at the converted one before the first step."""

    def look(self, model: IdleModule, step: int) -> tuple[Mapping[str, float], bool]:
        """Look at the model after so many steps: the measures, and whether there was no better one before."""

    def compile(self) -> None:
        """Compile what is run beside the student."""

    def state(self) -> dict[str, Any]:
        """What a continued run needs to know of what was looked at."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
