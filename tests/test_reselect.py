"""Pruning for comparison: with `reselect=False` a token that idles never works again."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import idlefx
from idlefx import __main__ as shell
from idlefx.runtime.ops import choose_tokens
from idlefx.runtime.selections import selections
from tests.models import generated
from tests.models.generated.config import Config
from tests.models.small import MODELS, build, images
from tests.oracles import reference
from tests.support.cases import Case, converted, same_selections
from tests.support.cases import convert as convert_case

FALLING = Case((0, 2), (0.7, 0.4))


def double(family: str, case: Case = FALLING) -> tuple[nn.Module, Any]:
    """A model in double precision and what becomes of it with pruning."""
    return build(family).double(), converted(family, case, torch.float64, reselect=False)


def plan_of(idle: Any) -> dict[int, int]:
    return {step.block: step.kept for step in idle.plan if step.idles}


def returning(chosen: Mapping[int, Tensor]) -> int:
    """How many tokens work in a block though they idled in the one before."""
    found = 0
    for before, after in pairwise(chosen[block] for block in sorted(chosen)):
        found += sum(len(set(b) - set(a)) for a, b in zip(before.tolist(), after.tolist(), strict=True))
    return found


@torch.no_grad()
@pytest.mark.parametrize("selector", ["auto", "random"])
@pytest.mark.parametrize("family", ["vit", "registers_gap", "qk_norm"])
def test_a_token_that_idles_never_works_again(family, selector):
    case = FALLING._replace(selector=selector)
    model, pruned = double(family, case)
    x = images(model, 3).double()
    chosen = selections(pruned, x)
    assert returning(chosen) == 0
    assert {block: positions.shape[1] - MODELS[family].prefix for block, positions in chosen.items()} == plan_of(pruned)
    free = converted(family, case, torch.float64)
    assert returning(selections(free, x)) > 0
    assert pruned(x).shape == model(x).shape


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "registers", "gap", "parallel_things", "hand_written"])
def test_pruned_equals_a_reference_with_fewer_candidates(family):
    model, pruned = double(family)
    spec, plan, x = MODELS[family], plan_of(pruned), images(model, 3).double()
    kept, left = iter(plan.values()), [torch.ones(3, 1, dtype=torch.bool)]

    def score(tokens: Tensor, q: Tensor, k: Tensor) -> Tensor:
        scores = reference.attention_scores(q, k, spec.prefix, spec.class_position).masked_fill(~left[-1], -torch.inf)
        chosen, _ = reference.choose(scores, next(kept), spec.prefix)
        left.append(torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True))
        return scores

    expected = reference.run(model, plan, x, prefix=spec.prefix, class_position=spec.class_position, score=score)
    assert same_selections(selections(pruned, x), expected.selected)
    torch.testing.assert_close(pruned(x), expected.output, rtol=1e-11, atol=1e-12)
    free = converted(family, FALLING, torch.float64)
    assert not same_selections(selections(free, x), expected.selected)


def drop_for_real(model: nn.Module, plan: dict[int, int], x: Tensor, prefix: int) -> Tensor:
    """Tokens leave the sequence where a block keeps fewer, as in EViT: the class token's head never misses them."""

    def dropping(block: nn.Module, kept: int) -> Any:
        dense = block.forward

        def forward(tokens: Tensor) -> Tensor:
            with reference.AttentionInputs() as attention:
                dense(tokens)
            q, k = attention.found[0]
            chosen, _ = reference.choose(reference.attention_scores(q, k, prefix, 0), kept, prefix)
            return dense(tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2])))

        return forward

    with ExitStack() as stack:
        for index, kept in plan.items():
            block = model.blocks[index]
            stack.enter_context(patch.object(block, "forward", dropping(block, kept)))
        return model(x)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "registers"])
def test_for_a_class_token_head_pruning_is_dropping(family):
    model, pruned = double(family)
    x = images(model, 3).double()
    dropped = drop_for_real(model, plan_of(pruned), x, MODELS[family].prefix)
    torch.testing.assert_close(pruned(x), dropped, rtol=1e-11, atol=1e-12)
    free = converted(family, FALLING, torch.float64)
    assert not torch.allclose(free(x), dropped, atol=1e-6)


