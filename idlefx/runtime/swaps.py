"""What happened to the modules of a converted model since: looked at in each call, as its graph runs only some of them.

1. A linear layer, norm or convolution that the graph calls may become anything.
2. Where the graph reads a weight besides calling the layer, the layer must still be one whose output is what its weight
   says; pruned, parametrised and quantised weights are taken as they are then.
3. A container that was replaced is refused: what its graph reads from inside it would run, and what it does would not.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from idlefx.errors import InputError

RECOMPUTES = (BasePruningMethod, WeightNorm)  # hooks that make `weight` anew of what is trained, before each call
_SPECTRAL: Any = getattr(parametrizations, "_SpectralNorm", ())
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps")),
    "Conv2d": (
        nn.Conv2d, ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
}  # fmt: skip

Tree = Mapping[str, "Tree"]


def read_weight(part: nn.Module, name: str, path: str, kind: str, settings: tuple[Any, ...], bias: bool) -> Tensor:
    """A parameter of a layer as the layer would use it now: pruned, parametrised, or dequantised.

    Args:
        part: What stands where the layer stood.
        name: "weight" or "bias".
        path: Where it stands.
        kind: What it was when the model was converted, as `Layer` says it.
        settings: Its sizes and what else it was made with.
        bias: Whether it had a bias.

    Raises:
        InputError: It is another layer now, or hooks change what it does.
    """
    of_torch, names = KINDS[kind]
    if not isinstance(part, of_torch) or type(part).forward is not of_torch.forward or "forward" in part.__dict__:
        raise _refusal(path, f"is a {type(part).__module__}.{type(part).__qualname__} now")
    now = tuple([getattr(part, each) for each in names])
    if now != settings or (part.bias is not None) != bias:
        raise _refusal(path, "has other sizes or settings now")
    if part._forward_hooks or any(not isinstance(hook, RECOMPUTES) for hook in part._forward_pre_hooks.values()):
        raise _refusal(path, "has a forward hook now")
    if part.training and is_parametrized(part) and _takes_a_step(part):
        raise _refusal(path, "has a spectral norm now, which changes with every look at it in train mode")
    _recompute(part)
    tensor: Tensor = getattr(part, name)
    return tensor if type(tensor).dequantize is Tensor.dequantize else tensor.dequantize()


def _takes_a_step(part: nn.Module) -> bool:
    return any(isinstance(inner, _SPECTRAL) for inner in part.modules())


def _refusal(path: str, what: str) -> InputError:
    return InputError(
        f"call: `{path}` {what}, but tokens are scored with the weights that it had when the model was converted; "
        "change it before converting, or leave it as it is: the other linear, norm and convolution layers may change"
    )


def _recompute(part: nn.Module) -> None:
    """Do what pruning and weight norm do before each call of a module."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, RECOMPUTES):
            hook(part, ())


def containers_of(graph: fx.Graph) -> Tree:
    """The modules around all that a graph calls and reads, by name, each with those inside it."""
    tree: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            inner = tree
            for name in str(node.target).split(".")[:-1]:
                inner = inner.setdefault(name, {})
    return tree


def guarded(forward: Callable[..., Any], containers: Tree) -> Callable[..., Any]:
    """The forward of a graph, behind a look at the containers that it reads from."""

    @wraps(forward)
    def guarded_forward(self: nn.Module, *args: Any) -> Any:
        check_containers(self, containers)
        return forward(self, *args)

    return guarded_forward


def check_containers(module: nn.Module, containers: Tree, where: str = "") -> None:
    """Refuse a model in which a container was replaced, and do in containers what pruning does before each call.

    Args:
        module: The model, or a container in it.
        containers: Those inside it.
        where: Its dotted name, with a dot behind.

    Raises:
        InputError: One was replaced.
    """
    for name, inside in containers.items():
        part = module._modules.get(name)
        if part is None or type(part).forward is not nn.Module.forward:
            raise InputError(
                f"call: `{where}{name}` was replaced by a {type(part).__name__} after the model was converted, whose "
                "graph does not run it: replace it in the model and convert that; linear, norm and convolution layers "
                "of a converted model may be replaced"
            )
        if part._forward_pre_hooks:
            _recompute(part)
        if inside:
            check_containers(part, inside, f"{where}{name}.")
