"""Grouping, averaging and handing back in forms that runtimes of ONNX are quick at; see `idlefx.runtime.following`."""

import math

import torch
from torch import Tensor

from idlefx.deploy.onnx_rows import parted, rows
from idlefx.runtime import following, ops
from idlefx.runtime.nearest import Anchors


def group_tokens(
    x: Tensor, logits: Tensor | None, prefix: tuple[int, ...], kept: int, anchors: Anchors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `following.group_tokens`; instead of all tokens, their products are brought to length one."""
    count, working = x.shape[1], len(prefix) + kept
    _, bound, factor, _, modulus = anchors
    image = [position for position in range(count) if position not in prefix]
    spread = [position for rank, position in enumerate(image) if rank * factor % modulus < bound]
    works = torch.tensor([position in (*prefix, *spread) for position in range(count)], device=x.device)
    precision, positions = torch.promote_types(x.dtype, torch.float32), torch.arange(count, device=x.device)
    x, ends = x.to(precision), torch.tensor(spread, device=x.device)
    per_length = x.norm(dim=-1).clamp_min(1e-12).reciprocal()
    products = x @ x.index_select(1, ends).mT * per_length.index_select(1, ends).unsqueeze(1)
    redundancy = products.amax(-1) * per_length
    if logits is not None:
        attention = logits.to(precision).masked_fill(works, -math.inf).softmax(-1)
        redundancy = redundancy - attention * (following.ATTENDED * (count - len(prefix) - len(spread)))
    ranking = redundancy.masked_fill(works, -math.inf).topk(count, dim=1).indices
    order, place = parted(ranking, positions < count - working, working)
    workers, idlers = order.narrow(1, 0, working), order.narrow(1, working, count - working)
    leaders = _nearest(x, per_length, workers, idlers, prefix)
    leader_of = torch.cat([positions[:working].expand_as(workers), leaders], 1)
    return workers, leader_of.gather(1, place), order, leaders


def _nearest(x: Tensor, per_length: Tensor, workers: Tensor, idlers: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """The place of the image worker with the largest cosine to each idle token (B, I)."""
    first = len(prefix) if ops.leads(prefix) else 0
    followed = workers.narrow(1, first, workers.shape[1] - first)
    products = rows(x, idlers) @ rows(x, followed).mT * per_length.gather(1, followed).unsqueeze(1)
    if not ops.leads(prefix):
        products = products.masked_fill(ops.are_prefix(workers, prefix).unsqueeze(1), -math.inf)
    return products.argmax(-1) + first


def average_groups(
    x: Tensor,
    workers: Tensor,
    order: Tensor,
    leaders: Tensor,
    dim: int = 1,
    batch_dim: int = 0,
    stand_for: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `following.average_groups`."""
    if (dim, batch_dim, x.ndim) != (1, 0, 3) or stand_for is not None:
        return following.average_groups(x, workers, order, leaders, dim, batch_dim, stand_for)
    precision = torch.promote_types(x.dtype, torch.float32)
    followed = following.follows(workers, leaders, precision)
    sizes = 1 + followed.sum(-1)
    idlers = rows(x, order.narrow(1, workers.shape[1], leaders.shape[1])).to(precision)
    return ((rows(x, workers) + followed @ idlers) / sizes.unsqueeze(-1)).to(x.dtype), sizes


def restore_tokens(
    x: Tensor,
    before: Tensor,
    after: Tensor,
    workers: Tensor,
    place: Tensor,
    order: Tensor,
    leaders: Tensor,
    dim: int = 1,
    batch_dim: int = 0,
) -> Tensor:
    """See `following.restore_tokens`."""
    if (dim, batch_dim, x.ndim) != (1, 0, 3):
        return following.restore_tokens(x, before, after, workers, place, order, leaders, dim, batch_dim)
    precision = torch.promote_types(x.dtype, torch.float32)
    return (rows(after.to(precision), place) + (x - rows(before.to(precision), place))).to(x.dtype)