@torch.no_grad()
def test_idle_tokens_keep_their_places_in_the_output():
    config = Config(head="dense", prefix=2, place="split")
    model, (x,) = generated.build(config), generated.inputs(config, 3)
    pruned = idlefx.convert(model, [0, 1], [0.5, 0.25], example_inputs=(x,), reselect=False)
    chosen = selections(pruned, x)
    assert pruned(x).shape == model(x).shape and returning(chosen) == 0
    assert all({0, config.tokens - 1} <= set(image) for image in chosen[2].tolist())
    tokens, _ = model.embed(x, None)
    untouched = model.head(model.norm(tokens))
    for image, first in enumerate(chosen[0].tolist()):
        idle = [p for p in range(config.tokens) if p not in first]
        torch.testing.assert_close(pruned(x)[image, idle], untouched[image, idle])


@pytest.mark.slow
def test_training_prunes_too_and_with_the_cut_loss():
    model = build("vit", drop_path_rate=0.3, proj_drop_rate=0.2)
    pruned = convert_case(model, FALLING, reselect=False).train()
    student = idlefx.with_cut_loss(pruned)
    assert student.training and not student.plan.reselect
    x = images(model, 4)
    assert returning(selections(pruned, x)) == returning(selections(student, x)) == 0
    output, loss = student(x)
    (output.square().mean() + loss).backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_plan_says_so():
    _, pruned = double("vit")
    free = converted("vit", FALLING)
    assert not pruned.plan.reselect and free.plan.reselect
    assert "reselect=False" in str(pruned.plan) and "never works again" in str(pruned.plan)
    assert "reselect" not in str(free.plan)
    assert str(free.plan) in str(pruned.plan)


def named() -> nn.Module:
    return build("vit")


@pytest.mark.parametrize(("switch", "pruned"), [("--reselect", False), ("--no-reselect", True)])
def test_shell_prunes_if_told_to(switch, pruned, capsys):
    command = ["convert", "--model", f"{__name__}:named", "--example-shape", "2,3,48,48", "--layers", "0", "2"]
    assert shell.main([*command, switch]) == 0
    assert ("never works again" in capsys.readouterr().out) is pruned


def refusal(model: nn.Module, *given: Any, **options: Any) -> str:
    with pytest.raises(idlefx.PlanError) as caught:
        idlefx.convert(model, *given, reselect=False, **options)
    return str(caught.value)


def test_more_tokens_than_are_left_are_refused():
    model = build("vit")
    options = {"example_inputs": images(model, 2)}
    message = refusal(model, [0, 2], [0.4, 0.7], **options)
    for words in ("reselect=False", "block 2 (blocks.2)", " 25 image tokens", "only 14 are left after block 1", "keep"):
        assert words in message, message
    assert "36" in refusal(model, [0, 2], [0.4, 1.0], **options)
    idlefx.convert(model, [0, 2], [0.4, 0.7], **options)
    idlefx.convert(model, [0, 2], [1.0, 0.7], reselect=False, **options)


def test_a_gap_in_which_all_would_work_is_refused():
    model = build("vit")
    options = {"schedule": "blocks", "example_inputs": images(model, 2)}
    message = refusal(model, [0, 2], 0.5, **options)
    assert re.search(r"block 1 \(blocks\.1\)", message) and "36" in message and "stages" in message
    assert "block 3" in refusal(model, [1, 2], 0.5, **options)
    whole = idlefx.convert(model, [1, 2, 3], [0.5, 0.5, 0.25], reselect=False, **options)
    assert plan_of(whole) == {1: 18, 2: 18, 3: 9}


def test_other_tokens_on_the_way_are_refused():
    config = Config(place="late", positions="image")
    model, example = generated.build(config), generated.inputs(config, 2)
    message = refusal(model, [0], 0.5, example_inputs=example)
    assert re.search(r"block 2 .*tokens of block 1.* 17, 1 of them prefix, .* 16 and 0", message), message


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(-2, 2), min_size=3, max_size=9), st.sets(st.integers(0, 2), max_size=2), st.data())
def test_choice_among_some_is_the_best_of_them(values, prefix, data):
    image = [p for p in range(len(values)) if p not in prefix]
    candidates = data.draw(st.sets(st.sampled_from(image), min_size=1))
    kept = data.draw(st.integers(1, len(candidates)))
    lowest = data.draw(st.booleans())
    scores = torch.tensor([[-torch.inf if lowest and v == -2 else float(v) for v in values]])
    among = torch.tensor([sorted(prefix | candidates)])
    best = sorted(candidates, key=lambda p: (-scores[0, p].item(), p))[:kept]
    for given_scores in (scores, torch.tensor([values])) if not lowest else (scores,):
        chosen, _ = choose_tokens(given_scores, tuple(sorted(prefix)), kept, among)
        assert chosen[0].tolist() == sorted([*prefix, *best])
