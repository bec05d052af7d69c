"""What only a GPU can show: that the kernels compute there what they stand for, compiled and eager alike."""

import copy

import pytest
import torch

import idlefx
from idlefx.runtime import ops
from tests.models.small import build, images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:ops. Triton cannot build kernels"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions round to TF32 by default, and may so change which tokens are chosen."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [17, 197, 1370])
def test_choice_is_that_of_plain_operations(tokens, dtype):
    torch.manual_seed(0)
    scores = torch.randn(9, tokens).to(dtype)
    some = torch.arange(0, tokens, 2).expand(9, -1)
    for prefix, among in (((0,), None), ((1, 4), None), ((0,), some)):
        wanted = ops.choose_tokens(scores, prefix, tokens // 3, among)
        found = ops.choose_tokens(scores.cuda(), prefix, tokens // 3, None if among is None else among.cuda())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    scores = torch.randn(3, 50)
    with torch.cuda.device(0):
        found = ops.choose_tokens(scores.to("cuda:1"), (0,), 9)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ops.choose_tokens(scores, (0,), 9), found, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_query_is_that_of_plain_operations(dim, dtype, bound):
    torch.manual_seed(0)
    addends = [torch.randn(33, n, 384).transpose(0, 1 - dim).contiguous() for n in (5, 3)]
    layers = [torch.randn(384), torch.randn(384), 1e-6, torch.randn(100, 384) / 20, torch.randn(100)]
    wanted = ops.norm_linear(addends, 1, dim, *layers)
    moved = [part.to("cuda", dtype) if isinstance(part, torch.Tensor) else part for part in layers]
    with torch.no_grad():
        found = ops.norm_linear([part.to("cuda", dtype) for part in addends], 1, dim, *moved)
    assert (found.cpu() - wanted).abs().max() < bound


def twins(name: str) -> tuple[idlefx.IdleModule, idlefx.IdleModule, torch.Tensor]:
    """The same conversion on a CPU and on a GPU, and images."""
    model = build(name)
    x = images(model, 4)
    there = copy.deepcopy(model).cuda()
    here, there = (idlefx.convert(m, [1, 2], 0.5, example_inputs=x.to(d)) for m, d in ((model, "cpu"), (there, "cuda")))
    return here, there, x


@pytest.mark.parametrize("name", ["vit", "registers", "parallel_scaling", "gap", "hand_written"])
def test_gpu_computes_what_the_cpu_does(name):
    here, there, x = twins(name)
    with torch.no_grad():
        wanted = here(x)
        for run in (there, idlefx.compile(there)):
            assert (run(x.cuda()).cpu() - wanted).abs().max() < 1e-3


def test_package_runs(tmp_path):
    _, idle, x = twins("vit")
    artifact = idlefx.load(idlefx.package(idle, tmp_path / "m.pt2"))
    with torch.no_grad():
        assert (artifact(x.cuda()) - idle(x.cuda())).abs().max() < 1e-3


def test_training_step_has_the_gradients_of_the_cpu():
    here, there, x = twins("vit")
    grads = []
    for idle, device in ((here, "cpu"), (there, "cuda")):
        idle(x.to(device)).square().mean().backward()
        grads.append([parameter.grad.cpu() for parameter in idle.parameters()])
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*grads, strict=True))
