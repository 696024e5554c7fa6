"""A loss that the store cannot teach is refused before training, with the reason and a way out."""

from __future__ import annotations

import re

import pytest
import torch
from pydantic import ValidationError

from stages.errors import UserError
from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.support import require_supported
from store.schema import Full, Hidden
from store.synthetic import synthetic_manifest
from tests.stored_targets import TARGETS, B, C, T, V, scene


def loss_of(**settings) -> LossConfig:
    return LossConfig.model_validate({"kl": 0.0} | settings)


BY_KIND = {
    "continuous": ["dense"],
    "ids": ["top_k", "full", "hidden", "sampled"],
    "whole": ["full", "hidden"],
    "sampled": ["sampled"],
    "unsampled": ["top_k", "full", "hidden"],
    "top_k": ["top_k"],
    "bare top_k": ["top_k_tail"],
    "no levels": ["top_k", "full", "full_both", "sampled"],
}
REFUSED = {
    "ids of continuous": ("continuous", {"kl": 1.0}, r"loss\.kl=1\.0: .*continuous; .*loss\.mse"),
    "draws of continuous": ("continuous", {"ce": 1.0}, r"loss\.ce=1\.0: .*continuous"),
    "values of ids": ("ids", {"mse": 1.0}, r"loss\.mse=1\.0: .*predicts ids"),
    "draws that are not there": ("unsampled", {"soft_ce": 1.0}, r"loss\.soft_ce=1\.0: .*loss\.kl"),
    "probabilities of draws": (
        "sampled", {"kl": 1.0}, r"loss\.kl=1\.0: .*draws from them; .*loss\.soft_ce above 0",
    ),
    "divergence of draws": ("sampled", {"jsd": 1.0, "ce": 1.0}, r"loss\.jsd=1\.0: .*draws"),
    "error of draws": ("sampled", {"nrmse": 1.0}, r"loss\.nrmse=1\.0: .*teacher's logits"),
    "square error of draws": ("sampled", {"logit_mse": 1.0}, r"loss\.logit_mse=1\.0: .*logits"),
    "temperature of draws": (
        "sampled", {"soft_ce": 1.0, "temperature": 2.0},
        r"loss\.temperature=2\.0: .*drawn at temperature 1.*; set it to 1",
    ),
    "unlisted temperature": (
        "top_k", {"kl": 1.0, "temperature": 2.0},
        r"loss\.temperature=2\.0: .*\[0\.5, 1\.0, 3\.0\].*; use one of these, or roll out with it",
    ),
    "the student's own ids": (
        "top_k", {"reverse_kl": 1.0, "reverse_kl_top_k": 4},
        r"loss\.reverse_kl_top_k=4: .*student's likeliest ids.*lost; leave it out",
    ),
    "no moments": ("bare top_k", {"nrmse": 1.0}, r"loss\.nrmse=1\.0: .*target\.moments: true"),
    "no tail samples": (
        "top_k", {"kl": 1.0, "tail_share": 0.1}, r"loss\.tail_share=0\.1: .*target\.tail_samples",
    ),
    "levels that are not known": (
        "no levels", {"kl": 1.0, "joint": True},
        r"loss\.joint=True: .*absolute height.*; set it to false.*hidden, or full with levels",
    ),
    "no tail": ("whole", {"kl": 1.0, "tail_share": 0.1}, r"loss\.tail_share=0\.1: .*nothing"),
}  # fmt: skip
CASES = [
    pytest.param(kind, settings, message, id=f"{name}-{kind}")
    for name, (kinds, settings, message) in REFUSED.items()
    for kind in BY_KIND[kinds]
]


@pytest.mark.parametrize(("kind", "settings", "message"), CASES)
def test_what_a_store_cannot_teach_is_refused_before_training_and_by_the_loss(
    kind, settings, message
):
    made, loss = scene(kind), loss_of(**settings)
    with pytest.raises(UserError, match=message):
        require_supported(loss, made.manifest)
    student = torch.zeros(B, T, C, *((4, 3) if kind == "dense" else (V,)))
    codes, weights = torch.zeros(B, T, C, dtype=torch.int64), torch.ones(B, T, C)
    with pytest.raises(UserError, match=message):
        distillation_loss(student, made.target(), codes, weights, made.forbidden, loss)


