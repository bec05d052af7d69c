"""The kernels for GPUs, without one: what they compute, by Triton's interpreter, and that they can be built."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import idlefx
from idlefx.runtime import ops
from tests.models import small

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from idlefx.runtime import triton_kernels  # noqa: E402


@pytest.fixture(scope="module")
def differences():
    """How far the interpreted kernels are from what they stand for, and from something else."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_choice_is_the_same(differences):
    assert differences["right"]["choices"] == 0
    assert differences["wrong"]["choices"] > 0


def test_query_is_the_same_up_to_rounding(differences):
    for kind, bound in {"torch.float32": 1e-5, "torch.float16": 2e-2}.items():
        assert differences["right"]["queries"][kind] < bound < differences["wrong"]["queries"][kind]


def test_groups_are_the_same_up_to_rounding(differences):
    bounds = {"leaders": 0, "places": 0, "cosines": 0, "means": 2e-3, "sizes": 0}
    for name, bound in bounds.items():
        assert differences["right"]["groups"][name] <= bound < differences["wrong"]["groups"][name]


REST, FOLLOW = ["norm_linear", "choose_tokens"], ["norm_linear", "likeness_to_anchors", "nearest_workers"]


@pytest.mark.parametrize(
    ("idle", "gradients", "wanted"),
    [
        ("rest", False, REST),
        ("rest", True, REST[1:]),
        ("follow", False, [*FOLLOW, "average_groups"]),
        ("follow", True, FOLLOW[1:]),
    ],
)
def test_compiler_sees_them_in_one_graph_for_all_batches(idle, gradients, wanted, monkeypatch):
    model = small.build("vit")
    idle, x = idlefx.convert(model, [1, 2], 0.5, idle=idle, schedule="blocks"), small.images(model, 4)
    expected, seen = idle(x), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        seen.extend(target.__name__ for target in called if "idlefx" in str(target))
        return lambda *_: (expected,)

    ops.load_kernels()
    monkeypatch.setattr(ops, "runs_kernels", lambda _: ops._fusing)
    with torch.set_grad_enabled(gradients):
        torch.compile(idle, backend=backend, fullgraph=True, dynamic=True)(x)
    assert seen == wanted * sum(step.idles for step in idle.plan)


def build(kernel, types: dict[str, str], constants: dict[str, object], **options: int) -> bytes:
    """The machine code for compute capability 9.0."""
    names = kernel.arg_names
    assert set(names) == {*types, *constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def typed(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize(("block", "warps"), [(256, 1), (2048, 4)])
@pytest.mark.parametrize("role", [None, "*i8"])
def test_choice_can_be_built(block, warps, role):
    types = {"scores": "*fp32", **typed("index place", "*i64"), **typed("tokens leading kept working", "i32")}
    constants: dict[str, object] = {"BLOCK": block}
    if role:
        types["role"] = role
    else:
        constants |= {"role": None, "leading": 1}  # Triton takes a one for a constant
        del types["leading"]
    assert build(triton_kernels.choose_kernel, types, constants, num_warps=warps)


@pytest.mark.parametrize("optional", ["residual norm_bias bias", ""])
@pytest.mark.parametrize(("kind", "width", "warps"), [("fp32", 384, 4), ("bf16", 1024, 8), ("fp16", 1408, 8)])
def test_query_can_be_built(kind, width, warps, optional):
    sizes = "images outputs x_token residual_token x_stride residual_stride weight_stride"
    tensors = typed(f"x norm_weight weight out {optional}", f"*{kind}")
    types = {**tensors, **typed(sizes, "i32"), "epsilon": "fp32"}
    block = triton.next_power_of_2(width)
    tiles = {"WIDTH": width, "BLOCK": block, "IMAGES": 16, "FEATURES": 64, "OUTPUTS": 32}
    missing = {"residual", "norm_bias", "bias"} - types.keys()
    assert build(triton_kernels.norm_linear_kernel, types, {**tiles, **dict.fromkeys(missing)}, num_warps=warps)


TILES = {"WIDTH": 384, "ROWS": 16, "OTHERS": 32, "FEATURES": 64}


def test_likeness_to_anchors_can_be_built():
    types = {"unit": "*fp32", "cosine": "*fp32", **typed("tokens compared count leading back modulus", "i32")}
    missing: dict[str, object] = dict.fromkeys(("order", "leaders", "place"))
    assert build(triton_kernels.nearest_kernel, types, {**TILES, **missing}, num_warps=4)


def test_nearest_workers_can_be_built():
    types = {"unit": "*fp32", **typed("order leaders place", "*i64"), **typed("tokens compared count leading", "i32")}
    constants: dict[str, object] = {**TILES, "cosine": None, "back": 1, "modulus": 1}
    assert build(triton_kernels.nearest_kernel, types, constants, num_warps=4)


@pytest.mark.parametrize("joins", [False, True], ids=["tokens", "means"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_means_of_groups_can_be_built(kind, joins):
    types = {**typed("x means", f"*{kind}"), **typed("order leaders", "*i64"), "sizes": "*fp32"}
    types |= typed("x_image x_token working idle", "i32")
    types, given = (types | {"stand_for": "*fp32"}, {}) if joins else (types, {"stand_for": None})
    assert build(triton_kernels.average_kernel, types, {**TILES, **given, "x_feature": 1}, num_warps=4)
