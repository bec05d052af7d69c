"""Towers of vision-language models, which take patches of several images as one sequence, and lengths as arrays."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.zoo.comparisons import compare, compare_following
from idlefx.zoo.packed import ONE, QWEN_3, TWO, WINDOWED, patches, tower
from tests.models.small import randomise
from tests.support.messages import refusal, says

if find_spec("transformers.vision_utils") is None:
    pytest.skip("transformers is too old to be told the lengths of images", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*the numbers of arrays are built in")

KINDS = {
    "qwen2.5": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", WINDOWED, "positions windows"),
    "qwen3": ("qwen3_vl", "Qwen3VLVisionModel", {**QWEN_3, "deepstack_visual_indexes": [1]}, "positions taps"),
}


def build(kind: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = tower(*KINDS[kind][:3], attention).eval()
    randomise(model)
    return model


def inputs(kind: str, grids: Any, seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    return patches(grids, KINDS[kind][3], 1)


CASES = [
    ("qwen2.5", ONE, "sdpa"),
    pytest.param("qwen3", TWO, "sdpa"),
    pytest.param("qwen2.5", TWO, "eager", marks=pytest.mark.slow),
    pytest.param("qwen3", ONE, "eager", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "grids", "attention"), CASES)
def test_patches_of_each_image_or_window_rest_and_follow_as_the_reference_says(kind, grids, attention):
    model, example = build(kind, attention), inputs(kind, grids)
    table = idlefx.inspect(model, example)
    assert all(block.can_idle and block.batch_dim is None for block in table)
    resting = idlefx.convert(model, [0, 2], [0.6, 0.4], schedule="blocks", example_inputs=example)
    found = compare(model, resting, table, inputs(kind, grids, seed=2))
    assert found.error < 1e-6 and found.excess < 1e-4
    following = idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=example)
    followed = compare_following(model, following, table, [inputs(kind, grids, seed=seed) for seed in range(2, 6)])
    assert not followed.reason and followed.grouped
    assert followed.error is not None and followed.error < 1e-6


def test_blocks_over_windows_and_over_the_image_keep_the_share_of_each():
    model, example = build("qwen2.5"), inputs("qwen2.5", ONE)
    idle = idlefx.convert(model, [0, 1, 2], [0.5, 0.5, 0.5], schedule="blocks", example_inputs=example)
    assert [step.kept_by_segment for step in idle.plan] == [(8,) * 4, (), (8,) * 4]
    assert [step.kept for step in idle.plan] == [32, 32, 32]
    followed = idlefx.convert(model, [0], 0.5, idle="follow", example_inputs=example)
    assert [len(stage) for stage in followed.plan.stages] == [1, 1, 1], "a stage ends where segments do"


class OneSize(nn.Module):
    """A tower for images of one size, whose grid and all that follows from it are constants."""

    def __init__(self, model: nn.Module, **told: Any) -> None:
        super().__init__()
        self.tower, self.told = model, told

    def forward(self, hidden_states: Tensor) -> Any:
        return self.tower(hidden_states, **self.told)


@pytest.mark.parametrize("kind", ["qwen2.5", pytest.param("qwen3", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")
def test_a_tower_for_one_size_of_images_takes_patches_alone(kind):
    model, told = build(kind), inputs(kind, ONE)
    x = told.pop("hidden_states")
    idle = idlefx.convert(OneSize(model, **told), [0], 0.5, example_inputs=x)
    wanted = idlefx.convert(model, [0], 0.5, example_inputs={"hidden_states": x, **told})
    assert torch.equal(idle(x).pooler_output, wanted(x, **told).pooler_output)
    assert [step.kept_by_segment for step in idle.plan] == [step.kept_by_segment for step in wanted.plan]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_a_tensor_tells_are_refused_with_what_to_do(kind):
    given = inputs(kind, TWO)
    given = {name: given[name] for name in ("hidden_states", "grid_thw")}
    said = refusal(idlefx.inspect, build(kind), given)
    assert says(
        said, "compute them before the call and give them as numpy arrays", r"(vision_utils|modeling_qwen\w+)\.py:\d+"
    )


def test_the_length_of_one_image_may_be_a_tensor():
    model, arrays = build("qwen2.5"), inputs("qwen2.5", ONE)
    tensors = {**arrays, "cu_seqlens": torch.from_numpy(arrays["cu_seqlens"])}
    one, other = (idlefx.convert(model, [1], 0.5, example_inputs=given) for given in (arrays, tensors))
    assert torch.equal(one(**arrays).pooler_output, other(**tensors).pooler_output)
