"""What a teacher of fewer bits predicts otherwise than the one it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stages.divergences import Distribution, forward_kl
from stages.family import Family, Sample
from stages.targets import Forbidden
from store.schema import Audit, Latent, Stream


def audit_samples(
    samples: Sequence[Sample], count: int, takes: Callable[[Sample], bool]
) -> list[Sample]:
    """Return `count` samples, or all, spread evenly over those given: the same ones every time.

    Each is the first of its stretch that the teacher `takes`; a stretch without one has none.
    """
    count = min(count, len(samples))
    edges = [number * len(samples) // count for number in range(count)] + [len(samples)]
    stretches = (samples[start:end] for start, end in pairwise(edges))
    taken = (next(filter(takes, stretch), None) for stretch in stretches)
    return [sample for sample in taken if sample is not None]


@torch.inference_mode()
def predictions(family: Family, samples: Sequence[Sample], cfg_scale: float) -> list[Tensor]:
    """Score the recordings' own codes, each alone, and return what is predicted, on the CPU.

    Of every sample log-probabilities [P, V] float32 of the codes that are predicted, -inf at ids
    that no stream may predict; of continuous streams predictions [T, C, *shape]. They are guided at
    `cfg_scale`.
    """
    family.module.eval()
    device = next(family.module.parameters()).device
    found = []
    for sample in samples:
        codes = family.reference_codes(sample).unsqueeze(0).to(device)
        lengths = torch.tensor([codes.shape[1]], device=device)
        logits = family.score([sample], codes, lengths, cfg_scale=cfg_scale).logits[0].float()
        if not _continuous(family):
            logits = _forbidden(family, device).filled(logits).log_softmax(-1)
            counted = None if family.predicted is None else family.predicted(codes[0])
            logits = logits.flatten(0, 1) if counted is None else logits[counted]
        found.append(logits.cpu())
    return found


def audit(family: Family, samples: Sequence[Sample], cfg_scale: float, full: list[Tensor]) -> Audit:
    """Compare a teacher with what `predictions` found of it in float32, on the same samples."""
    pairs = list(zip(full, predictions(family, samples, cfg_scale), strict=True))
    if _continuous(family):
        count = sum(math.prod(theirs.shape[:2]) for theirs, _ in pairs)
        squares = sum(float((a - b).double().square().sum()) for a, b in pairs)
        power = sum(float(a.double().square().sum()) for a, _ in pairs)
        values = sum(a.numel() for a, _ in pairs)
        return Audit(
            samples=len(samples), predictions=count,
            mse=squares / values, mse_share=squares / max(power, np.finfo(np.float64).tiny),
        )  # fmt: skip
    kl = [forward_kl(Distribution.of(a), Distribution.of(b))[0].double() for a, b in pairs]
    together = torch.cat(kl)
    agreed = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return Audit(
        samples=len(samples),
        predictions=len(together),
        kl_mean=float(together.mean()),
        kl_p99=float(np.quantile(together.numpy(), 0.99)),
        kl_largest=max(float(each.mean()) for each in kl),
        agreement=agreed / len(together),
    )


def _continuous(family: Family) -> bool:
    return any(isinstance(stream, Latent) for stream in family.streams)


def _forbidden(family: Family, device: torch.device) -> Forbidden:
    vocabularies = tuple(s.vocabulary for s in family.streams if isinstance(s, Stream))
    return Forbidden.of_ids(family.forbidden, vocabularies, device)
