"""Classifier-free guidance: the only place that holds its formula."""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Mix conditional and unconditional predictions at a guidance scale.

    `cond` and `uncond` are [..., V] logits (or any continuous prediction) of equal shape and any
    floating dtype; the result is float32, because rounding grows by |scale| + |1 - scale|. Scale 1
    is the conditional prediction and 0 the unconditional one. Forbidden ids are masked after
    mixing, never before: with scale > 1 a masked -inf would become NaN.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (2207.12598), in the convention
    `scale = 1 + w`.
    """
    return (1.0 - scale) * uncond.float() + scale * cond.float()
