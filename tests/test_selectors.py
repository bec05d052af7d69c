"""Token scores: the built-in ones, the forms they take, and the user's own."""

import pytest
import torch

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import DEPTH, MODELS, build, image_tokens, images
from tests.support.cases import Case, convert, converted, random_case, relative_error, same_selections, wanted

EVERY_BLOCK = tuple(range(DEPTH))


@idlefx.selector
def logits_of_class(q, k, prefix):
    return (q[:, :, prefix[0]][:, :, None] * k).sum(-1).mean(1)


@idlefx.selector
def logits_of_mean_image(q, k, prefix):
    image = [position for position in range(q.shape[2]) if position not in {int(p) for p in prefix}]
    return (q[:, :, image].mean(2, keepdim=True) * k).sum(-1).mean(1)


@idlefx.selector
def loudest(x):
    return x.norm(dim=-1)


@idlefx.selector
def all_alike(x):
    return x.new_zeros(x.shape[0], x.shape[1])


@idlefx.selector
def far_from_mean(x, k):
    return (x - x.mean(1, keepdim=True)).square().sum(-1) + k.square().sum((1, 3))


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["stages", pytest.param("blocks", marks=pytest.mark.slow)])
def test_nearly_free_score_chooses_like_plain_logits(name, model, spec, schedule):
    case = random_case(name, schedule)
    plain = "logits_of_mean_image" if spec.class_position is None else "logits_of_class"
    automatic, by_hand = converted(name, case), converted(name, case._replace(selector=plain))
    for batch in (1, 4):
        x = images(model, batch, seed=7)
        expected = wanted(model, name, case, x)
        assert same_selections(selections(automatic, x), expected.selected)
        assert same_selections(selections(by_hand, x), expected.selected)
        assert relative_error(automatic(x), by_hand(x)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    ["vit", pytest.param("registers_gap", marks=pytest.mark.slow), pytest.param("qk_norm", marks=pytest.mark.slow)],
)
def test_norm_keeps_the_loudest_tokens(family):
    model, case = build(family), Case((1, 2), 0.6, selector="norm")
    x = images(model, 3)
    expected = wanted(model, family, case, x, score=lambda x, q, k: x.norm(dim=-1))
    idle = convert(model, case)
    assert same_selections(selections(idle, x), expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5
    by_user, automatic = (converted(family, case._replace(selector=other)) for other in ("loudest", "auto"))
    assert same_selections(selections(by_user, x), expected.selected)
    assert not same_selections(selections(automatic, x), expected.selected)


@torch.no_grad()
def test_random_is_repeatable_and_differs_from_block_to_block():
    model, case = build("vit"), Case(EVERY_BLOCK, 0.5, "blocks", "random")
    x = images(model, 3)
    idle = convert(model, case)
    torch.manual_seed(1)
    first = selections(idle, x)
    torch.manual_seed(2)
    assert same_selections(selections(idle, x), first)
    assert same_selections(selections(convert(build("vit"), case), x), first)
    assert torch.equal(idle(x), idle(x))
    assert len({tuple(positions[0].tolist()) for positions in first.values()}) == DEPTH
    assert [positions.shape for positions in first.values()] == [(3, 19)] * DEPTH


@torch.no_grad()
def test_random_does_not_disturb_the_users_random_numbers():
    model = build("vit")
    idle = convert(model, Case((1,), 0.5, selector="random"))
    x = images(model, 2)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    idle(x)
    assert torch.equal(torch.rand(4), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["vit", "siglip", pytest.param("parallel_things", marks=pytest.mark.slow), "hand_written"]
)
def test_function_of_the_user_chooses(family):
    model, case = build(family), Case((0, 2), 0.7, selector="far_from_mean")
    x = images(model, 3)

    def score(x, q, k):
        return (x - x.mean(1, keepdim=True)).square().sum(-1) + k.square().sum((1, 3))

    expected = wanted(model, family, case, x, score=score)
    idle = convert(model, case)
    assert same_selections(selections(idle, x), expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5
    assert all("far_from_mean" in step.selector for step in idle.plan)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "registers", "gap"])
def test_tie_goes_to_the_lower_position(family):
    model, prefix = build(family), MODELS[family].prefix
    idle = convert(model, Case((1,), 0.5, "blocks", "all_alike"))
    chosen = selections(idle, images(model, 2))[1]
    assert torch.equal(chosen, torch.arange(prefix + image_tokens(model) // 2).expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("selector", ["auto", "norm", "random", "far_from_mean"])
@pytest.mark.parametrize("family", ["vit", pytest.param("registers_gap", marks=pytest.mark.slow)])
def test_choice_does_not_depend_on_batch_neighbours(family, selector):
    case = Case(EVERY_BLOCK, 0.5, "blocks", selector)
    idle = converted(family, case)
    x = images(build(family), 5, seed=6)
    together = selections(idle, x)
    for i in range(5):
        alone = selections(idle, x[i : i + 1])
        assert same_selections(alone, {block: positions[i : i + 1] for block, positions in together.items()})


def test_decorator_gives_the_function_back():
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    assert loudest(x).tolist() == [[5.0, 1.0]]


def test_unknown_evidence_is_refused_with_the_known_kinds():
    with pytest.raises(idlefx.IdleFxError) as caught:

        @idlefx.selector
        def by_entropy(entropy):
            return entropy

        convert(build("vit"), Case((1,), 0.5, selector="by_entropy"))
    message = str(caught.value)
    assert "entropy" in message and "by_entropy" in message
    for known in ("x", "q", "k", "prefix"):
        assert known in message.replace(",", " ").replace("'", " ").replace("`", " ").split()


def test_scores_of_the_wrong_shape_are_refused():
    @idlefx.selector
    def a_score_per_feature(x):
        return x.mean(1)

    model = build("vit")
    with pytest.raises(idlefx.IdleFxError) as caught:
        convert(model, Case((1,), 0.5, selector="a_score_per_feature"))
    message = str(caught.value)
    assert "a_score_per_feature" in message
    assert "48" in message and "37" in message


def test_error_inside_the_function_of_the_user_is_reported_under_its_name():
    @idlefx.selector
    def hopeful(x):
        return x.no_such_method()

    with pytest.raises(idlefx.IdleFxError, match="hopeful") as caught:
        convert(build("vit"), Case((1,), 0.5, selector="hopeful"))
    assert "no_such_method" in str(caught.value)
