"""idlefx: make any trained Vision Transformer cheaper without dropping a token."""

from idlefx.artifacts import Artifact, load, package
from idlefx.backend import compile
from idlefx.dynamo import register as _register_backend
from idlefx.emission import emit
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
from idlefx.module import IdleModule
from idlefx.picture import draw
from idlefx.pipeline import convert, inspect, with_cut_loss
from idlefx.records import Block, BlockTable, Plan, Step
from idlefx.report import Report, report
from idlefx.selectors import selector
from idlefx.versions import VERSION

__version__ = VERSION
__all__ = [
    "Artifact", "ArtifactError", "Block", "BlockError", "BlockTable", "CaptureError", "IdleFxError", "IdleModule",
    "InputError", "PassError", "Plan", "PlanError", "Report", "Step", "UnknownOperation", "compile", "convert", "draw",
    "emit", "inspect", "load", "package", "report", "selector", "with_cut_loss",
]  # fmt: skip

_register_backend()
