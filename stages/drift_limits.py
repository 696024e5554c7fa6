"""What the drift of a store may be: what arithmetic and storage explain, and no more."""

from __future__ import annotations

import math

from stages.drift import Further, Limit, further_of
from stages.guidance import error_gain
from store.schema import Compact, Dense, Full, Hidden, Manifest, Sampled, TopK

LOGIT_ERROR = {"fp32": 1e-3, "bf16": 2.0**-5, "fp16": 2.0**-8}
"""By how much a logit may differ when a teacher is asked in another batch, or on another machine.

Of fp32 it is ten times what the families' tests hold decoding and scoring to; of the others half a
step of the type between 8 and 16, where the largest logits of a trained model lie.
"""
RELATIVE_ERROR = {"fp32": 1e-4, "bf16": 2.0**-6, "fp16": 2.0**-9}
"""The same of continuous predictions, as a share of their root mean square."""
TYPE_ERROR = {"float16": 2.0**-11, "float32": 2.0**-24}
"""Largest rounding of a stored number, as a share of it."""
REDRAWN_SHARE = {"fp32": 0.01, "bf16": 0.2, "fp16": 0.05}
"""Share of the draws that such differences may turn into others."""
MOMENT_ERROR = {"fast": 2.0**-20, "compact": 2.0**-20 + 2.0**-13}
"""The same of moments, by profile: of a sum in float32 in any order, and of 12 bits of mantissa."""
HIDDEN_LOSS_NATS = 1e-4
"""KL of hidden states rounded by 1/256 of their root mean square; it grows with the square."""


def limit_of(manifest: Manifest, precision: str, *, quantized: bool) -> Limit:
    """Return the drift that arithmetic and storage explain: more is another prediction.

    `precision` is that of the teacher, fp32, bf16 or fp16; one that is `quantized` rounds what it
    reads as coarsely as bf16 at least. Logits that are off by at most e change KL by at most e²/2
    (Hoeffding's lemma), and guidance amplifies an error (`error_gain`). Square roots
    of small divergences add up at worst. Where stage one has measured how far a teacher of fewer
    bits is from itself in float32, that counts instead.
    """
    arithmetic, told = _arithmetic(manifest, precision, quantized=quantized)
    target, gain = manifest.target, error_gain(manifest.guidance.scale)
    if isinstance(target, Sampled):
        return Limit(REDRAWN_SHARE[arithmetic], f"draws that {told} may move")
    if isinstance(target, Dense):
        value = (gain * (RELATIVE_ERROR[arithmetic] + TYPE_ERROR[target.dtype])) ** 2
        return Limit(value, f"{told}, stored in {target.dtype}")
    computed, stored = (gain * LOGIT_ERROR[arithmetic]) ** 2 / 2, _storage_loss(manifest, target)
    measured = _measured_loss(manifest)
    if arithmetic != "fp32" and measured is not None:
        # Two answers that are each that far from float32 are at most four times as far apart.
        computed = max(4 * measured, (gain * LOGIT_ERROR["fp32"]) ** 2 / 2)
        told = "four times what stage one measured from float32"
    form = "compact" if _compact(manifest) else target.dtype
    return Limit(
        (math.sqrt(computed) + math.sqrt(stored)) ** 2,
        f"{told}: {computed:.1e} nats; {target.kind} stored in {form}: {stored:.1e} nats; their "
        "square roots add up",
    )


def _arithmetic(manifest: Manifest, precision: str, *, quantized: bool) -> tuple[str, str]:
    """Return the precision that counts, and it with the guidance in words."""
    arithmetic, scale = (
        "bf16" if quantized and precision == "fp32" else precision,
        manifest.guidance.scale,
    )
    return arithmetic, f"{arithmetic} arithmetic" + (f" guided at {scale:g}" if scale != 1 else "")


