"""Stored targets of known distributions, built from definitions and not by the code under test.

A `Scene` holds what a store would hold for a batch of rollouts, and the teacher's guided
probabilities that it was made from, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.targets import Forbidden, RestoredTarget, restore
from store.schema import Dense, Full, Hidden, Manifest, Sampled, Target, TopK
from store.synthetic import synthetic_manifest

B, T, C, V, D = 3, 5, 2, 34, 6
FORBIDDEN = (32,)
ALLOWED = [i for i in range(V) if i not in FORBIDDEN]
SCALES = (2.5, 0.5, 1.0)
"""Guidance scale of each rollout of a batch."""

TARGETS: dict[str, Target] = {
    "top_k": TopK(k=6, temperatures=(0.5, 1.0, 3.0), moments=True, dtype="float32"),
    "top_k_tail": TopK(k=6, tail_samples=5, dtype="float32"),
    "full": Full(dtype="float32"),
    "full_both": Full(branches="both", dtype="float32"),
    "hidden": Hidden(dtype="float32"),
    "hidden_both": Hidden(branches="both", dtype="float32"),
    "sampled": Sampled(draws=7),
    "dense": Dense(branches="guided", dtype="float32"),
    "dense_both": Dense(dtype="float32"),
}


@dataclass(frozen=True)
class Scene:
    """A batch of stored targets and the truth about it."""

    manifest: Manifest
    arrays: dict[str, np.ndarray]
    heads: dict[str, torch.Tensor]
    logits: np.ndarray
    """[B, T, C, V] fp64: the teacher's guided logits, -inf at forbidden ids (dense: predictions)"""

    @property
    def both(self) -> bool:
        return self.manifest.branches == "both"

    @property
    def forbidden(self) -> Forbidden:
        return Forbidden.of(self.manifest, "cpu")

    def target(self) -> RestoredTarget:
        scale = torch.tensor(SCALES) if self.both else None
        return restore(self.arrays, self.manifest, self.heads, "cpu", scale)

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """[B, T, C, V] fp64."""
        return softmax(self.logits / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def guided(cond: np.ndarray, uncond: np.ndarray) -> np.ndarray:
    """[B, ...] in fp64, each rollout at its scale of `SCALES`."""
    scale = np.array(SCALES).reshape(-1, *[1] * (cond.ndim - 1))
    return (1 - scale) * uncond.astype(np.float64) + scale * cond.astype(np.float64)


def scene(kind: str, seed: int = 0, spread: float = 2.0, dtype: str = "float32") -> Scene:
    """A batch [B, T] of random targets of one kind of `TARGETS`, stored as `dtype`.

    What rounding leaves is the truth: predictions are rounded first.
    """
    target = TARGETS[kind]
    if not isinstance(target, Sampled):
        target = target.model_copy(update={"dtype": dtype})
    manifest = synthetic_manifest(target, streams=C, vocabulary=V)
    random = np.random.default_rng(seed)
    if isinstance(target, Dense):
        return _continuous(manifest, target, random)
    if isinstance(target, Hidden):
        return _hidden(manifest, target, random)
    cond, uncond = (_masked(random.normal(scale=spread, size=(B, T, C, V))) for _ in range(2))
    if isinstance(target, Full) and target.branches == "both":
        arrays = {"cond": cond.astype(dtype), "uncond": uncond.astype(dtype)}
        with np.errstate(invalid="ignore"):
            mixed = guided(arrays["cond"], arrays["uncond"])
        return Scene(manifest, arrays, {}, _masked(mixed))
    cond = cond.astype(dtype)
    return Scene(manifest, stored(target, cond, random), {}, cond.astype(np.float64))


def stored(target: Target, logits: np.ndarray, random: np.random.Generator) -> dict:
    """The arrays of a categorical target without states, from logits [..., V] relative to max."""
    probabilities = softmax(logits.astype(np.float64))
    match target:
        case Full():
            return {"logits": logits}
        case Sampled():
            return {"ids": drawn(probabilities, target.draws, random)}
        case TopK():
            return _top_k(target, logits, probabilities, random)
        case _:
            raise AssertionError(target)


def _top_k(target: TopK, logits: np.ndarray, p: np.ndarray, random: np.random.Generator) -> dict:
    ids = np.sort(np.argsort(-logits, -1)[..., : target.k], -1)
    outside = p.copy()
    np.put_along_axis(outside, ids, 0.0, -1)
    tails = []
    for temperature in target.temperatures:
        tempered = softmax(logits.astype(np.float64) / temperature)
        np.put_along_axis(tempered, ids, 0.0, -1)
        tails.append(np.log(tempered.sum(-1)))
    arrays = {
        "ids": ids.astype(np.uint16),
        "logits": np.take_along_axis(logits, ids, -1),
        "tail_logmass": np.stack(tails, -1).astype(np.float32),
    }
    if target.moments:
        allowed = logits[..., ALLOWED].astype(np.float64)
        arrays["moments"] = np.stack([allowed.mean(-1), allowed.std(-1)], -1).astype(np.float32)
    if target.tail_samples:
        tail = outside / outside.sum(-1, keepdims=True)
        arrays["tail_ids"] = drawn(tail, target.tail_samples, random)
    return arrays


def drawn(probabilities: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """[..., draws] ids uint16, rising with repeats."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    rows = [random.choice(len(p), size=draws, p=p / p.sum()) for p in flat]
    return np.sort(rows, -1).reshape(*probabilities.shape[:-1], draws).astype(np.uint16)


def _masked(logits: np.ndarray) -> np.ndarray:
    logits = logits.copy()
    logits[..., list(FORBIDDEN)] = -np.inf
    return logits - logits.max(-1, keepdims=True)


def _hidden(manifest: Manifest, target: Hidden, random: np.random.Generator) -> Scene:
    head = manifest.heads[0].model_copy(update={"width": D})
    manifest = manifest.model_copy(update={"heads": (head,)})
    weight = random.normal(size=(C, V, D)).astype(np.float32)
    bias = random.normal(size=(C, V)).astype(np.float32)
    cond, uncond = (random.normal(size=(B, T, 1, D)).astype(target.dtype) for _ in range(2))
    both = target.branches == "both"
    states = guided(cond, uncond) if both else cond.astype(np.float64)
    arrays = {"cond.backbone": cond, "uncond.backbone": uncond} if both else {"backbone": cond}
    logits = np.einsum("btd,cvd->btcv", states[:, :, 0], weight.astype(np.float64)) + bias
    heads = {"backbone.weight": torch.from_numpy(weight), "backbone.bias": torch.from_numpy(bias)}
    return Scene(manifest, arrays, heads, _masked(logits))


def _continuous(manifest: Manifest, target: Dense, random: np.random.Generator) -> Scene:
    cond, uncond = (random.normal(size=(B, T, C, 4, 3)).astype(target.dtype) for _ in range(2))
    if target.branches == "guided":
        return Scene(manifest, {"guided": cond}, {}, cond.astype(np.float64))
    arrays = {"cond": cond, "delta": cond - uncond}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    return Scene(manifest, arrays, {}, guided(exact["cond"], exact["cond"] - exact["delta"]))
