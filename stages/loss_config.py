"""Settings of the distillation loss: its terms, or a recipe of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from stages.ranges import GuidanceScale, Positive, Share, Weight
from store.schema import Record

Mean = Literal["predictions", "rollouts"]

DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
"""Terms of the distillation loss that compare probabilities, and so have a temperature."""


class ByEntropy(Record):
    """A temperature for each prediction, by how unsure the teacher is of it."""

    by_entropy: tuple[tuple[float, float], ...]
    """Pairs (nats, temperature): from this entropy of the teacher at temperature 1 on, up to the
    next pair's. The first is of 0 nats. Falling temperatures soften what it is sure of the most."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that it chooses among."""
        return tuple(temperature for _, temperature in self.by_entropy)

    def __str__(self) -> str:
        return f"{{by_entropy: {[list(pair) for pair in self.by_entropy]}}}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        nats, temperatures = zip(*self.by_entropy, strict=True) if self.by_entropy else ((), ())
        rising = all(a < b for a, b in pairwise(nats))
        if not nats or nats[0] != 0 or not rising or min(temperatures) <= 0:
            raise ValueError(
                f"temperature={self} must be pairs of nats, from 0 on and rising, and a "
                "temperature above 0: {by_entropy: [[0, 2.0], [1.5, 1.0]]}"
            )
        if list(temperatures) not in (sorted(temperatures), sorted(temperatures, reverse=True)):
            raise ValueError(
                f"temperature={self} must only rise or only fall with the entropy: put the "
                "temperatures in order"
            )
        return self


def _temperature_form(value: Any) -> str:
    return "by entropy" if isinstance(value, Mapping | ByEntropy) else "number"


Temperature = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[ByEntropy, Tag("by entropy")],
    Discriminator(_temperature_form),
]


