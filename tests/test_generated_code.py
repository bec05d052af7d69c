"""What Inductor generates for a GPU: an idling block costs a few small kernels, and copies nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def codes():
    """The generated code by name; in a process of its own, which believes in a GPU."""
    command = [sys.executable, "-m", "tests.support.mock_cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def launches(code: str) -> list[str]:
    """Names of the Triton kernels, in the order they run."""
    return re.findall(r"(\w+)\.run\(", code)


def calls(code: str) -> list[str]:
    """Library calls, in the order they run."""
    return re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code.rpartition("def call(")[2])


def block(code: str) -> str:
    """What runs from the attention of the block in the middle to that of the last."""
    return code.split("torch.ops.aten._scaled_dot_product_flash_attention.default(")[2]


def kernels(code: str) -> dict[str, str]:
    """The source of each kernel."""
    return dict(re.findall(r"^def (triton_\w+)\((.*?)^'''", code, re.MULTILINE | re.DOTALL))


def faults(code: str) -> list[str]:
    """What an idling block must not do on a GPU."""
    slow = r"sort|topk|scatter|index|gather|_local_scalar"
    found = [f"calls {call}" for call in calls(code) if re.search(slow, call)]
    found += [word for word in ("device_assert", "tl.atomic", ".item()") if word in code]
    for name, source in kernels(code).items():
        chooses, activates = "sort_with_index" in source, "libdevice.erf" in source
        norms = "rsqrt" in source or ("layer_norm" in name and "welford" in source)  # or a norm's first half
        if re.search(r"tl\.load\(in_ptr\d+ \+ \([^)]*\d\*tmp\d+", source) and not norms:
            found.append(f"{name} takes tokens and does nothing else")
        if re.search(r"tl\.store\(\w+ \+ \([^)]*\d\*tmp\d+", source):
            found.append(f"{name} writes to scattered places")
        if not (norms or chooses or activates) and "convolution" not in name:
            found.append(f"{name} only moves or adds")
    return found


@pytest.mark.parametrize("name", ["idle", "idle, free batch"])
def test_idling_block_has_two_kernels_more_than_a_dense_one_beyond_its_products(codes, name):
    dense, idle = block(codes["dense"]), block(codes[name])
    assert (len(launches(dense)), len(calls(dense))) == (3, 4)  # two norms and the activation, and the four layers
    # The choice, and a norm of all tokens for the scores besides that of the gathered ones; and two products of one
    # row per image: the class token's query, whose norm is in it, and what that looks for.
    products = [name for name in launches(idle) if name.startswith("norm_linear")]
    assert (len(launches(idle)) - len(products), len(products) + len(calls(idle))) == (3 + 2, 4 + 2)


@pytest.mark.parametrize("name", ["idle", "idle, free batch"])
def test_idling_block_takes_and_puts_tokens_where_it_norms_them_anyway(codes, name):
    assert faults(codes[name]) == []


@pytest.mark.parametrize("name", ["idle", "many tokens"])
def test_choice_is_one_kernel_however_many_tokens_there_are(codes, name):
    assert sum(name.startswith("choose") for name in launches(block(codes[name]))) == 1
    assert "sort" not in codes[name]


@pytest.mark.parametrize("name", ["choice", "choice on an old GPU"])
def test_choice_of_plain_operations_is_one_kernel_too(codes, name):
    source = kernels(codes[name])
    assert len(launches(codes[name])) == 1 and calls(codes[name]) == []
    (choosing,) = source.values()
    assert choosing.count("tl.store") == 2  # who works, and where everyone stands among them


def test_between_the_blocks_of_a_following_stage_nothing_is_launched_but_what_dense_blocks_do(codes):
    before, *inside, after = codes["following"].split("torch.ops.aten._scaled_dot_product_efficient_attention.default(")
    dense = block(codes["dense"])
    for part in inside:
        assert (len(launches(part)), len(calls(part))) == (len(launches(dense)), 4)
    assert len(inside) == 1
    # To open a stage: the class token's query and what that looks for, norms and scores of all tokens, their likeness
    # to anchors, the choice, whom the idle ones follow, the means, and the sizes as a mask. To end it: nothing, as
    # tokens are restored where they are normed.
    opening = before.rpartition("torch.ops.aten._scaled_dot_product_flash_attention.default(")[2]
    products = [name for name in launches(opening) if name.startswith("norm_linear")]
    assert len(launches(opening)) + len(calls(opening)) <= len(launches(dense)) + 4 + 8
    assert (len(products), len(calls(opening))) == (1, 4 + 1)
    assert len(launches(after)) == 3 and "tl.atomic" not in codes["following"]


def test_gradients_are_put_back_and_not_accumulated(codes):
    assert "tl.atomic" not in codes["gradients"]
    assert calls(codes["gradients"]) == []


def test_careless_spelling_is_noticed(codes):
    found = " ".join(faults(codes["careless"]))
    for fault in ("calls torch.ops.aten.topk", "device_assert", "takes tokens", "scattered places", "only moves"):
        assert fault in found
