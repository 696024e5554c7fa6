"""Which terms of the distillation loss a stored target can teach, and why it cannot the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stages.errors import UserError
from stages.loss_config import DIVERGENCES, ByEntropy, LossConfig, Recipe
from store.schema import Branches, Dense, Full, Hidden, Manifest, Sampled, Target, TopK


@dataclass(frozen=True)
class Held:
    """What a target holds, as far as a loss depends on it."""

    kind: Literal["distribution", "top_k", "sampled", "continuous"]
    temperatures: tuple[float, ...] | None = None
    """Those at which the tail is known; None for all."""
    moments: bool = True
    tail_samples: bool = False
    absolute: bool = False
    """Whether logits are known at their absolute height, and those of all ids."""

    @classmethod
    def of(cls, target: Target) -> Held:
        """Return what every target of a store holds."""
        match target:
            case TopK():
                drawn = target.tail_samples > 0
                return cls("top_k", target.temperatures, target.moments, drawn)
            case Sampled():
                return cls("sampled")
            case Dense():
                return cls("continuous")
            case Full():
                return cls("distribution", absolute=target.levels)
            case Hidden():
                return cls("distribution", absolute=True)


RENAMED = {
    "nemo": {"joint": "kl", "kl": "alpha", "ce": "alpha", "nrmse": "beta"},
    "guide": {"kl": "alpha", "ce": "alpha"},
}
"""What a recipe calls a setting, where it has another name there."""


def require_supported(form: LossConfig | Recipe, manifest: Manifest, whole: bool = True) -> None:
    """Refuse, before training starts, a loss that the targets of a store cannot support.

    `whole` says that all codes of a timestep are predicted.
    Raises `UserError` that names the setting, as the form of the section has it, says why and what
    to do.
    """
    loss = form.terms_config
    require_teachable(form, manifest.target, manifest.guidance.scale)
    if loss.joint and len(set(manifest.vocabularies)) > 1:
        reason = (
            "it is defined for streams of equally many ids, and the store's have "
            f"{list(manifest.vocabularies)} (manifest.json, streams)"
        )
        raise _refused(form, "joint", reason, "set it to false")
    if loss.joint and not whole:
        reason = "it lets the codes of a timestep compete, and the model predicts only some of them"
        raise _refused(form, "joint", reason, "set it to false")


def require_teachable(form: LossConfig | Recipe, target: Target, scale: float) -> None:
    """Refuse a loss that a store of some target cannot teach, whatever else it holds.

    `scale` is that of the store's guidance. Raises `UserError` as `require_supported` does.
    """
    loss = form.terms_config
    require(loss, Held.of(target), form)
    require_scale(getattr(target, "branches", "guided"), scale, loss.guidance_scale is not None)


def require_scale(branches: Branches, scale: float, given: bool) -> None:
    """Refuse a guidance scale for targets that are guided already, and none for both branches.

    `scale` is that at which the store's codes were drawn. Raises `UserError`.
    """
    if branches == "both" and not given:
        raise UserError(
            "loss.guidance_scale was not given, but the store keeps both branches of guidance "
            f"apart (target.branches): say at which scale to mix them, for example {scale}, at "
            "which its codes are drawn"
        )
    if branches == "guided" and given:
        raise UserError(
            f"loss.guidance_scale was given, but the store's targets are mixed at scale {scale} "
            "already: remove it, or roll out with target.branches: both (targets full, hidden and "
            "dense)"
        )


def require(loss: LossConfig, held: Held, form: LossConfig | Recipe | None = None) -> None:
    """Refuse a loss that a target cannot support; raises `UserError` in the words of `form`."""
    for setting, reason, advice in _refusals(loss, held):
        raise _refused(form or loss, setting, reason, advice)


def _refused(form: LossConfig | Recipe, setting: str, reason: str, advice: str) -> UserError:
    if not isinstance(form, LossConfig):
        if setting == "kl":  # the recipe cannot put another term in its place
            advice = f"leave recipe: {form.recipe} out, then {advice}"
        setting = RENAMED[form.recipe].get(setting, setting)
        advice = advice.replace("set it to false", "set it to per_codebook")
    return UserError(f"loss.{setting}={getattr(form, setting)}: {reason}; {advice}")


Refusal = tuple[str, str, str]
"""Setting of the loss, why the target cannot support it, what to do."""


def _refusals(loss: LossConfig, held: Held) -> Iterator[Refusal]:
    if loss.joint and not held.absolute:
        reason = (
            "it compares the logits of all ids at their absolute height, and the store holds less, "
            "or only how far they lie below the largest one"
        )
        advice = "set it to false, or roll out with the target hidden, or full with levels: true"
        yield "joint", reason, advice
    match held.kind:
        case "continuous":
            yield from _of_continuous(loss)
        case "sampled":
            yield from _of_sampled(loss)
        case "top_k":
            yield from _of_top_k(loss, held)
        case "distribution":
            if loss.tail_share:
                reason = "it shapes the tail that a top_k store cuts off, and nothing is cut here"
                yield "tail_share", reason, "set it to 0, for loss.kl compares all ids"
    if held.kind != "continuous" and loss.mse:
        reason = "it compares continuous predictions, and the store predicts ids"
        yield "mse", reason, "set it to 0; loss.logit_mse compares logits"
    if held.kind != "sampled" and loss.soft_ce:
        reason = "it reads the draws of a `sampled` store, and this one holds none"
        yield "soft_ce", reason, "set loss.kl instead, of which it is an estimate"


def _of_continuous(loss: LossConfig) -> Iterator[Refusal]:
    for name in loss.terms.keys() - {"mse", "kl_tail"}:
        reason = "it compares distributions over ids, and the store's predictions are continuous"
        yield name, reason, "set it to 0 and loss.mse above 0"


def _of_sampled(loss: LossConfig) -> Iterator[Refusal]:
    for name in DIVERGENCES:
        if getattr(loss, name):
            reason = "it needs the teacher's probabilities, and the store holds draws from them"
            advice = (
                "set it to 0 and loss.soft_ce above 0, whose gradient is that of the forward KL on "
                "average, or roll out with the target top_k, full or hidden"
            )
            yield name, reason, advice
    for name in ("nrmse", "logit_mse"):
        if getattr(loss, name):
            reason = "it needs the teacher's logits, and the store holds draws"
            yield name, reason, "set it to 0, or roll out with the target full or hidden"
    if loss.temperature != 1.0:
        reason = "the store's ids were drawn at temperature 1, and draws cannot be tempered later"
        yield "temperature", reason, "set it to 1, or roll out with the target hidden"


def _of_top_k(loss: LossConfig, held: Held) -> Iterator[Refusal]:
    tempered = any(getattr(loss, name) for name in DIVERGENCES)
    unknown = sorted(set(loss.temperatures) - set(held.temperatures or loss.temperatures))
    if tempered and unknown:
        reason = (
            "the store keeps the mass of the tail at the temperatures "
            f"{list(held.temperatures or ())} only (target.temperatures), and at "
            "another one it cannot be known"
        )
        if isinstance(loss.temperature, ByEntropy):
            reason += f"; {unknown} are missing, and 1.0 is that of the entropy"
        yield "temperature", reason, "use one of these, or roll out with it listed"
    if loss.reverse_kl_top_k is not None:
        reason = (
            "the student's likeliest ids need not be among those that the store kept of the "
            "teacher, and for the others the teacher's probability is lost"
        )
        advice = (
            "leave it out, so that the reverse KL is taken over the teacher's ids and their tail, "
            "or roll out with the target full or hidden"
        )
        yield "reverse_kl_top_k", reason, advice
    if loss.nrmse and not held.moments:
        reason = "it needs the moments of the teacher's logits, which the store is written without"
        yield "nrmse", reason, "set it to 0, or roll out with target.moments: true"
    if loss.tail_share and not held.tail_samples:
        reason = "it needs ids drawn from the tail, which the store is written without"
        yield "tail_share", reason, "set it to 0, or roll out with target.tail_samples: 8"
    if loss.tail_share and loss.temperature != 1.0:
        reason = f"the tail was drawn at temperature 1, and loss.temperature is {loss.temperature}"
        yield "tail_share", reason, "set one of them to its default"
