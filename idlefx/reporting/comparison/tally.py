"""What the batches of a comparison come to, output by output: which can be compared, and which are logits."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from idlefx.errors import InputError
from idlefx.reporting.comparison.differences import Difference
from idlefx.reporting.comparison.image_batches import Name
from idlefx.reporting.comparison.record import Comparison

LOGITS = "logits"  # what the name of an output that is logits contains


class Tally:
    """The differences so far, of every output of every converted model.

    Args:
        models: Names of the converted models.
        logits: Names of the outputs that are logits; None finds them.
        classes: How many classes the model may have.

    Attributes:
        images: How many images were taken in of all models.
    """

    def __init__(self, models: Sequence[str], logits: Sequence[str] | None, classes: set[int]) -> None:
        self.logits, self.classes, self.images = logits, classes, 0
        self.differences: dict[str, dict[str, Difference]] = {name: {} for name in models}
        self.left_out: tuple[str, ...] = ()

    def add(
        self, model: str, dense: Mapping[str, Tensor], converted: Mapping[str, Tensor], names: Sequence[Name]
    ) -> None:
        """Take in what the dense and one converted model returned for a batch.

        Args:
            model: Name of the converted model.
            dense: Outputs of the dense one.
            converted: Of the other.
            names: Of the images.

        Raises:
            InputError: They are not alike, or none has an entry for each image.
        """
        _check_alike(dense, converted, called(model))
        if not self.images:
            self._begin(model, dense, len(names))
        for name, difference in self.differences[model].items():
            if len(dense[name]) != len(names):
                raise InputError(
                    f"compare: output `{name}` has {len(dense[name])} entries for {len(names)} images, but one for "
                    "each in the first batch; it has none by image, so take another batch_size"
                )
            difference.add(dense[name], converted[name], names)

    def _begin(self, model: str, dense: Mapping[str, Tensor], images: int) -> None:
        """Find out from the first batch what can be compared."""
        by_image = {name: output for name, output in dense.items() if _is_by_image(output, images)}
        self.left_out = tuple(name for name in dense if name not in by_image)
        if not by_image:
            shapes = ", ".join(f"`{name}` {tuple(output.shape)}" for name, output in dense.items())
            raise InputError(
                f"compare: no output has an entry for each of {images} images: {shapes}; wrap the models so that they "
                "return tensors, batch first"
            )
        able = {name for name, output in by_image.items() if _may_be_logits(output)}
        if self.logits is not None and (unable := [name for name in self.logits if name not in able]):
            raise InputError(
                f"compare: logits={unable[0]!r} is no output (B, classes); such are: "
                f"{', '.join(sorted(able)) or 'none'}"
            )
        for name, output in by_image.items():
            is_logits = name in able and self._are_logits(name, output.shape[1])
            self.differences[model][name] = Difference(
                output.shape[1:], exact=not output.is_floating_point(), logits=is_logits
            )

    def _are_logits(self, name: str, width: int) -> bool:
        if self.logits is not None:
            return name in self.logits
        return LOGITS in name.rpartition(".")[2] or width in self.classes

    @classmethod
    def joined(cls, tallies: Sequence["Tally"]) -> "Tally":
        """One of what several processes took in, each of images of its own."""
        filled = [tally for tally in tallies if tally.images] or list(tallies[:1])
        whole = filled[0]
        for tally in filled[1:]:
            whole.images += tally.images
            for model, differences in tally.differences.items():
                for name, difference in differences.items():
                    whole.differences[model][name].join(difference)
        return whole

    def comparison(self) -> Comparison:
        """The record of all of it.

        Raises:
            InputError: There was no image.
        """
        if not self.images:
            raise InputError("images: there are none to compare on; a generator that was read before is empty")
        changes = {
            model: {name: difference.change() for name, difference in differences.items()}
            for model, differences in self.differences.items()
        }
        return Comparison(changes, self.images, self.left_out)


def called(model: str) -> str:
    """What a converted model is called in an error."""
    return f"the converted model `{model}`"


def _is_by_image(output: Tensor, images: int) -> bool:
    return output.ndim > 0 and len(output) == images and output.numel() > 0


def _may_be_logits(output: Tensor) -> bool:
    return output.is_floating_point() and output.ndim == 2 and output.shape[1] > 1


def _check_alike(dense: Mapping[str, Tensor], converted: Mapping[str, Tensor], who: str) -> None:
    if dense.keys() != converted.keys():
        raise InputError(
            f"compare: {who} returns {', '.join(converted)}, the dense model {', '.join(dense)}; compare models that "
            "return the same"
        )
    for name, output in dense.items():
        other = converted[name]
        if output.shape != other.shape or output.is_floating_point() != other.is_floating_point():
            raise InputError(
                f"compare: output `{name}` is {_told(other)} of {who}, {_told(output)} of the dense model; compare "
                "models that return the same"
            )


def _told(output: Tensor) -> str:
    kind = "numbers" if output.is_floating_point() else "whole numbers or truth values"
    return f"{tuple(output.shape)} {kind}"
