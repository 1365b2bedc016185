"""Test the distances of consistency methods against float64."""

import pytest
import torch

from fastdmd.methods.consistency import errors, huber


@pytest.mark.parametrize("c", [1e-3, 0.3])
def test_pseudo_huber_keeps_its_digits_near_zero(c):
    """As sqrt(d^2 + c^2) - c, float32 has no digit right at d = 1e-3 c, and gives zero at 1e-4 c."""
    d = torch.logspace(-8, 3, 45) * c
    a, b = d.clone().requires_grad_(True), torch.zeros_like(d)
    exact = d.double().requires_grad_(True)
    (exact.square() / ((exact.square() + float(c) ** 2).sqrt() + float(c))).sum().backward()
    value = d.double().square() / ((d.double().square() + c**2).sqrt() + c)
    found = huber(a, b, c)
    found.sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(errors("huber", a, b, c), found, rtol=0, atol=0)


def test_the_yardstick_is_pseudo_huber():
    """Where float64 cancels little, value and gradient are those of sqrt(d^2 + c^2) - c."""
    c, d = 0.3, torch.tensor([-2.0, -0.1, 0.05, 1.0, 50.0], dtype=torch.float64, requires_grad=True)
    found = huber(d, torch.zeros_like(d), c)
    torch.testing.assert_close(found, (d**2 + c**2).sqrt() - c, rtol=1e-12, atol=0)
    found.sum().backward()
    torch.testing.assert_close(d.grad, (d / (d**2 + c**2).sqrt()).detach(), rtol=1e-12, atol=0)
