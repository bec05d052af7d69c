"""The losses of fine-tuning, by hand."""

import pytest
import torch

from idlefx.runtime import cut_loss
from idlefx.training import losses


def test_loss_by_hand():
    # All weights are 1/5; tokens 0 (prefix), 1 and 3 work: S = 3/5, c = 1/5.
    flat, index = torch.zeros(1, 5, 7, dtype=torch.float64), torch.tensor([[0, 1, 3]])
    working, idle = 2 * (1 - 3 / 5) ** 2, (3 / 5 - 1 / 5) ** 2
    assert cut_loss.token_cut(flat, flat, index, (0,)).item() == pytest.approx((3 * working + 2 * idle) / 5)
    assert cut_loss.token_cut(flat, flat, index, ()).item() == pytest.approx((3 * working + 2 * (3 / 5) ** 2) / 5)
    # The last token is the prefix, and the only one that anybody looks at: nothing crosses.
    keys = torch.tensor([0.0, 0.0, 0.0, 0.0, 99.0]).view(1, 5, 1)
    assert cut_loss.token_cut(torch.ones(1, 5, 1), keys, torch.tensor([[0, 1, 4]]), (4,)).item() == 0
    assert cut_loss.token_cut(torch.ones(1, 5, 1), keys, torch.tensor([[0, 1, 4]]), (0,)).item() == pytest.approx(2 / 5)


def test_half_precision_keeps_a_small_loss():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.arange(11).expand(2, -1)
    q[:, :11], k[:, :11], k[:, 11:] = 1.0, 1.0, -1.0  # working tokens hardly look at idle ones
    q[:, 11:] = -1.0
    exact = cut_loss.token_cut(q, k, index, (0,))
    assert exact < 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        rough = cut_loss.token_cut(q.float(), k.float(), index, (0,))
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)
    assert cut_loss.token_cut(q.bfloat16(), k.bfloat16(), index, (0,)).item() == pytest.approx(exact.item(), rel=0.05)


def test_distillation_by_hand():
    student = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    p = teacher[0].softmax(0)
    expected = (p * (p / 0.5).log()).sum() / 2
    found = losses.distillation(student, teacher)
    assert found.item() == pytest.approx(expected.item())
    assert losses.distillation(teacher, student).item() != pytest.approx(expected.item())
    found.backward()
    assert student.grad is not None and teacher.grad is None


def test_feature_distance_by_hand():
    student = torch.tensor([[3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 7.0]], requires_grad=True)
    found = losses.feature_distance(student, teacher)
    assert found.item() == pytest.approx((0.6**2 + 0.2**2) / 2)
    assert losses.feature_distance(5 * student, teacher).item() == pytest.approx(found.item())
    found.backward()
    assert student.grad is not None and teacher.grad is None
