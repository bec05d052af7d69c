"""The token cut loss: how much attention crosses between working and idle tokens."""

import torch
from torch import Tensor


def token_cut(queries: Tensor, keys: Tensor, index: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """How much attention crosses between the working and the idle tokens of one block.

    With m the mask of the working tokens, W = softmax(queries · keysᵀ), S_i the weight that row i gives to working
    tokens and c_i that to prefix tokens, it is the mean over images and rows of
    `m_i · 2(1 − S_i)² + (1 − m_i) · (S_i − c_i)²`. The rows of W sum to one, so 1 − S_i is the weight on idle tokens
    and S_i − c_i that on working image tokens: two sums without a difference, which half precision leaves whole.

    Args:
        queries: Of all tokens (B, N, F); the dot products with the keys are the scaled logits, averaged over heads.
        keys: Of all tokens (B, N, F).
        index: Positions (B, P + K) of the tokens that work; no gradient flows into the choice.
        prefix: Positions of the P prefix tokens; with none of them c_i is 0.

    Returns:
        A scalar in float32, or float64 if the queries are. Of the size of an attention map it holds one for all
        heads together, (B, N, N).

    Source:
        IdleViT, arXiv:2310.05654; `IdleViTTotalLoss` in losses.py of github.com/Ackesnal/IdleViT, where an "inter"
        and an "intra" term have this sum.
    """
    logits = queries @ keys.transpose(1, 2)
    weights = wide(logits).softmax(dim=2)
    works = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device).scatter(1, index, True)
    image = works.index_fill(1, torch.tensor(prefix, dtype=torch.long, device=logits.device), False)
    columns = torch.stack([~works, image], dim=2)
    on_idle, on_image = wide(weights @ columns.to(weights.dtype)).unbind(2)
    return torch.where(works, 2 * on_idle.square(), on_image.square()).mean()


def wide(x: Tensor) -> Tensor:
    """In single precision, or double if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