class LossConfig(Record):
    """Terms of the distillation loss; a weight of 0 leaves a term out."""

    kl: float = Field(1.0, ge=0)
    """Weight of the forward KL, exact over the kept ids and their tail."""
    tail_share: Share = 0.0
    """Weight, within `kl`, of the shape of the tail; a `top_k` store needs `tail_samples`."""
    reverse_kl: float = Field(0.0, ge=0)
    """Weight of the reverse KL."""
    reverse_kl_top_k: Positive | None = None
    """Take it over the student's k likeliest ids and the rest; null takes the teacher's ids."""
    jsd: float = Field(0.0, ge=0)
    """Weight of the generalised Jensen-Shannon divergence."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Share of the teacher in its mixture: near 0 it acts like the forward KL."""
    skew_kl: float = Field(0.0, ge=0)
    """Weight of the forward KL to a mixture of both."""
    skew_reverse_kl: float = Field(0.0, ge=0)
    """Weight of the reverse KL to a mixture of both."""
    skew_alpha: float = Field(0.1, gt=0, lt=1)
    """Share of the model itself that these two mix into the other one."""
    tvd: float = Field(0.0, ge=0)
    """Weight of the total variation distance."""
    ce: float = Field(0.0, ge=0)
    """Weight of the cross entropy on the store's codes, drawn or the recording's own."""
    soft_ce: float = Field(0.0, ge=0)
    """Weight of the cross entropy on the draws of a `sampled` store."""
    nrmse: float = Field(0.0, ge=0)
    """Weight of the normalised error of the logits; a `top_k` store needs `moments`."""
    logit_mse: float = Field(0.0, ge=0)
    """Weight of the mean square error of the centred logits; of the kept ones in `top_k`."""
    mse: float = Field(0.0, ge=0)
    """Weight of the mean square error of continuous predictions."""
    temperature: Temperature = 1.0
    """Temperature of the divergences, times its square; a `top_k` manifest must list it.

    One number, or {by_entropy: [[nats, number], ...]} for one per prediction."""
    joint: bool = False
    """NeMo 3.0.0's own `kl`, `ce` and `nrmse`, for comparison: codebooks compete."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per rollout and epoch, of a store of both branches."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""
    local_share: Share = 0.5
    """Share of the local transformer's streams in the loss; the decoder's own have the rest."""
    local_start_step: int = Field(0, ge=0)
    """Optimizer step at which the local transformer's loss begins."""
    local_ramp_steps: int = Field(0, ge=0)
    """Optimizer steps over which it grows from nothing to its share."""
    auxiliary: float = Field(1.0, ge=0)
    """Weight of the model's own losses, such as the balance of its experts."""
    mean: Mean = "predictions"
    """Over which a batch's loss is a mean: all predictions by weight, or the means of its rollouts,
    each times its weight, over their number."""

    @cached_property
    def terms(self) -> dict[str, float]:
        """Weights of the active terms by the names they have in the log."""
        names = (*DIVERGENCES, "ce", "soft_ce", "nrmse", "logit_mse", "mse")
        weights = {name: float(getattr(self, name)) for name in names}
        weights["kl_tail"] = self.kl * self.tail_share
        return {name: weight for name, weight in weights.items() if weight > 0}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.terms:
            raise ValueError("all terms of the loss weigh 0, so nothing would be learned; set one")
        for name, of in (("tail_share", "kl"), ("reverse_kl_top_k", "reverse_kl")):
            if getattr(self, name) and not getattr(self, of):
                raise ValueError(
                    f"{name}={getattr(self, name)} belongs to {of}, whose weight is 0; "
                    f"set {of}, or leave {name} out"
                )
        others = sorted(self.terms.keys() - {"kl", "ce", "nrmse"})
        if self.joint and others:
            raise ValueError(
                f"joint={self.joint} knows the terms kl, ce and nrmse, and not {others}: set their "
                "weights to 0, or joint to false"
            )
        if self.joint and isinstance(self.temperature, ByEntropy):
            raise ValueError(
                f"joint={self.joint} has one temperature for all codes of a timestep, and "
                f"temperature={self.temperature} chooses one for each: give a number, or set joint "
                "to false"
            )
        return self

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which a store must know the teacher."""
        if isinstance(self.temperature, ByEntropy):
            return 1.0, *self.temperature.temperatures
        return (self.temperature,)

    @property
    def terms_config(self) -> LossConfig:
        """Return the terms and weights themselves: this."""
        return self

    @property
    def log_names(self) -> dict[str, str]:
        """What terms are called in the log where it is not by their own names: none."""
        return {}


class NemoLossConfig(Record):
    """The loss of NeMo's online distillation of MagpieTTS in its own terms, with its defaults."""

    recipe: Literal["nemo"]
    """Chooses this form of the section."""
    alpha: Share = 0.3
    """Share of the cross entropy on the drawn codes; the KL has the rest."""
    beta: float = Field(2.0, ge=0)
    """Weight of the normalised error of the logits."""
    temperature: float = Field(1.0, gt=0)
    """Distillation temperature; a `top_k` manifest must list it."""
    kl: Literal["per_codebook", "joint"] = "per_codebook"
    """`joint` is that of NeMo 3.0.0, over all codebooks together, and needs absolute logits."""
    local_share: Share = 0.1
    """Share of the local transformer's streams in the loss (lt_loss_weight)."""
    local_start_step: int = Field(3000, ge=0)
    """Optimizer step at which their loss begins (lt_distillation_start_step)."""
    local_ramp_steps: int = Field(2000, ge=0)
    """Optimizer steps over which it grows to its share (lt_distillation_ramp_len)."""
    auxiliary: float = Field(1.0, ge=0)
    """Weight of the model's own losses (moe_loss_weight)."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per rollout and epoch, of a store of both branches."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""

    @cached_property
    def terms_config(self) -> LossConfig:
        """Return the terms and weights that the recipe stands for."""
        same = {"recipe", "alpha", "beta", "kl"}
        return LossConfig(
            kl=1 - self.alpha,
            ce=self.alpha,
            nrmse=self.beta,
            joint=self.kl == "joint",
            mean="rollouts",
            **self.model_dump(exclude=same),
        )

    @property
    def log_names(self) -> dict[str, str]:
        """What terms are called in the log where it is not by their own names: none."""
        return {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.terms_config  # whose own checks hold here too
        return self


class GuideLossConfig(Record):
    """The loss of a guide to distilling Orpheus: α·hard + (1 − α)·soft, the soft part T²·KL."""

    recipe: Literal["guide"]
    """Chooses this form of the section."""
    alpha: Share = 0.3
    """Share of the cross entropy on the store's codes (`hard`); T²·KL (`soft`) has the rest."""
    temperature: Temperature = 2.0
    """Distillation temperature T; a `top_k` manifest must list it.

    One number, or {by_entropy: [[nats, number], ...]} for one per prediction."""
    auxiliary: float = Field(1.0, ge=0)
    """Weight of the model's own losses, such as the balance of its experts."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per rollout and epoch, of a store of both branches."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""

    @cached_property
    def terms_config(self) -> LossConfig:
        """Return the terms and weights that the recipe stands for."""
        own = self.model_dump(exclude={"recipe", "alpha"})
        return LossConfig(kl=1 - self.alpha, ce=self.alpha, **own)

    @property
    def log_names(self) -> dict[str, str]:
        """What the guide calls the terms; T² is part of `soft`, their shares are of neither."""
        return {"ce": "hard", "kl": "soft"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.terms_config  # whose own checks hold here too
        return self


Recipe = NemoLossConfig | GuideLossConfig
LOSS_FORMS: dict[str, type[LossConfig | Recipe]] = {
    "plain loss": LossConfig, "nemo loss": NemoLossConfig, "guide loss": GuideLossConfig,
}  # fmt: skip
"""The forms of the section `loss` by tags, which are no words of a configuration."""


def _recipe(section: Any) -> Any:
    if isinstance(section, Mapping):
        return section.get("recipe", "plain")
    return getattr(section, "recipe", "plain")


def _loss_form(value: Any) -> str:
    return f"{_recipe(value)} loss"


def _check_recipe(value: Any) -> Any:
    if _loss_form(value) not in LOSS_FORMS:
        raise ValueError(
            f"recipe={_recipe(value)!r} is none of 'nemo' and 'guide'; leave it out to give the "
            "terms by weight"
        )
    return value


LossForm = Annotated[
    Annotated[LossConfig, Tag("plain loss")]
    | Annotated[NemoLossConfig, Tag("nemo loss")]
    | Annotated[GuideLossConfig, Tag("guide loss")],
    Discriminator(_loss_form),
    BeforeValidator(_check_recipe),
]