def _measured_loss(manifest: Manifest) -> float | None:
    """Return the KL in nats between the teacher and itself in float32, as stage one measured it."""
    record = manifest.quantization
    return None if record is None or record.audit is None else record.audit.kl_largest


def _storage_loss(manifest: Manifest, target: TopK | Full | Hidden) -> float:
    """Return the KL in nats that rounding what is stored may cost."""
    scale, rounding = manifest.guidance.scale, TYPE_ERROR[target.dtype]
    both = manifest.branches == "both"
    gain = error_gain(scale) ** 2 if both else 1.0
    if isinstance(target, Hidden):
        steps = [rounding, *(profile.hidden_step for profile in _compact(manifest))]
        return gain * HIDDEN_LOSS_NATS * sum((256 * step) ** 2 for step in steps)
    # Relative to its row's maximum a likely logit is not below −ln V.
    typed = gain * (rounding * math.log(manifest.vocabulary)) ** 2 / 2
    # Logits of both branches are compact without loss.
    return typed if both else typed + sum(profile.loss_nats for profile in _compact(manifest))


def _compact(manifest: Manifest) -> list[Compact]:
    """Return the lossy profiles that the values went through."""
    profiles = [*(ancestor.profile for ancestor in manifest.lineage), manifest.profile]
    return [profile for profile in profiles if isinstance(profile, Compact)]


def limits_of(manifest: Manifest, precision: str, *, quantized: bool) -> list[Limit]:
    """Return the limit of the predictions, and those of what `further_of` names."""
    return [
        limit_of(manifest, precision, quantized=quantized),
        *(
            _further_limit(manifest, precision, measure, quantized=quantized)
            for measure in further_of(manifest)
        ),
    ]


def _further_limit(
    manifest: Manifest, precision: str, measure: Further, *, quantized: bool
) -> Limit:
    """Return the drift of something beside the predictions that arithmetic and storage explain.

    If logits are off by at most e, so are a row's maximum and their standard deviation; their mean
    less the maximum is by 2e, and so is what lies between two of them. The mass of the ids up to
    any one changes by at most tanh(e/2): where all up to it are off by e, and all others by −e.
    What storage rounds has been taken off what is measured (`rounding_of`); hidden states are
    judged like continuous predictions.
    """
    arithmetic, told = _arithmetic(manifest, precision, quantized=quantized)
    error = error_gain(manifest.guidance.scale) * LOGIT_ERROR[arithmetic]
    match measure:
        case "kept_ids":
            return Limit(2 * error, f"{told} moves two logits by {error:.1e} each")
        case "logit_mean":
            return Limit(2 * error, f"{told} moves a mean and a maximum by {error:.1e} each")
        case "logit_std" | "level":
            return Limit(error, f"{told} moves it by {error:.1e}")
        case "tail_draws":
            return Limit(math.tanh(error / 2), f"{told}: tanh({error:.1e} / 2) of the tail's mass")
        case "states":
            return _limit_of_states(manifest, arithmetic, told)


def rounding_of(manifest: Manifest, measure: Further) -> float:
    """Return the largest rounding of a stored number of `measure`, as a share of it."""
    if measure in ("logit_mean", "logit_std"):
        return MOMENT_ERROR["compact" if _compact(manifest) else "fast"]
    return TYPE_ERROR["float32"]


def _limit_of_states(manifest: Manifest, arithmetic: str, told: str) -> Limit:
    target = manifest.target
    assert isinstance(target, Hidden)
    gain = error_gain(manifest.guidance.scale)
    # A step is a share of the root mean square, of which no feature is off by more than half.
    steps = sum(profile.hidden_step / 2 for profile in _compact(manifest))
    stored = (TYPE_ERROR[target.dtype] + steps) * (gain if manifest.branches == "both" else 1)
    value = (gain * RELATIVE_ERROR[arithmetic] + stored) ** 2
    return Limit(value, f"{told}, stored in {'compact' if steps else target.dtype}")
