"""Number every entry of a tensor by image, token and feature, and read off moved numbers where the tokens stand."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Factor, Layout
from idlefx.analysis.partition import NOBODY, Partition
from idlefx.analysis.refusal import refuse, refuse_movement
from idlefx.analysis.standing import factors_of, places, token_count


def numbers(layout: Layout, sides: list[Factor], batch: int) -> Tensor:
    """A number for each entry of a tensor, which tells image, token and feature: (image * M + token) * C + feature."""
    factors = [side for dim in layout for f in dim for side in (lay.opened(f) if f.role == "tokens" else (f,))]
    sizes = [batch if f.role == "batch" else f.size for f in factors]

    def along(role: str, values: Tensor) -> Tensor:
        return values.reshape([size if f.role == role else 1 for f, size in zip(factors, sizes, strict=True)])

    features = math.prod(f.size for f in factors_of(layout, ""))
    images, each = along("batch", torch.arange(batch)), along("", torch.arange(features))
    tokens = along("tokens", places(sides))
    told = torch.where(tokens == NOBODY, NOBODY, (images * token_count(sides) + tokens) * features + each)
    return told.reshape([math.prod(batch if f.role == "batch" else f.size for f in dim) for dim in layout])


@dataclass(frozen=True)
class Reading:
    """Reads a layout off numbers.

    Attributes:
        node: The operation that moved them.
        images: The factor of the batch.
        batch: How many images there are.
        count: How many tokens each has.
        features: How many features a token has.
    """

    node: fx.Node
    images: Factor
    batch: int
    count: int
    features: int

    def layout(self, numbers: Tensor) -> Layout:
        """The layout of a tensor of numbers."""
        there, rank = numbers != NOBODY, numbers.ndim
        image, token = numbers // (self.count * self.features), numbers // self.features % self.count
        feature = numbers % self.features

        def varies(x: Tensor, d: int) -> bool:
            size = x.shape[d] - 1
            ahead, back = (there.narrow(d, start, size) for start in (1, 0))
            return bool(((x.narrow(d, 1, size) != x.narrow(d, 0, size)) & ahead & back).any())

        wide = [d for d in range(rank) if numbers.shape[d] > 1]
        of_features = [d for d in wide if varies(feature, d)]
        shape = [numbers.shape[d] if d in of_features else 1 for d in range(rank)]
        mixed = math.prod(shape) != self.features or any(varies(x, d) for d in of_features for x in (image, token))
        if mixed or bool(((feature != torch.arange(self.features).view(shape)) & there).any()):
            refuse(self.node, "moves features among the tokens")
        of_images = [d for d in wide if varies(image, d)]
        if len(of_images) != 1:
            refuse_movement(self.node, "puts tokens of several images into one window")
        (dim,) = of_images
        inner = self._inner(torch.where(there, image, NOBODY), dim)
        token = torch.where(there, token, NOBODY)
        for d in of_features:
            if bool((token != token.narrow(d, 0, 1)).any()):
                refuse(self.node, "pads some features of a token alone")
            token = token.narrow(d, 0, 1)
        return self._with_places(token, of_features, list(numbers.shape), dim, inner)

    def _inner(self, image: Tensor, dim: int) -> int:
        """How many entries of the dimension that holds the batch follow one another with the same image."""
        seen = image.amax([d for d in range(image.ndim) if d != dim])
        inner = max(1, int((seen == 1).nonzero()[0])) if bool((seen == 1).any()) else 1
        regular = torch.equal(seen, torch.arange(len(seen)) // inner % self.batch)
        along = seen.view([-1 if d == dim else 1 for d in range(image.ndim)])
        if not regular or bool(((image != along) & (image != NOBODY)).any()):
            refuse_movement(self.node, "makes a window without a token, or one that spans images")
        return inner

    def _with_places(self, token: Tensor, of_features: list[int], shape: list[int], dim: int, inner: int) -> Layout:
        each = token.unflatten(dim, (-1, self.batch, inner))
        places = each.select(dim + 1, 0)
        if not torch.equal(each, places.unsqueeze(dim + 1).expand_as(each)):
            refuse(self.node, "moves the tokens of each image in another way")
        standing = places[places != NOBODY].sort().values
        if not torch.equal(standing, torch.arange(self.count)):
            does = "loses" if len(standing.unique()) < self.count else "repeats"
            refuse_movement(self.node, f"{does} tokens of the image")
        partition = Partition.of(places.reshape([size for size in places.shape if size > 1]))
        sides = iter(range(len(partition.sides)))

        def side(size: int) -> lay.Dim:
            grid, runs = partition.sides, ((0, self.count),)
            return (Factor(size, "tokens", runs, grid, next(sides), partition),) if size > 1 else ()

        dims: list[lay.Dim] = []
        for d, size in enumerate(shape):
            if d in of_features:
                dims.append(lay.features(size))
            elif d == dim:
                dims.append((*side(each.shape[d]), self.images, *side(inner)))
            else:
                dims.append(side(size))
        return tuple(map(lay.closed, dims))
