"""Graphs as Dynamo hands them to a backend: torch operations, the model's own tensors among the inputs.

`lower` makes of one the kind of graph that `frontend.capture` gives, so that analysis and passes know only one kind;
`lift` puts what they made of it back behind the inputs that Dynamo will call it with.
"""

import re
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from idlefx.capture.cleanup import tidy
from idlefx.errors import CaptureError
from idlefx.graph.queries import placeholders, source_line
from idlefx.graph.state import wrapper_kind

_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast

_FAST_PATH: Any = (torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention)
_OWN_GRADIENTS = ("autograd_function", "register_hook")  # in what Dynamo calls them, which differs by version


def lower(given: fx.GraphModule) -> fx.GraphModule:
    """The ATen graph of a Dynamo graph, in which the model's own tensors are attributes, not inputs.

    Raises:
        CaptureError: An operation cannot be traced, or activations are checkpointed.
    """
    for node in given.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint):
        raise CaptureError(
            f"capture: the model checkpoints activations (at {source_line(node)}), and the backend does not see what "
            "is inside; switch that off (timm: `set_grad_checkpointing(False)`, Hugging Face: "
            "`gradient_checkpointing_disable()`), or use idlefx.convert, which does without"
        )
    holders = placeholders(given.graph)
    values = [_example(holder) for holder in holders]
    mode = next((found for v in values if (found := getattr(v, "fake_mode", None)) is not None), None)
    interpreter = _Interpreter(given)

    def run(*inputs: Any) -> Any:
        return interpreter.run(*inputs)

    try:
        with mode or torch.no_grad(), preserve_node_meta(), enable_python_dispatcher():
            traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CaptureError(f"capture: cannot trace the graph that torch.compile found: {what}") from error
    for node, holder in zip(placeholders(traced.graph), holders, strict=True):
        if is_state(holder):
            traced.register_buffer(holder.name, node.meta["val"])
            with traced.graph.inserting_before(node):
                attribute = traced.graph.get_attr(holder.name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            traced.graph.erase_node(node)
    for node in traced.graph.nodes:
        if "nn_module_stack" in node.meta:
            levels = node.meta["nn_module_stack"].items()
            node.meta["nn_module_stack"] = {key: (_path(name), kind) for key, (name, kind) in levels}
    return tidy(traced, traced)


def lift(module: fx.GraphModule, given: fx.GraphModule) -> fx.GraphModule:
    """A graph module that does what `module` does and takes what `given`, of which it was lowered, takes."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    there: dict[str, fx.Node] = {}
    for holder in placeholders(given.graph):
        there[holder.name] = graph.node_copy(holder)
        there[holder.name]._dynamo_source = getattr(holder, "_dynamo_source", None)
    free = (there[holder.name] for holder in placeholders(given.graph) if not is_state(holder))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(free)
        elif node.op == "get_attr" and node.target in there:
            mapping[node] = there[node.target]
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    lifted = fx.GraphModule(module, graph)
    lifted.meta.update(given.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(given, name):  # what Dynamo tells the compiler beside the graph
            setattr(lifted, name, getattr(given, name))
    return lifted


def free_sizes(given: fx.GraphModule) -> list[Any]:
    """The sizes of inputs that torch.compile leaves open, other than the batch."""
    return [size for shape in _shapes(given) for size in shape[1:] if isinstance(size, torch.SymInt)]


def has_one_image(given: fx.GraphModule) -> bool:
    """Whether the graph is for a batch of one, which torch.compile takes for a constant."""
    return any(len(shape) > 1 and not isinstance(shape[0], torch.SymInt) and shape[0] == 1 for shape in _shapes(given))


def autocast_line(given: fx.GraphModule) -> str:
    """The user's line at which the graph switches autocast to something else, if it does."""
    for node in given.graph.find_nodes(op="call_function", target=_ENTER):
        device, _, enabled, *_ = node.args
        if enabled or torch.is_autocast_enabled(device):
            while node.op != "output" and not node.stack_trace:  # Dynamo places what is inside, not the switch
                node = node.next
            return source_line(node)
    return ""


def gradient_line(given: fx.GraphModule) -> str:
    """The user's line of an autograd function or a hook, whose gradients `lower` would lose; empty if there is none."""
    calls = (node for node in given.graph.nodes if node.op.startswith("call"))
    return next((source_line(n) for n in calls if any(own in str(n.target) for own in _OWN_GRADIENTS)), "")


def fast_path_line(given: fx.GraphModule) -> str:
    """The user's line of a layer that torch computes as one operation, in which attention is hidden; empty if none."""
    calls = (node for node in given.graph.nodes if node.op == "call_function")
    return next((source_line(node) for node in calls if node.target in _FAST_PATH), "")


def wrapped_state(given: fx.GraphModule) -> str:
    """The type of a weight that holds its values in other tensors, which `lower` would take for constants."""
    return wrapper_kind(_example(holder) for holder in placeholders(given.graph) if is_state(holder))


def is_state(holder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a tensor of a module: a parameter, a buffer or a plain attribute."""
    origin = getattr(getattr(holder, "_dynamo_source", None), "guard_source", None)
    return origin is not None and (origin.is_unspecialized_nn_module() or origin.is_specialized_nn_module())


def _shapes(given: fx.GraphModule) -> list[Any]:
    values = [_example(holder) for holder in placeholders(given.graph) if not is_state(holder)]
    return [value.shape for value in values if isinstance(value, torch.Tensor)]


def _example(holder: fx.Node) -> Any:
    return holder.meta["example_value"]


def _path(name: str) -> str:
    """`L['self'].blocks.0`, as Dynamo says it, is `blocks.0` to the user."""
    return re.sub(r"^[LG]\['\w+'\]\.?", "", name)


class _Interpreter(fx.Interpreter):
    """Runs a Dynamo graph and keeps its switches of autocast out of the trace; see `autocast_line`."""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node of the graph."""
        return None if n.target in (_ENTER, _EXIT) else super().run_node(n)
