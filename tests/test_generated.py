"""Any combination of spellings converts to what its eager reference computes, or is refused for a true reason.

A combination says what a model computes, and what it does meanwhile: gradients of its own, buffers, regions, flags,
modes and wrappers. The hardest ones run always; 300 more, always the same, are slow tests; and 3,000 new ones run with
`-m slow --hypothesis-profile=thorough`.
"""

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st

from tests.models.generated import build, inputs
from tests.models.generated.config import CHOICES, MOSTLY_THE_SIMPLEST, Config
from tests.oracles import generated_reference
from tests.support.generated_check import check, error_of

PARTS = 12  # of the examples, so that they can run side by side


def configs() -> st.SearchStrategy[Config]:
    """Configs whose parts fit together; most of them have no block that mixes tokens outside attention."""
    options = {
        name: st.sampled_from(values[:1] * MOSTLY_THE_SIMPLEST.get(name, 0) + values)
        for name, values in CHOICES.items()
    }
    return st.builds(Config, **options).map(Config.normalised)


@st.composite
def plans(draw: Any, config: Config) -> dict[int, float]:
    """Keep ratios of some blocks that leave at least two image tokens working."""
    fit = [block for block in range(config.depth) if config.can_idle(block)]
    chosen = draw(st.lists(st.sampled_from(fit), min_size=1, unique=True))
    return {block: draw(st.integers(17, 95)) / 100 for block in sorted(chosen)}


HARD = [  # combinations in which it is hard to see where a block begins and ends, or who reads what
    (Config(around="neck", head="dense", region="autocast"), {2: 0.3}),
    (Config(around="neck", block="mlp_first", gradient="module_hook"), {1: 0.4}),
    (Config(block="mlp_first", outputs="features", buffer="in_place"), {1: 0.5}),
    (Config(block="post", norm="affine", region="no_grad_in_blocks"), {0: 0.5, 1: 0.4}),
    (Config(block="attention_only", positions="inside", outputs="skips", buffer="reassigned"), {0: 0.5, 1: 0.5}),
    (Config(core="multihead", positions="queries", gradient="hooked"), {2: 0.23}),
]

HARD_TOO = [  # whose kind is among those above
    (Config(around="neck", block="mlp_first", outputs="features", buffer="copied"), {2: 0.25}),
    (Config(block="parallel", positions="inside", gradient="reversed_in_blocks"), {0: 0.5, 1: 0.5}),
    (Config(block="nested", projection="raw", grid=(2, 6), flag="number"), {0: 0.48, 1: 0.8}),
    (Config(groups="native", projection="separate", wrapper="parallel", modes="train"), {0: 0.5, 2: 0.5}),
]


@pytest.mark.parametrize(
    ("config", "keep"), [*HARD, *(pytest.param(*each, marks=pytest.mark.slow) for each in HARD_TOO)], ids=lambda _: None
)
def test_hard_combination(config: Config, keep: dict[int, float]) -> None:
    assert config.normalised() == config
    assert check(config, keep)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS), ids="part{}".format)
def test_converted_equals_reference_or_is_refused_truly(part: int) -> None:
    deterministic = settings().derandomize

    @given(st.data())
    def converts(data: st.DataObject) -> None:
        config = data.draw(configs(), label="config")
        keep = data.draw(plans(config), label="keep")
        assume(check(config, keep))

    (seed(part)(converts) if deterministic else converts)()


@torch.no_grad()
@given(configs())
@settings(max_examples=25)
def test_reference_that_keeps_all_is_the_model(config: Config) -> None:
    model, x = build(config), inputs(config, 3)
    plan = {block: config.image_tokens for block in range(config.depth) if config.can_idle(block)}
    output = generated_reference.run(copy.deepcopy(model), plan, x).output
    assert error_of(output, model(*x)) <= 1e-5
    assert config.normalised() == config


def test_reference_hides_idle_tokens_and_leaves_them_as_they_are() -> None:
    config = Config(head="dense", positions="none", prefix=0)
    model, (image,) = build(config), inputs(config, 2)
    result = generated_reference.run(model, {0: 5, 1: 5, 2: 5}, (image,))
    works = torch.stack([torch.zeros(2, config.tokens).scatter(1, s, 1) for s in result.selected.values()]).amax(0)
    tokens, _ = model.embed(image, None)
    untouched = model.head(model.norm(tokens))
    assert works.sum() < works.numel()
    assert torch.equal(result.output[works == 0], untouched[works == 0])
    assert not torch.isclose(result.output[works == 1], untouched[works == 1]).all(-1).any()


@pytest.mark.parametrize("part", ["attention_scores", "attend"])
def test_check_notices_a_difference(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(generated_reference, part)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return -result if part == "attention_scores" else (1.01 * result[0], *result[1:])

    monkeypatch.setattr(generated_reference, part, wrong)
    with pytest.raises(AssertionError):
        check(Config(head="dense"), {1: 0.5})
