"""Let a trace record every line of the model that led to an operation.

By itself torch.export records the frames of methods called `forward` alone. A refusal then names the line that calls
a helper, and not the line of the helper that is at fault.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary, StackSummary
from unittest.mock import patch

import torch
from torch.fx.proxy import TracerBase

_TORCH = f"{Path(torch.__file__).parent}/"


@contextlib.contextmanager
def every_line_of_the_model() -> Iterator[None]:
    """While it lasts, what is traced records the frames from the outermost `forward` inwards, torch's own left out.

    A torch that filters its frames in another way keeps what it records.
    """
    if not hasattr(TracerBase, "_filter_traceback_frames"):
        yield
        return
    with patch.object(TracerBase, "_filter_traceback_frames", lambda _, stack: _from_forward_on(stack)):
        yield


def _from_forward_on(stack: StackSummary) -> StackSummary:
    own: list[FrameSummary] = []
    for frame in stack:
        if not frame.filename.startswith(_TORCH) and (own or frame.name == "forward"):
            own.append(frame)
    return StackSummary.from_list(own)
