"""The guide's objective: α·hard + (1 − α)·soft by its formula, and under these names in the log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.errors import UserError
from stages.interruption import StopRequest
from stages.loss_config import GuideLossConfig, LossConfig
from stages.losses import distillation_loss
from stages.support import require_supported
from stages.targets import Forbidden, restore
from stages.train import train
from store.schema import Full, Hidden, Sampled, TopK
from store.synthetic import synthetic_manifest
from tests.stored_targets import ALLOWED, FORBIDDEN, B, C, T, V, stored
from tests.test_losses import CODES, weights_of
from tests.test_train import HERE, MODEL, SAMPLES, config_of, family_of, learned, store_of

GUIDE = {"recipe": "guide"}


def recipe(**changes) -> GuideLossConfig:
    return GuideLossConfig.model_validate(GUIDE | changes)


def test_its_defaults_are_those_of_the_guide():
    assert recipe().terms_config == LossConfig(kl=0.7, ce=0.3, temperature=2.0)
    changes = {"guidance_scale": 2.0, "codebook_weights": (2.0, 1.0), "auxiliary": 0.5}
    found = recipe(alpha=0.5, temperature=3.0, **changes).terms_config
    assert found == LossConfig(kl=0.5, ce=0.5, temperature=3.0, **changes)
    with pytest.raises(ValidationError, match=r"alpha\n.*less than or equal to 1"):
        recipe(alpha=1.1)


def by_formula(logits: torch.Tensor, student: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Σ w·(0.3·CE + 0.7·4·KL of the categories at T = 2), from dense logits in fp64."""
    masked = student.double().clone()
    masked[..., list(FORBIDDEN)] = -torch.inf
    ce = -masked.log_softmax(-1).gather(-1, CODES.unsqueeze(-1)).squeeze(-1)
    p, q = ((x / 2).softmax(-1) for x in (logits, masked))
    p, q = (torch.einsum("...mv,...v->...m", groups, x) for x in (p, q))
    any_mass = p > 0  # nothing is outside where all ids are kept
    ratio = torch.where(any_mass, p, 1.0) / torch.where(any_mass, q, 1.0)
    kl = (p * ratio.log()).sum(-1)
    return (weights_of().double() * (0.3 * ce + 0.7 * 2**2 * kl)).sum()


@pytest.mark.parametrize("k", [6, len(ALLOWED), None], ids=["top 6", "all kept", "full"])
def test_it_is_its_formula_on_the_logits_of_all_ids(k):
    random = np.random.default_rng(3)
    logits = random.normal(scale=2.0, size=(B, T, C, V)).astype(np.float32)
    logits[..., list(FORBIDDEN)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    target = (
        Full(dtype="float32") if k is None else TopK(k=k, temperatures=(1.0, 2.0), dtype="float32")
    )
    manifest = synthetic_manifest(target, streams=C, vocabulary=V)
    with np.errstate(divide="ignore"):
        arrays = stored(target, logits, random)
    student = torch.from_numpy(random.normal(size=(B, T, C, V)).astype(np.float32))
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    loss, terms = distillation_loss(
        ours, restore(arrays, manifest, None, "cpu"), CODES, weights_of(),
        Forbidden.of(manifest, "cpu"), recipe().terms_config,
    )  # fmt: skip
    loss.backward()

    groups = torch.eye(V, dtype=torch.float64)[ALLOWED].expand(B, T, C, -1, -1)
    if k is not None:
        ids = torch.from_numpy(arrays["ids"].astype(np.int64))
        kept = torch.nn.functional.one_hot(ids, V).double()
        rest = 1 - kept.sum(-2, keepdim=True)
        rest[..., list(FORBIDDEN)] = 0
        groups = torch.cat([kept, rest], -2)
    expected = by_formula(torch.from_numpy(logits).double(), theirs, groups)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)
    total = 0.3 * float(terms["ce"]) + 0.7 * float(terms["kl"])
    assert total == pytest.approx(float(loss.detach()), rel=1e-6)


def test_the_hard_labels_of_a_dataset_store_are_the_recordings_own_codes(tmp_path):
    objective, _, batch = learned(store_of(tmp_path / "store", "full"), GUIDE)
    assert set(objective.terms) == {"hard", "soft"}
    student, expected = family_of(1), 0.0
    for sample in SAMPLES:
        frames = sample["codes"].reshape(-1, 2)
        end = [[15, 15]]  # after 14 codes and the begin id
        codes = torch.from_numpy(np.concatenate([frames, end]))
        with torch.no_grad():
            logits = student.score([sample], codes[None], torch.tensor([len(codes)])).logits[0]
        logits[..., 14] = -torch.inf
        expected -= float(logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum())
    assert float(objective.terms["hard"]) == pytest.approx(expected, rel=1e-5)
    assert batch.weight == sum(len(sample["codes"]) + 2 for sample in SAMPLES)


def test_the_log_has_hard_soft_and_total_at_every_report(tmp_path):
    store = store_of(tmp_path / "store", "full")
    config, folder = config_of(GUIDE, MODEL, steps=6, log_every=2), tmp_path / "student"
    assert train(
        family_of(1), store, config, folder, seed=0, identity="", place=HERE, stop=StopRequest()
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert not {"ce", "kl"} & line.keys()
        assert line["total"] == pytest.approx(0.3 * line["hard"] + 0.7 * line["soft"], rel=1e-5)
    assert lines[-1]["total"] < lines[0]["total"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TopK(k=5), r"loss\.temperature=2\.0: .*\[1\.0\] only.*listed"),
        (Sampled(), r"loss\.alpha=0\.3: .*draws.*; leave recipe: guide out, then set it to 0"),
    ],
)
def test_what_a_store_cannot_teach_is_refused_by_the_names_of_the_recipe(target, message):
    with pytest.raises(UserError, match=message):
        require_supported(recipe(), synthetic_manifest(target))


@pytest.mark.parametrize("target", [Full(), Hidden(), TopK(k=5, temperatures=(1.0, 2.0))])
def test_stores_that_know_the_temperature_are_not(target):
    require_supported(recipe(), synthetic_manifest(target))
