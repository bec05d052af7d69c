"""Which prefix token is the class token, whose query scores the image tokens."""

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.runtime.selections import selections
from idlefx.zoo import reference as zoo
from tests.models.generated import Config, inputs
from tests.models.generated import build as build_generated
from tests.models.small import build, images
from tests.oracles import reference
from tests.support.generated_check import check

SOME = {0: 0.5, 2: 0.3}


class Dense(nn.Module):
    """Returns the features of the image tokens, as a model for dense tasks does; its class token stays unread."""

    def __init__(self, name: str, unread: int) -> None:
        super().__init__()
        self.vit, self.unread = build(name), unread

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)[:, self.unread :]


def class_tokens(model: nn.Module, *x: Tensor, **options: object) -> list[int | None]:
    return [block.class_token for block in idlefx.inspect(model, x, **options)]


@torch.no_grad()
def test_single_prefix_token_that_nothing_reads_scores_the_tokens():
    model = Dense("vit", 1).eval()
    x = images(model.vit, 3)
    idle = idlefx.convert(model, list(SOME), list(SOME.values()), schedule="blocks", example_inputs=x)
    assert [step.selector for step in idle.plan if step.idles] == ["class"] * len(SOME)
    kept = {0: 18, 2: 10}
    expected = reference.run(model.vit, kept, x, prefix=1, class_position=0).selected
    of_mean = reference.run(model.vit, kept, x, prefix=1, class_position=None).selected
    chosen = selections(idle, x)
    assert all(torch.equal(chosen[block], expected[block]) for block in kept)
    assert not torch.equal(chosen[0], of_mean[0])


def test_several_prefix_tokens_that_nothing_reads_hold_no_class_token():
    model = Dense("registers", 5).eval()
    x = images(model.vit, 2)
    assert set(class_tokens(model, x)) == {None}
    with pytest.raises(idlefx.PlanError, match=r"block 1 has none: .* no prefix token, nor is there a single one"):
        idlefx.convert(model, [1], 0.5, selector="class", example_inputs=x)


def test_prefix_token_that_is_named_counts_too():
    model = Dense("registers", 5).eval()
    x = images(model.vit, 2)
    assert set(class_tokens(model, x, prefix=1)) == {0}
    assert set(class_tokens(model, x, prefix=2)) == {None}


@pytest.mark.parametrize("head", ["mean", "image_pooling"])
@pytest.mark.parametrize(("place", "wanted"), [("end", [16] * 3), ("late", [None, None, 0])])
def test_it_may_stand_at_the_end_or_join_late(head, place, wanted):
    config = Config(head=head, place=place, positions="image")
    assert class_tokens(build_generated(config), *inputs(config, 2)) == wanted
    assert check(config, SOME)


def test_reference_of_the_compatibility_table_knows_it_too():
    model = build("average_pool")
    x = images(model, 3)
    paths = [f"blocks.{i}" for i in range(4)]
    assert set(zoo.look(model, paths, lambda: model(x)).values()) == {zoo.Tokens((0,), 0)}


class Branches(nn.Module):
    """Two blocks on patches behind their mean, which is read alone, and two on the other half of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, image: Tensor) -> Tensor:
        first, second, third, fourth = self.vit.blocks
        x = self.vit.patch_embed(image)
        here, there = x[:, :20], x[:, 20:]
        here = second(first(torch.cat([here.mean(1, keepdim=True), here], dim=1)))
        return here[:, 0] + fourth(third(there)).mean(1)


def test_class_token_in_doubt_is_refused_in_every_branch():
    model = Branches().eval()
    x = images(model.vit, 2)
    table = idlefx.inspect(model, x)
    assert sorted((b.tokens, b.can_idle, "may be no prefix token" in b.refusal) for b in table) == [
        (16, True, False),
        (16, True, False),
        (21, False, True),
        (21, False, True),
    ]
    assert all(block.can_idle for block in idlefx.inspect(model, x, prefix=0))
