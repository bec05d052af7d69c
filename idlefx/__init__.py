"""idlefx: make any trained Vision Transformer cheaper without dropping a token."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from idlefx.errors import (
    ArtifactError,
    BlockError,
    CaptureError,
    IdleFxError,
    InputError,
    MethodError,
    ParityError,
    PassError,
    PlanError,
    TrainingError,
)

if TYPE_CHECKING:
    from idlefx.deploy.artifacts import Artifact, load, package
    from idlefx.deploy.bundle import emit
    from idlefx.deploy.inductor import compile
    from idlefx.options import PlanOptions
    from idlefx.pipeline import convert, inspect
    from idlefx.planning.model_plan import read_plan
    from idlefx.planning.selectors import selector
    from idlefx.records import Block, BlockTable, Plan, Step
    from idlefx.reporting.comparison.compare import compare
    from idlefx.reporting.comparison.record import Comparison, OutputChange
    from idlefx.reporting.cost_report import Report, report
    from idlefx.reporting.token_map import draw
    from idlefx.runtime.conversion import Conversion
    from idlefx.runtime.module import IdleModule
    from idlefx.search.plan import plan
    from idlefx.training.accuracy import Accuracy, Evaluation
    from idlefx.training.evaluation import evaluate
    from idlefx.variants import with_cut_loss

__version__: str
__all__ = [
    "Accuracy", "Artifact", "ArtifactError", "Block", "BlockError", "BlockTable", "CaptureError", "Comparison",
    "Conversion", "Evaluation", "IdleFxError", "IdleModule", "InputError", "MethodError", "OutputChange",
    "ParityError", "PassError", "Plan", "PlanError", "PlanOptions", "Report", "Step", "TrainingError", "compare",
    "compile", "convert", "draw", "emit", "evaluate", "inspect", "load", "package", "plan", "read_plan", "report",
    "selector", "with_cut_loss",
]  # fmt: skip

# A name is imported when it is first used: whoever only converts loads neither Matplotlib nor Inductor.
_HOMES = {
    "deploy.artifacts": ("Artifact", "load", "package"),
    "deploy.bundle": ("emit",),
    "deploy.inductor": ("compile",),
    "options": ("PlanOptions",),
    "pipeline": ("convert", "inspect"),
    "planning.model_plan": ("read_plan",),
    "planning.selectors": ("selector",),
    "records": ("Block", "BlockTable", "Plan", "Step"),
    "reporting.comparison.compare": ("compare",),
    "reporting.comparison.record": ("Comparison", "OutputChange"),
    "reporting.cost_report": ("Report", "report"),
    "reporting.token_map": ("draw",),
    "runtime.conversion": ("Conversion",),
    "runtime.module": ("IdleModule",),
    "search.plan": ("plan",),
    "training.accuracy": ("Accuracy", "Evaluation"),
    "training.evaluation": ("evaluate",),
    "variants": ("with_cut_loss",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("data", "finetune", "models", "passes")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("idlefx.utils.versions").VERSION
    if name in _SUBMODULES:
        return import_module(f"idlefx.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'idlefx' has no attribute {name!r}")
    value = getattr(import_module(f"idlefx.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _register_backend() -> None:
    """Make `torch.compile(backend="idlefx")` known in a checkout; an installed package tells torch by entry point."""
    known = {each.name: each.value for each in entry_points(group="torch_dynamo_backends")}
    if known.get("idlefx") != "idlefx.deploy.torch_compile:compile_idle":  # none, or that of an older installation
        from idlefx.deploy.torch_compile import register

        register()


_register_backend()
