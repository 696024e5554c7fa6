"""Guidance: the formula, its fixed points, and the precision it is computed in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.guidance import guide
from stages.sampling import mask_forbidden


def branches(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 50)
    cond, uncond = (5 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return cond, uncond


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.5, 7.0])
def test_guided_probabilities_are_a_product_of_powers_of_both_branches(scale):
    # Independent of logits: p_guided is proportional to p_uncond^(1 - s) * p_cond^s.
    cond, uncond = branches()
    guided = guide(cond.float(), uncond.float(), scale).double().softmax(-1)
    product = uncond.softmax(-1) ** (1 - scale) * cond.softmax(-1) ** scale
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)


def test_scale_one_is_the_condition_and_scale_zero_the_unconditional_branch():
    cond, uncond = branches(torch.float32)
    assert torch.equal(guide(cond, uncond, 1.0), cond)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)


def test_two_equal_branches_are_left_as_they_are_at_any_scale():
    cond, _ = branches(torch.float32)
    torch.testing.assert_close(guide(cond, cond, 4.0), cond, atol=1e-5, rtol=1e-6)


def test_bfloat16_branches_are_mixed_in_float32():
    cond, uncond = (x.bfloat16() for x in branches())
    guided = guide(cond, uncond, 2.5)
    assert guided.dtype == torch.float32
    exact = -1.5 * uncond.double().numpy() + 2.5 * cond.double().numpy()
    # A result rounded to bfloat16 would be off by up to 2^-9 of its size.
    np.testing.assert_allclose(guided.numpy(), exact, rtol=1e-5, atol=1e-5)


def test_masking_before_mixing_would_give_nan_so_it_comes_after():
    cond, uncond = branches(torch.float32)
    before = guide(mask_forbidden(cond, [7]), mask_forbidden(uncond, [7]), 2.5)
    assert before[..., 7].isnan().all()
    after = mask_forbidden(guide(cond, uncond, 2.5), [7])
    assert (after[..., 7] == -torch.inf).all()
    assert after[..., :7].isfinite().all()
