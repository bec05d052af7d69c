"""Let Inductor write its code for a GPU on a machine that has none; the code is read, never run.

`python -m tests.support.mock_cuda` prints, as JSON, what it generates in bfloat16 for a dense model, for its idling
twin (with a batch of eight and with a free batch), for one whose tokens follow, for the gradients of taking and putting
tokens, and for a careless spelling of an idling block. It patches torch all over, so it runs in a process of its own.
"""

import contextlib
import copy
import json
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.graph as inductor_graph
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

import idlefx
from idlefx.deploy.parity import example_of
from idlefx.runtime import gather_scatter, ops

BATCH, TOKENS, WIDTH, KEPT, DEPTH = 8, 197, 384, 137, 3
aten = torch.ops.aten
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", type="cuda", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class Generated(Exception):
    """The code is there: stop before it is compiled."""


class Driver:
    """As much of Triton's driver as Inductor asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


def always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def pretend() -> list[str]:
    """Make torch believe in a GPU; the list takes up the code that Inductor generates."""
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(always(PROPERTIES))
        interface.current_device = staticmethod(always(0))
    answers = {"is_available": True, "get_compute_capability": 90, "get_multi_processor_count": 132, "device_count": 1}
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(always(answer)))
    CudaInterface.device = contextlib.nullcontext
    answers = {
        "get_device_properties": PROPERTIES, "get_device_capability": (9, 0), "is_available": True, "device_count": 1,
        "current_device": 0, "get_device_name": "NVIDIA H100", "is_bf16_supported": True, "_is_compiled": True,
        "_lazy_init": None, "synchronize": None, "set_device": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "current_stream": types.SimpleNamespace(cuda_stream=0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, always(answer))
    torch.cuda.device.__enter__ = torch.cuda.device.__exit__ = always(None)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = always(torch.zeros(16, dtype=torch.uint8)), always(None)
    triton.runtime.driver.set_active(Driver())
    fake_tensor.init_gpu_context = always(None)
    compile_fx.preserve_rng_state = contextlib.nullcontext
    joint_graph.lazy_init = always(None)  # traces its patterns on a real device; none of them matters here
    config.compile_threads, config.force_disable_caches = 1, True
    config.joint_graph_constant_folding = False  # it computes the constants on the device
    codes: list[str] = []

    def generate(self: Any) -> None:
        code, _ = self.codegen()
        codes.append(getattr(code, "value", code))
        raise Generated

    inductor_graph.GraphLowering._compile_to_module = generate
    return codes


CODES = pretend()
ops.load_kernels()


def generated(
    function: Callable[..., Any],
    *shapes: tuple[tuple[int, ...], torch.dtype],
    dynamic: bool = False,
    trace_on: str = "cuda",
) -> str:
    """What Inductor generates for a function of tensors.

    Args:
        function: What to compile.
        *shapes: Shape and type of each argument.
        dynamic: Whether the first dimension of the first argument is free.
        trace_on: The device to trace on; autograd cannot be made to believe in a GPU.
    """
    mode = fake_tensor.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    batch = shapes[0][0][0]
    if dynamic:
        free = StatelessSymbolicContext([DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (len(shapes[0][0]) - 1))
        batch = mode.from_tensor(torch.empty(shapes[0][0], device="meta"), symbolic_context=free).shape[0]

    def fakes(device: str) -> list[Tensor]:
        sizes = [(batch, *shapes[0][0][1:]), *(shape for shape, _ in shapes[1:])]
        with mode:
            return [torch.empty(size, dtype=t, device=device) for size, (_, t) in zip(sizes, shapes, strict=True)]

    with torch.no_grad(), mode, enable_python_dispatcher():
        traced = make_fx(function)(*fakes(trace_on))
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    traced.recompile()
    try:
        with torch.no_grad():
            compile_fx.compile_fx(traced, fakes("cuda"))
    except Exception as error:
        if not isinstance(error, Generated) and not isinstance(getattr(error, "inner_exception", None), Generated):
            raise
    return CODES.pop()


def of_model(model: idlefx.IdleModule, dynamic: bool = False) -> str:
    """The code of a captured model, its attention being the kernel that a GPU would choose: flash takes no mask."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, scale: float | None = None
    ) -> Tensor:
        if mask is None:
            return aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, False, False, scale=scale)[0]
        mask = mask.expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention.default(q, k, v, mask, False, scale=scale)[0]

    (example,), _ = example_of(model)
    model = copy.deepcopy(model)
    for node in model.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            node.target = attend
    model.recompile()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def run(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(state, values, strict=True)), (x,))

    image = ((BATCH, *example.shape[1:]), torch.bfloat16)
    return generated(run, image, *((tuple(t.shape), t.dtype) for t in state.values()), dynamic=dynamic)


def gradients(x: Tensor, index: Tensor, grad: Tensor) -> Any:
    """What autograd does to a block between taking and putting."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = gather_scatter.put_tokens(x, index, gather_scatter.take_tokens(x, index).sin())
    return torch.autograd.grad(out, x, grad)


def careless(x: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """An idling block as one would write it first."""
    index = scores.topk(KEPT, dim=1).indices.unsqueeze(2).expand(-1, -1, WIDTH)
    return x.scatter(1, index, x.gather(1, index) @ weight)


def plain_choice(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A choice where Triton kernels of ours are not at hand."""
    with ops.plain():
        return ops.choose_tokens(scores, (0,), KEPT)


def old_choice(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A choice on a GPU that our kernels do not run on."""
    with patch.object(PROPERTIES, "major", 7):
        return ops.choose_tokens(scores, (0,), KEPT)


def converted(keep: float, idle: str = "rest", **options: Any) -> idlefx.IdleModule:
    """A small model of which all blocks but the first idle."""
    model: nn.Module = timm.create_model("deit_small_patch16_224", depth=DEPTH, **options).eval().bfloat16()
    return idlefx.convert(model, [1], keep, idle=idle)


def main() -> None:
    """Generate all of it."""
    dense, idle = converted(1.0), converted(0.7)
    x = ((BATCH, TOKENS, WIDTH), torch.bfloat16)
    codes = {
        "dense": of_model(dense),
        "idle": of_model(idle),
        "idle, free batch": of_model(idle, dynamic=True),
        "following": of_model(converted(0.7, "follow")),
        "many tokens": of_model(converted(0.7, img_size=448)),
        "choice": generated(plain_choice, ((BATCH, TOKENS), torch.float32)),
        "choice on an old GPU": generated(old_choice, ((BATCH, TOKENS), torch.float32)),
        "gradients": generated(gradients, x, ((BATCH, KEPT), torch.int64), x, trace_on="cpu"),
        "careless": generated(careless, x, ((BATCH, TOKENS), torch.float32), ((WIDTH, WIDTH), torch.bfloat16)),
    }
    json.dump(codes, sys.stdout)


if __name__ == "__main__":
    main()
