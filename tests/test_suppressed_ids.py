"""An id that a model suppresses with a huge negative logit: stored as never, read as finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.capture import Capture
from stages.family import Branch, Branches
from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.targets import Forbidden, restore
from store.encoding import array_specs, find_fault
from store.logits_codec import Logits
from store.schema import Compact, Dense, Full, Hidden, Manifest, TopK
from store.synthetic import synthetic_arrays, synthetic_manifest
from store.zarr_codecs import compact_codec

T, C, V = 6, 2, 34
SUPPRESSED = [3, 7]
LEAST = torch.finfo(torch.float32).min
DISTRIBUTION = {
    "kl": 1.0, "reverse_kl": 1.0, "jsd": 1.0, "skew_kl": 1.0, "skew_reverse_kl": 1.0, "tvd": 1.0,
    "ce": 1.0, "nrmse": 1.0, "logit_mse": 1.0,
}  # fmt: skip
TARGETS = {
    "top_k": TopK(k=V - 1, moments=True),
    "top_k_cut": TopK(k=6, moments=True, tail_samples=4),
    "full": Full(),
    "full_both": Full(branches="both"),
}


def captured(manifest: Manifest, suppression: float) -> dict[str, np.ndarray]:
    """The arrays [T, ...] of one rollout of a teacher that suppresses two ids."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (3 * torch.randn(T, C, V, generator=generator) for _ in range(2))
    cond[..., SUPPRESSED] = uncond[..., SUPPRESSED] = suppression
    capture = Capture(manifest, [("clip", 0)], torch.device("cpu"))
    branches = Branches(Branch((cond,)), Branch((uncond,)))
    rows, codes = torch.zeros(T, dtype=torch.int64), torch.zeros(T, C, dtype=torch.int64)
    capture.add(rows, torch.arange(T), codes, cond, branches)
    (arrays,) = capture.finish()()
    return arrays


def taught(manifest: Manifest, arrays: dict[str, np.ndarray], scale: float | None):
    """Terms and gradient of every loss that reads logits, of a student that knows nothing."""
    prefix = f"{manifest.target.kind}."
    batch = {n.removeprefix(prefix): x[None] for n, x in arrays.items() if n != "codes"}
    target = restore(batch, manifest, None, "cpu", scale)
    student = torch.zeros(1, T, C, V, requires_grad=True)
    codes, weights = torch.zeros(1, T, C, dtype=torch.int64), torch.ones(1, T, C)
    config = LossConfig.model_validate(DISTRIBUTION)
    forbidden = Forbidden.of(manifest, "cpu")
    loss, terms = distillation_loss(student, target, codes, weights, forbidden, config)
    loss.backward()
    return terms, student.grad


@pytest.mark.parametrize("profile", ["fast", "compact"])
@pytest.mark.parametrize("suppression", [-1e5, -1e9, LEAST])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_suppressed_id_is_stored_finite_and_teaches_nothing_that_is_nan(
    kind, dtype, suppression, profile
):
    target = TARGETS[kind].model_copy(update={"dtype": dtype})
    manifest = synthetic_manifest(target, C, V)
    arrays = captured(manifest, suppression)
    assert find_fault(manifest, arrays) is None
    if profile == "compact":
        for name, spec in array_specs(manifest).items():
            codec = compact_codec(spec, Compact())
            content = codec.encode_chunk(arrays[name])
            arrays[name] = codec.decode_chunk(content, arrays[name].shape, spec.dtype)
        assert find_fault(manifest, arrays) is None
    for scale in (0.0, 1.0, 7.0) if kind == "full_both" else (None,):
        terms, gradient = taught(manifest, arrays, scale)
        assert all(term.isfinite() for term in terms.values()), terms
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "full_both"])
def test_only_forbidden_ids_are_minus_infinity_in_the_store(kind):
    manifest = synthetic_manifest(TARGETS[kind], C, V)
    for name, array in captured(manifest, -1e9).items():
        if name != "codes":
            assert (array[..., SUPPRESSED] == -65504).all()
            assert (np.isneginf(array).nonzero()[-1] == manifest.forbidden[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_store_refuses_what_is_not_finite_at_an_allowed_id(kind, bad):
    manifest = synthetic_manifest(TARGETS[kind], C, V)
    arrays = synthetic_arrays(manifest, ("clip", 0), T)
    assert find_fault(manifest, arrays) is None
    name = {"full": "full.logits", "full_both": "full.uncond"}.get(kind, "top_k.logits")
    arrays[name] = arrays[name].copy()
    arrays[name][2, 1, 3] = bad
    fault = find_fault(manifest, arrays)
    assert fault is not None
    assert (fault.array, fault.timestep, fault.stream) == (name, 2, 1)
    assert fault.reason.startswith("it holds NaN or infinity")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_codec_of_logits_keeps_finite_what_is_finite(dtype):
    rows = np.array([[0, -1, -65504, -np.inf], [-60000, -3, 0, -200]], dtype)
    codec = Logits(3e-4)
    decoded = codec.decode_chunk(codec.encode_chunk(rows), rows.shape, rows.dtype)
    assert np.array_equal(np.isfinite(decoded), np.isfinite(rows))
    assert decoded[0, 2] < -120


@pytest.mark.parametrize("target", [Hidden(), Dense()], ids=lambda target: target.kind)
def test_numbers_beyond_float16_are_refused_with_what_to_do(target):
    manifest = synthetic_manifest(target, C, V)
    arrays = synthetic_arrays(manifest, ("clip", 0), T)
    name = next(name for name in arrays if name != "codes")
    with np.errstate(over="ignore"):
        arrays[name] = (arrays[name].astype(np.float32) * 1e6).astype(np.float16)
    fault = find_fault(manifest, arrays)
    assert fault is not None
    assert fault.array == name
    assert "set target.dtype: float32" in fault.reason
