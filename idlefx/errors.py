"""The refusals: every error the tool raises on purpose."""


class IdleFxError(Exception):
    """Base of all refusals; its message says what is wrong, where, and what to do."""


class InputError(IdleFxError):
    """An argument, a file or a path that cannot be used."""


class MethodError(InputError, AttributeError):
    """A method of the original that its converted form does not have; `hasattr` says so too."""


class CaptureError(IdleFxError):
    """The model could not be traced."""


class BlockError(IdleFxError):
    """The graph holds no transformer block, or not the kind that was asked for."""


class PlanError(IdleFxError):
    """Layers, keep ratios, schedule or selector do not fit the model."""


class PassError(IdleFxError):
    """A pass left the graph in a state that breaks a promise; names the pass."""


class ParityError(IdleFxError):
    """A compiled or packaged model does not compute what the eager one does."""


class TrainingError(IdleFxError):
    """A training run that cannot go on."""


class ArtifactError(IdleFxError):
    """An artifact that cannot be made of this model, or cannot be used here."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says in its first line, or its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
