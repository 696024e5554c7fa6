"""A denoiser whose linear layers are held in fewer bits while it is recorded."""

from __future__ import annotations

from collections.abc import Collection

import torch

from stages.diffusion.denoiser import Denoiser
from stages.quantization import quantize, require_layers
from store.schema import Quantization, QuantizationMethod


def quantize_denoiser(
    denoiser: Denoiser,
    method: QuantizationMethod,
    *,
    keep: Collection[str] = (),
    device: str | torch.device,
) -> Quantization:
    """Quantize the linear layers of a denoiser that was loaded on the CPU, and move it to `device`.

    What the family names in `full_precision` stays as it is, and so do layers that `keep` names or
    matches; what became of each layer is returned and logged. Raises `UserError` where a name in
    `keep` is that of no layer, or the method is not to be had on the device.
    """
    require_layers(denoiser.module, keep, "rollout.keep")
    return quantize(denoiser.module, method, device=device, keep=(*denoiser.full_precision, *keep))
