"""A class token that is repeated into every window is a prefix token of each."""

import torch
from torch import Tensor, nn

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import build, images
from tests.oracles import reference


class Windowed(nn.Module):
    """Blocks over windows of 3 x 3 patches, each with the class token of its image in front."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")
        self.blocks = self.vit.blocks

    def forward(self, image: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(image))
        first, patches = x[:, :1], x[:, 1:]
        windows = patches.unflatten(1, (2, 3, 2, 3)).permute(1, 3, 0, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        x = torch.cat([first.repeat(4, 1, 1), windows], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.vit.head(x[:, 0]).unflatten(0, (4, -1)).mean(0)


class Tiled(Windowed):
    """Tokens that are repeated along the sequence, the class token with them."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(image)).repeat(1, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.vit.head(x[:, 0])


class Picked(Windowed):
    """The class token is picked, normed, and put in front of the patches again."""

    place = 0

    def forward(self, image: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(image))
        x = torch.cat([self.vit.norm(x[:, self.place]).unsqueeze(1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_windows_idle_each_with_its_class_token():
    model = Windowed().eval()
    x = images(model.vit, 3)
    table = idlefx.inspect(model, images(model.vit, 2))
    assert {(block.tokens, block.prefix, block.class_token) for block in table} == {(10, (0,), 0)}
    idle = idlefx.convert(model, [1, 3], 0.5, schedule="blocks", example_inputs=images(model.vit, 2))
    expected = reference.run(model, {1: 4, 3: 4}, x, prefix=1, class_position=0)
    assert all(torch.equal(chosen, expected.selected[b]) for b, chosen in selections(idle, x).items())
    torch.testing.assert_close(idle(x), expected.output)


def test_tokens_repeated_along_the_sequence_bring_their_prefix_along():
    model = Tiled().eval()
    assert {block.prefix for block in idlefx.inspect(model, images(model.vit, 2))} == {(0, 37)}


def test_a_class_token_that_was_picked_stays_one_and_a_patch_is_none():
    model = Picked().eval()
    assert {block.prefix for block in idlefx.inspect(model, images(model.vit, 2))} == {(0,)}
    model.place = 1
    assert {block.prefix for block in idlefx.inspect(model, images(model.vit, 2))} == {()}
