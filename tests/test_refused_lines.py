"""A refusal names the innermost line of the user's own file, wherever in it the operation is called."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor, nn

import idlefx
from idlefx.utils.source_lines import innermost
from tests.models.small import build, images
from tests.support.messages import says

TORCH, TIMM = (str(Path(library.__file__).parent) for library in (torch, timm))
HELPER = """
def running_sum(x):
    shifted = x + 1
    return shifted.cumsum(1)  # over the tokens


class Mixer:
    def __call__(self, x):
        return self.mix(x)

    def mix(self, x):
        return running_sum(x)
"""


def running_sum(x: Tensor) -> Tensor:
    return x.cumsum(1)


class Helped(nn.Module):
    """Its forward leaves the work to a function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return running_sum(x)


class HelpedFromAfar(nn.Module):
    """Its forward leaves the work to what another file defines."""

    def __init__(self, helper: ModuleType) -> None:
        super().__init__()
        self.mixer = helper.Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)


def refusal_with(mlp: nn.Module) -> str:
    model = build("vit")
    model.blocks[1].mlp = mlp
    with pytest.raises(idlefx.PlanError) as caught:
        idlefx.convert(model, [1], 0.5, example_inputs=images(model, 2))
    return str(caught.value)


@pytest.fixture
def helper(tmp_path):
    """A file of the user's in a folder that bears a library's name."""
    file = tmp_path / "timm" / "torch" / "helper.py"
    file.parent.mkdir(parents=True)
    file.write_text(HELPER)
    spec = importlib.util.spec_from_file_location("helper_of_a_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(spec.name, None)


def test_line_is_that_of_the_function_which_forward_calls():
    line = running_sum.__code__.co_firstlineno + 1
    assert says(refusal_with(Helped()), rf"cumsum.*test_refused_lines\.py:{line}: return x\.cumsum\(1\)")


def test_line_may_be_in_another_file_whatever_its_folder_is_called(helper):
    message = refusal_with(HelpedFromAfar(helper))
    assert says(message, r"cumsum.*timm/torch/helper\.py:4: return shifted\.cumsum\(1\)"), message


def test_line_of_a_library_is_named_where_no_other_is():
    model = timm.create_model("convit_tiny", img_size=64, embed_dim=32, depth=1, num_heads=2).eval()
    refusal = idlefx.inspect(model, torch.randn(2, 3, 64, 64))[0].refusal
    assert re.search(r"timm/models/convit\.py:\d+: ", refusal), refusal


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["/me/run.py", "/me/vit.py", f"{TORCH}/nn/functional.py"], 1),
        (["/me/vit.py", f"{TIMM}/layers/norm.py", f"{TORCH}/nn/functional.py"], 0),
        (["/x/site-packages/private/vit.py", f"{TIMM}/layers/norm.py"], 0),
        ([f"{TIMM}/models/vit.py", f"{TORCH}/nn/modules/container.py", f"{TIMM}/layers/norm.py"], 2),
        (["/me/torch/vit.py", "/me/timm/block.py", re.__file__], 1),
        ([f"{TORCH}/nn/functional.py"], None),
        ([], None),
    ],
    ids=["user", "library inside", "installed", "library only", "named like one", "torch only", "nothing"],
)
def test_own_files_are_told_from_those_of_libraries(files, wanted):
    assert innermost(files) == wanted
