"""The residual stream after the last block, as one more output that is compared with the dense model's."""

import warnings
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from idlefx.errors import InputError
from idlefx.pipeline import convert
from idlefx.reporting.comparison.image_batches import ImageBatch
from idlefx.reporting.comparison.model_calls import placed
from idlefx.reporting.comparison.named_outputs import named_outputs
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.variants import with_stream

STREAM = "stream"  # the name that it has among the outputs


def dense_with_stream(dense: nn.Module, idle: IdleModule, images: ImageBatch) -> IdleModule:
    """The dense model, which returns its stream too; it shares the parameters.

    Args:
        dense: The model as it was, in eval mode.
        idle: What `convert` made of it.
        images: Some, to trace it with.

    Raises:
        InputError: It is not known where the tokens of the last block stand.
    """
    keep_all = replace(conversion_of(idle).options, keep=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was all said when `idle` was converted
        traced = convert(dense, plan=keep_all, example_inputs=placed(images.inputs, dense), copy=False)
    return with_stream(traced.eval())


def named_with_stream(output: Any) -> dict[str, Tensor]:
    """The tensors by name that a model `with_stream` returns.

    Raises:
        InputError: One of the model's own outputs has the name already.
    """
    own, stream = output
    named = named_outputs(own)
    if STREAM in named:
        raise InputError(
            f"settings: stream is to be an output of that name, but the model returns a `{STREAM}` of its own; leave "
            "it out, or wrap the model so that it calls its output otherwise"
        )
    return {**named, STREAM: stream}
