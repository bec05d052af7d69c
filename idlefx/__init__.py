"""idlefx: make any trained Vision Transformer cheaper without dropping a token."""

from idlefx.deploy.artifacts import Artifact, load, package
from idlefx.deploy.bundle import emit
from idlefx.deploy.inductor import compile
from idlefx.deploy.torch_compile import register as _register_backend
from idlefx.errors import (
    ArtifactError,
    BlockError,
    CaptureError,
    IdleFxError,
    InputError,
    PassError,
    PlanError,
    UnknownOperation,
)
from idlefx.pipeline import convert, inspect, with_cut_loss
from idlefx.planning.selectors import selector
from idlefx.records import Block, BlockTable, Plan, Step
from idlefx.reporting.cost_report import Report, report
from idlefx.reporting.token_map import draw
from idlefx.runtime.module import IdleModule
from idlefx.utils.versions import VERSION

__version__ = VERSION
__all__ = [
    "Artifact", "ArtifactError", "Block", "BlockError", "BlockTable", "CaptureError", "IdleFxError", "IdleModule",
    "InputError", "PassError", "Plan", "PlanError", "Report", "Step", "UnknownOperation", "compile", "convert", "draw",
    "emit", "inspect", "load", "package", "report", "selector", "with_cut_loss",
]  # fmt: skip

_register_backend()
