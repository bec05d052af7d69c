"""The modes of a model's parts."""

from torch import nn


class Modes:
    """In which mode each part of a model is: while the whole is in its present mode, the parts are in theirs.

    Attributes:
        training: The mode of the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.training = model, model.training
        self._parts = {part: part.training for part in model.modules()}

    @property
    def mixed(self) -> bool:
        """Whether any part is in another mode than the whole."""
        return set(self._parts.values()) != {self.training}

    def switch(self, training: bool) -> nn.Module:
        """The model in train or eval mode; its parts in their own modes where it is in that mode now."""
        self._model.train(training)
        if self.mixed and training == self.training:
            self.restore()
        return self._model

    def restore(self) -> None:
        """Put all parts into the modes that they were in."""
        for part, training in self._parts.items():
            part.training = training

    def apart(self) -> str:
        """The names of the outermost parts that are in another mode than the whole, the first three of them."""
        names: list[str] = []
        for name, part in self._model.named_modules():
            inside = any(name.startswith(outer + ".") for outer in names)
            if self._parts[part] != self.training and not inside:
                names.append(name)
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(f"`{name}`" for name in names[:3]) + rest