def test_draws_from_the_tail_are_of_temperature_1_though_the_store_lists_another():
    made = scene("top_k")
    target = made.manifest.target.model_copy(update={"tail_samples": 3})
    manifest = made.manifest.model_copy(update={"target": target})
    with pytest.raises(UserError, match=r"loss\.tail_share=0\.5: .*loss\.temperature is 3\.0"):
        require_supported(loss_of(kl=1.0, tail_share=0.5, temperature=3.0), manifest)
    require_supported(loss_of(kl=1.0, tail_share=0.5), manifest)


@pytest.mark.parametrize("kind", ["full_both", "hidden_both", "dense_both"])
def test_a_store_of_both_branches_needs_a_scale(kind):
    term = {"mse": 1.0} if kind.startswith("dense") else {"kl": 1.0}
    with pytest.raises(UserError, match=r"loss\.guidance_scale was not given.*branches"):
        require_supported(loss_of(**term), scene(kind).manifest)
    for scale in (2.5, [1.0, 3.0]):
        require_supported(loss_of(guidance_scale=scale, **term), scene(kind).manifest)


@pytest.mark.parametrize("kind", ["top_k", "full", "hidden", "sampled", "dense"])
def test_a_guided_store_takes_no_scale(kind):
    terms = {"sampled": {"ce": 1.0}, "dense": {"mse": 1.0}}.get(kind, {"kl": 1.0})
    with pytest.raises(UserError, match=r"loss\.guidance_scale was given, but .*branches: both"):
        require_supported(loss_of(guidance_scale=2.0, **terms), scene(kind).manifest)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_store_can_teach_something(kind):
    term = {"sampled": "soft_ce", "dense": "mse", "dense_both": "mse"}.get(kind, "kl")
    scale = {"guidance_scale": 2.0} if kind.endswith("_both") else {}
    require_supported(loss_of(**{term: 1.0}, **scale), scene(kind).manifest)


def test_a_temperature_that_no_term_uses_is_not_refused():
    require_supported(loss_of(ce=1.0, temperature=2.0), scene("top_k").manifest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "all terms of the loss weigh 0"),
        ({"ce": 1.0, "tail_share": 0.5}, "tail_share=0.5 belongs to kl"),
        ({"kl": 1.0, "reverse_kl_top_k": 3}, "reverse_kl_top_k=3 belongs to reverse_kl"),
        ({"kl": 1.0, "guidance_scale": (3.0, 1.0)}, "0 <= low <= high"),
        ({"kl": 1.0, "guidance_scale": -1.0}, "at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        loss_of(**settings)


def test_the_names_of_the_terms_are_those_of_their_settings():
    loss = loss_of(kl=2.0, tail_share=0.25, ce=1.0)
    assert loss.terms == {"kl": 2.0, "ce": 1.0, "kl_tail": 0.5}


@pytest.mark.parametrize("target", [Full(levels=True), Hidden(), Hidden(branches="both")])
def test_absolute_logits_support_what_is_not_centred(target):
    scale = {"guidance_scale": 2.0} if target.branches == "both" else {}
    loss = loss_of(kl=0.7, ce=0.3, nrmse=2.0, joint=True, **scale)
    require_supported(loss, synthetic_manifest(target))


def test_streams_that_compete_must_have_equally_many_ids():
    manifest = synthetic_manifest(Full(levels=True))
    streams = list(manifest.streams)
    streams[1] = streams[1].model_copy(update={"vocabulary": 20})
    uneven = manifest.model_copy(update={"streams": tuple(streams)})
    with pytest.raises(UserError, match=r"joint=True: .*have \[34, 20\]"):
        require_supported(loss_of(kl=1.0, joint=True), uneven)


@pytest.mark.parametrize("settings", [{"jsd": 1.0}, {"kl": 1.0, "tail_share": 0.5}])
def test_other_terms_than_those_of_nemo_do_not_join(settings):
    with pytest.raises(ValidationError, match=r"joint=True knows the terms kl, ce and nrmse"):
        loss_of(joint=True, **settings)
