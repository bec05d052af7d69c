"""Operations that tokens pass one by one: a block with them idles as the reference does; over tokens it is refused."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import build, images, randomise
from tests.oracles import reference
from tests.support.messages import says

WIDTH, TOKENS = 48, 37


class Mlp(nn.Module):
    """A layer, an activation, a layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(WIDTH, 96), activation, nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


class Slopes(nn.PReLU):
    """A slope for each feature, which PReLU looks for in dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).reshape_as(x)


class SlopesByToken(nn.PReLU):
    def __init__(self) -> None:
        super().__init__(TOKENS)


class NormByRows(nn.Module):
    """The norm of LeViT: over images and tokens in one dimension, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(96)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class Aliases(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.subtract(torch.multiply(x, x.absolute()), torch.divide(x, x.abs() + 1))
        return torch.rsub(x, torch.special.expit(x)).negative()


class Bilinear(nn.Module):
    """Three operands, one letter stacked and one summed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(4, 24)), nn.Parameter(torch.empty(96, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...hd,hd,fh->...f", x.unflatten(-1, (4, 24)), self.a, self.b)


class Pooled(nn.Module):
    """Pooled along features, and the largest of each group of them."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = F.avg_pool1d(x, 2).repeat_interleave(2, -1)
        groups = x.unflatten(-1, (-1, 4)).mT
        largest, least = groups.max(-2, keepdim=True).values, groups.min(-2)[0].sum(-1, keepdim=True)
        return pairs + (groups - largest).mT.flatten(2) * least


class GroupNormByRows(nn.Module):
    """A norm of groups of features, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class OverTokens(nn.Module):
    """An operation on features first (B, C, N), which makes a gate for each image."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return x * self.operation(x.mT).flatten(1).mean(1).view(-1, 1, 1)


def with_mlp(activation: nn.Module) -> nn.Module:
    model = build("vit")
    for block in model.blocks:
        block.mlp = Mlp(deepcopy(activation))
    randomise(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")
@pytest.mark.parametrize(
    "activation",
    [
        nn.Hardswish(inplace=True),
        nn.LogSigmoid(),
        nn.PReLU(),
        Slopes(96),
        NormByRows(),
        Aliases(),
        Bilinear(),
        Pooled(),
        GroupNormByRows(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_block_idles_with_it(activation):
    model = with_mlp(activation)
    x = images(model, 3)
    idle = idlefx.convert(model, [1, 2], 0.5, schedule="blocks", example_inputs=images(model, 2, seed=1))
    expected = reference.run(model, {1: 18, 2: 18}, x, prefix=1, class_position=0)
    assert all(torch.equal(chosen, expected.selected[b]) for b, chosen in selections(idle, x).items())
    torch.testing.assert_close(idle(x), expected.output)


class ByPosition(nn.Module):
    """Gives the tokens the shape of a parameter, which does not shrink with them."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.empty(2, TOKENS, 2, 48))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.reshape_as(self.like)).flatten(2)


@pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")
@pytest.mark.parametrize(
    ("activation", "words"),
    [
        (SlopesByToken(), r"prelu.*scales over the token axis"),
        (ByPosition(), r"reshape_as.*breaks up the token axis"),
        (OverTokens(nn.AvgPool1d(2)), r"avg_pool1d.*pools neighbouring tokens"),
        (OverTokens(lambda x: x.unfold(2, 3, 1)), r"unfold.*takes overlapping patches"),
        (OverTokens(lambda x: x.max(2)[0]), r"max\.dim takes a statistic over the token axis"),
        (OverTokens(nn.GroupNorm(4, 96)), r"group_norm.*normalises over the token axis"),
    ],
    ids=["prelu", "reshape_as", "pool", "unfold", "max", "group_norm"],
)
def test_over_tokens_it_is_refused(activation, words):
    model = with_mlp(activation)
    refusal = idlefx.inspect(model, images(model, 2))[1].refusal
    assert says(refusal, words, r"test_rules\.py|activation\.py"), refusal


@pytest.mark.slow
def test_blocks_of_levit_idle():
    import timm

    model = timm.create_model("levit_128s", img_size=128).eval()
    assert [block.can_idle for block in idlefx.inspect(model, torch.randn(2, 3, 128, 128))] == [True] * 9
