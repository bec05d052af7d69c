"""Choose, take and put: the only new tensor code that ends up in a graph."""

import torch
from torch import Tensor


def choose_tokens(scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None) -> Tensor:
    """Positions of the prefix tokens and of the image tokens that score highest.

    Args:
        scores: A score per token (B, N); those of the prefix are not looked at.
        prefix: Positions of the P prefix tokens.
        kept: K, how many image tokens to keep. A tie goes to the lower position.
        among: Positions (B, n) of the prefix tokens and of at least K image tokens to choose from; all if None.

    Returns:
        Positions (B, P + K), ascending.
    """
    if among is not None:
        scores = _ranks(scores, among)
    count = len(prefix)
    if prefix == tuple(range(count)):
        best = _highest(scores[:, count:], kept).sort(dim=1).values + count
        fixed = torch.arange(count, device=scores.device).expand(scores.shape[0], -1)
        return torch.cat([fixed, best], dim=1)
    image = torch.tensor([p for p in range(scores.shape[1]) if p not in prefix], device=scores.device)
    best = image[_highest(scores[:, image], kept)]
    fixed = torch.tensor(prefix, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([fixed, best], dim=1).sort(dim=1).values


def _highest(scores: Tensor, kept: int) -> Tensor:
    return scores.argsort(dim=1, descending=True, stable=True)[:, :kept]


def _ranks(scores: Tensor, among: Tensor) -> Tensor:
    """Scores that order as before, those of tokens to choose from above all others, whatever they were."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    allowed = torch.zeros_like(rank).scatter(1, among, scores.shape[1])
    return allowed - rank


def fixed_tokens(x: Tensor, positions: tuple[int, ...], batch_dim: int = 0) -> Tensor:
    """The same positions for every image of a batch, (B, len(positions))."""
    return torch.tensor(positions, device=x.device).expand(x.shape[batch_dim], -1)


def take_tokens(x: Tensor, index: Tensor, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Take each image's own tokens along one dimension.

    Args:
        x: Tokens along `dim`; along `batch_dim` the images, or one entry that serves all of them.
        index: Positions (B, n).
        dim: The token dimension.
        batch_dim: The batch dimension.

    Returns:
        `x` with n entries along `dim` and B along `batch_dim`.
    """
    if x.ndim == 3 and (batch_dim, dim) == (0, 1) and x.shape[0] != 1:
        return x.reshape(-1, x.shape[2])[_rows(index, x.shape[1])].unflatten(0, index.shape)
    shape = list(x.shape)
    shape[batch_dim], shape[dim] = index.shape
    where = index if batch_dim < dim else index.t()
    for d in range(x.ndim):
        if d not in (dim, batch_dim):
            where = where.unsqueeze(d)
    full = list(x.shape)
    full[batch_dim] = index.shape[0]
    return x.expand(full).gather(dim, where.expand(shape))


def put_tokens(x: Tensor, index: Tensor, tokens: Tensor, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Write each image's worked tokens back to their places; the others stay bit by bit as they were.

    Args:
        x: All tokens, such as (B, N, C).
        index: Positions (B, n), each at most once.
        tokens: The tokens that stand there now, such as (B, n, C).
        dim: The token dimension of `x` and `tokens`.
        batch_dim: Their batch dimension.
    """
    if (batch_dim, dim) != (0, 1):
        moved = put_tokens(
            x.movedim((batch_dim, dim), (0, 1)), index, tokens.movedim((batch_dim, dim), (0, 1))
        )  # fmt: skip
        return moved.movedim((0, 1), (batch_dim, dim))
    # Whole rows through index_copy: a scatter over an expanded index is ten times slower on a CPU.
    flat = x.reshape(-1, *x.shape[2:])
    rows = tokens.to(x.dtype).reshape(-1, *x.shape[2:])
    return flat.index_copy(0, _rows(index, x.shape[1]), rows).view(x.shape)


def _rows(index: Tensor, count: int) -> Tensor:
    """Positions in a batch of sequences laid end to end."""
    start = torch.arange(index.shape[0], device=index.device) * count
    return (index + start.unsqueeze(1)).reshape(-1)


def take_rows(weight: Tensor, start: int, groups: int, stride: int, width: int) -> Tensor:
    """Rows `start + g * stride + w` of a weight or bias, such as one head's part after the other's."""
    if groups == 1:
        return weight.narrow(0, start, width)
    pattern = torch.arange(groups, device=weight.device).unsqueeze(1) * stride
    return weight[(start + pattern + torch.arange(width, device=weight.device)).reshape(-1)]


def mean_tokens(x: Tensor, prefix: tuple[int, ...], dim: int) -> Tensor:
    """The mean over the image tokens along `dim`, which stays as a dimension of one."""
    count = len(prefix)
    if prefix == tuple(range(count)):
        return x.narrow(dim, count, x.shape[dim] - count).mean(dim, keepdim=True)
    image = torch.tensor([p for p in range(x.shape[dim]) if p not in prefix], device=x.device)
    return x.index_select(dim, image).mean(dim, keepdim=True)
