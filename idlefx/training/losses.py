"""What fine-tuning minimises besides the task: the distances to the dense model."""

import torch.nn.functional as F
from torch import Tensor

from idlefx.runtime.cut_loss import wide


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of class distributions: `Σ p_teacher · (log p_teacher − log p_student)`, averaged over the batch.

    Args:
        student: Logits (B, …, classes).
        teacher: Logits of the dense model, of the same shape; no gradient flows into them.

    Returns:
        A scalar.

    Source:
        IdleViT, arXiv:2310.05654, and DynamicViT, arXiv:2106.02034, who write it KL(student ‖ teacher);
        `IdleViTTotalLoss` in losses.py of github.com/Ackesnal/IdleViT computes `kl_div(student, teacher)` as here.
    """
    ours, theirs = (wide(logits).log_softmax(dim=-1) for logits in (student, teacher.detach()))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features brought to length one.

    Args:
        student: Features (B, …, C) that the head reads, such as those of the class token.
        teacher: The dense model's, of the same shape; no gradient flows into them.

    Returns:
        A scalar; as the entries of a vector of length one are small, it is of the order of 1 / C.

    Source:
        IdleViT, arXiv:2310.05654; `IdleViTTotalLoss` in losses.py of github.com/Ackesnal/IdleViT.
    """
    ours, theirs = (F.normalize(wide(features), dim=-1) for features in (student, teacher.detach()))
    return F.mse_loss(ours, theirs)
