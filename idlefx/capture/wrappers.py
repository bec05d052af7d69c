"""What a model may be wrapped in when it is given: taken off where the model is inside, refused where it is not."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from idlefx.errors import InputError


def unwrapped(model: object) -> nn.Module:
    """The user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, in any order.

    Wrap the converted model anew; what the wrapper did is not carried over.

    Raises:
        InputError: There is no module, or it was compiled by torch.jit, and its code is gone.
    """
    from torch._dynamo import OptimizedModule

    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"capture: the model is a {type(model).__name__} of torch.jit, which no longer has the code that is to be "
            "traced; give the nn.Module that it was made from, and load its weights"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"capture: expected a torch.nn.Module, got {type(model).__name__}")
    return model
