"""Forms in memory: what a loss reads is the distribution that was stored, at any guidance scale."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.guidance import guide
from stages.targets import (
    BranchedTarget,
    ContinuousTarget,
    DenseTarget,
    Forbidden,
    HiddenTarget,
    LinearHead,
    SampledTarget,
    SparseTarget,
    load_heads,
    log1mexp,
    read_scales,
    restore,
)
from store.schema import Dense, Full, Head, Hidden, Stream, TopK
from store.synthetic import synthetic_manifest
from tests.stored_targets import (
    FORBIDDEN,
    SCALES,
    TARGETS,
    B,
    C,
    T,
    V,
    scene,
    softmax,
    stored,
)

EVERYTHING = torch.arange(B * T)
FORMS = {
    "top_k": SparseTarget, "top_k_tail": SparseTarget, "full": DenseTarget,
    "full_both": BranchedTarget, "hidden": HiddenTarget, "hidden_both": HiddenTarget,
    "sampled": SampledTarget, "dense": ContinuousTarget, "dense_both": ContinuousTarget,
}  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_has_its_form(kind):
    assert type(scene(kind).target()) is FORMS[kind]


@pytest.mark.parametrize("kind", ["full", "full_both", "hidden", "hidden_both"])
def test_a_whole_distribution_is_restored_at_the_scale_of_each_rollout(kind):
    made = scene(kind)
    restored = made.target().rows(EVERYTHING)
    assert isinstance(restored, DenseTarget)
    assert (restored.logits[..., list(FORBIDDEN)] == -torch.inf).all()
    found = restored.logits.double().softmax(-1).numpy().reshape(B, T, C, V)
    np.testing.assert_allclose(found, made.probabilities(), atol=2e-6)


def test_rows_of_a_target_with_levels_are_the_logits_themselves():
    made = scene("full")
    levels = np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)
    target = restore(made.arrays | {"levels": levels}, made.manifest, None, "cpu")
    found = target.rows(EVERYTHING).logits.numpy().reshape(B, T, C, V)
    np.testing.assert_allclose(found, made.logits + levels[..., None], atol=2e-6)


@pytest.mark.parametrize("kind", ["dense", "dense_both"])
def test_continuous_predictions_are_restored_at_the_scale_of_each_rollout(kind):
    made = scene(kind)
    found = made.target().rows(EVERYTHING).values.double().numpy()
    np.testing.assert_allclose(found.reshape(made.logits.shape), made.logits, atol=2e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_are_the_timesteps_asked_for_and_nothing_else(kind):
    restored = scene(kind).target()
    whole, some = restored.rows(EVERYTHING), restored.rows(torch.tensor([11, 2, 7]))
    for name, tensor in vars(whole).items():
        if isinstance(tensor, torch.Tensor):
            # A matrix product of 3 rows rounds otherwise than one of 15.
            exact = {"atol": 2e-6, "rtol": 1e-6} if "hidden" in kind else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(getattr(some, name), tensor[[11, 2, 7]], **exact, msg=name)
            assert tensor.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_ids_and_tail_hold_the_exact_probabilities_at_every_listed_temperature(temperature):
    made = scene("top_k")
    found = made.target().logprobs(temperature).double().exp().numpy()
    ids = made.arrays["ids"].astype(np.int64)
    kept = np.take_along_axis(made.probabilities(temperature), ids, -1)
    np.testing.assert_allclose(found[..., :-1], kept, rtol=2e-5, atol=5e-8)
    np.testing.assert_allclose(found[..., -1], 1 - kept.sum(-1), rtol=2e-4, atol=1e-12)


def test_a_kept_mass_far_below_one_is_restored_though_the_tail_is_nearly_everything():
    logits = np.random.default_rng(0).normal(scale=0.01, size=(1, 8, 1, 5000)).astype(np.float32)
    arrays = stored(TopK(k=2, dtype="float32"), logits, np.random.default_rng(0))
    manifest = synthetic_manifest(TopK(k=2, dtype="float32"), streams=1, vocabulary=5000)
    kept = restore(arrays, manifest, None, "cpu").logprobs(1.0)[..., :-1]
    exact = np.take_along_axis(np.log(softmax(logits.astype(np.float64))), arrays["ids"], -1)
    np.testing.assert_allclose(kept, exact, atol=5e-3)


def test_a_log_mass_above_zero_by_rounding_gives_no_nan():
    # The store lets a log mass exceed 0 by 1e-5, the rounding of two logsumexp in fp32.
    target = SparseTarget(
        torch.tensor([[0, 1]]), torch.tensor([[0.0, -1.0]]), torch.tensor([[5e-6]]), (1.0,)
    )
    logprobs = target.logprobs(1.0)
    assert logprobs.isfinite().all()
    assert logprobs[..., -1].item() == pytest.approx(0, abs=1e-5)


def test_the_complement_of_a_mass_keeps_its_digits_at_both_ends():
    logs = -np.logspace(-7, 2, 200)
    found = log1mexp(torch.from_numpy(logs).float()).double().numpy()
    exact = np.log(-np.expm1(logs.astype(np.float32).astype(np.float64)))
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=3e-7)


def test_a_temperature_that_was_not_stored_is_refused_with_those_that_were():
    with pytest.raises(UserError, match=r"temperature 1\.5 .*\[0\.5, 1\.0, 3\.0\].*roll out again"):
        scene("top_k").target().logprobs(1.5)


# Guidance at read time.

UNIT = {"float32": 2.0**-22, "float16": 2.0**-11}


def predicted(spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Both branches of a teacher, float32."""
    random = np.random.default_rng(5)
    shape = (2, B, T, C, V)
    return tuple(random.normal(scale=spread, size=shape).astype(np.float32))


def written(logits: np.ndarray, dtype: str) -> np.ndarray:
    """Forbidden ids masked, relative to the row maximum, rounded: what stage one stores."""
    masked = logits.copy()
    masked[..., list(FORBIDDEN)] = -np.inf
    return (masked - masked.max(-1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_scale_at_read_time_equals_a_store_written_at_that_scale(dtype, scale):
    cond, uncond = predicted()
    both = synthetic_manifest(Full(branches="both", dtype=dtype), C, V)
    arrays = {"cond": written(cond, dtype), "uncond": written(uncond, dtype)}
    read = restore(arrays, both, None, "cpu", scale).rows(EVERYTHING).logits
    guided = synthetic_manifest(Full(dtype=dtype), C, V)
    arrays |= {"logits": written(guide(cond, uncond, scale), dtype)}
    plain = restore({"logits": arrays["logits"]}, guided, None, "cpu").rows(EVERYTHING).logits
    allowed = [i for i in range(V) if i not in FORBIDDEN]
    assert not read.isnan().any()
    relative = (read - read.amax(-1, keepdim=True))[..., allowed]
    largest = max(float(np.abs(x[..., allowed].astype(np.float32)).max()) for x in arrays.values())
    tolerance = (abs(scale) + abs(1 - scale) + 1) * UNIT[dtype] * largest
    error = (relative - plain[..., allowed]).abs().max().item()
    assert error <= tolerance
    if dtype == "float16":  # a single branch is exact, a mix nearly uses up the bound
        assert error == 0 if scale in (0.0, 1.0) else error > tolerance / 20


def test_mixing_states_equals_mixing_the_logits_that_they_become():
    made = scene("hidden_both")
    hidden = made.target()
    logits = []
    for branch in ("cond.backbone", "uncond.backbone"):
        states = torch.from_numpy(made.arrays[branch])
        one = HiddenTarget((states,), hidden.heads, hidden.forbidden)
        logits.append(one.rows(EVERYTHING).logits.nan_to_num(neginf=0.0))
    scale = torch.tensor(SCALES).repeat_interleave(T)[:, None, None]
    mixed = made.forbidden.fill_(guide(*logits, scale))
    torch.testing.assert_close(hidden.rows(EVERYTHING).logits, mixed, atol=2e-5, rtol=1e-5)


def test_one_scale_serves_all_rollouts_alike():
    made = scene("full_both")
    one = restore(made.arrays, made.manifest, None, "cpu", 2.5)
    each = restore(made.arrays, made.manifest, None, "cpu", torch.full((B,), 2.5))
    assert torch.equal(one.rows(EVERYTHING).logits, each.rows(EVERYTHING).logits)
    other = made.target().rows(EVERYTHING).logits
    assert torch.equal(one.rows(EVERYTHING).logits[:T], other[:T])
    assert not torch.equal(one.rows(EVERYTHING).logits[T : 2 * T], other[T : 2 * T])


@pytest.mark.parametrize("kind", ["top_k", "full", "hidden", "sampled", "dense"])
def test_a_scale_for_targets_that_are_guided_already_is_refused(kind):
    made = scene(kind)
    with pytest.raises(UserError, match=r"mixed at scale 2\.5 .*branches: both"):
        restore(made.arrays, made.manifest, made.heads, "cpu", 2.5)


@pytest.mark.parametrize("kind", ["full_both", "hidden_both", "dense_both"])
def test_both_branches_without_a_scale_are_refused(kind):
    made = scene(kind)
    with pytest.raises(UserError, match=r"loss\.guidance_scale was not given.*for example 2\.5"):
        restore(made.arrays, made.manifest, made.heads, "cpu")


def test_the_scale_of_a_rollout_depends_on_seed_sample_variation_and_epoch_alone():
    keys = [("a", 0), ("b", 0), ("a", 1), ("a", 0)]
    drawn = read_scales((1.5, 3.0), 7, keys, [0, 0, 0, 1])
    assert len({*drawn.tolist()}) == 4
    assert ((drawn >= 1.5) & (drawn <= 3.0)).all()
    again = [read_scales((1.5, 3.0), 7, [k], [e]) for k, e in zip(keys, [0, 0, 0, 1], strict=True)]
    assert torch.equal(drawn, torch.cat(again))
    assert not torch.equal(drawn, read_scales((1.5, 3.0), 8, keys, [0, 0, 0, 1]))
    many = read_scales((1.0, 3.0), 0, [(str(i), 0) for i in range(400)], [0] * 400)
    assert abs(many.mean().item() - 2.0) < 0.1
    assert many.min() < 1.1
    assert many.max() > 2.9


def test_a_scale_that_is_one_number_is_that_of_every_rollout():
    assert read_scales(2.5, 0, [("a", 0), ("b", 3)], [0, 0]).tolist() == [2.5, 2.5]
    assert read_scales(None, 0, [("a", 0)], [0]) is None


# Heads.


@pytest.mark.parametrize("vectors", [1, 3])
def test_heads_serve_groups_whose_streams_lie_anywhere(vectors):
    names = ["backbone", "local", "backbone", "backbone"]
    streams = tuple(
        Stream(name=f"{group}.{place}", group=group, vocabulary=V)
        for place, group in enumerate(names)
    )
    heads = (
        Head(group="backbone", vectors=vectors, width=4),
        Head(group="local", vectors=1, width=5),
    )
    plain = synthetic_manifest(Hidden(dtype="float32"), C, V)
    manifest = plain.model_copy(update={"streams": streams, "heads": heads})
    random = np.random.default_rng(0)
    arrays = {
        "backbone": random.normal(size=(B, T, vectors, 4)).astype(np.float32),
        "local": random.normal(size=(B, T, 1, 5)).astype(np.float32),
    }
    shapes = {"backbone": (3, V, 4), "local": (1, V, 5)}
    weights = {f"{name}.weight": random.normal(size=shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": random.normal(size=shape[:2]) for name, shape in shapes.items()}
    read_only = {name: x.astype(np.float32) for name, x in weights.items()}
    for array in read_only.values():
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_heads(read_only, "cpu")
    target = restore(arrays, manifest, loaded, "cpu")
    found = target.rows(EVERYTHING).logits.view(B, T, 4, V)
    for stream, (group, place) in enumerate(
        [("backbone", 0), ("local", 0), ("backbone", 1), ("backbone", 2)]
    ):
        state = arrays[group][:, :, min(place, arrays[group].shape[2] - 1)]
        expected = state @ weights[f"{group}.weight"][place].T + weights[f"{group}.bias"][place]
        expected[..., list(FORBIDDEN)] = -np.inf
        np.testing.assert_allclose(found[:, :, stream], expected, atol=1e-5)


def test_a_head_multiplies_in_float32_under_autocast():
    head = LinearHead((0,), torch.randn(1, V, 64), torch.randn(1, V))
    nothing = Forbidden(torch.empty(0, dtype=torch.int64), None)
    target = HiddenTarget((torch.randn(1, 3, 1, 64),), (head,), nothing)
    plain = target.rows(torch.arange(3)).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(target.rows(torch.arange(3)).logits, plain)


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_stay_as_they_are_in_the_store_until_rows_are_read(kind):
    made = scene(kind)
    narrow = {
        name: torch.from_numpy(values.astype(np.float16) if values.dtype.kind == "f" else values)
        for name, values in made.arrays.items()
    }
    scale = torch.tensor(SCALES) if made.manifest.branches == "both" else None
    target = restore(narrow, made.manifest, made.heads, "cpu", scale)
    held = {part.data_ptr() for part in tensors_of(target)}
    assert {values.data_ptr() for values in narrow.values()} <= held
    read = target.rows(EVERYTHING)
    assert all(x.dtype in (torch.float32, torch.int64) for x in tensors_of(read))


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Every tensor of a target, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, Forbidden | LinearHead):
        for part in vars(value).values():
            yield from tensors_of(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)


def test_the_difference_of_a_dense_target_is_to_the_unconditional_branch():
    manifest = synthetic_manifest(Dense(dtype="float32"), 1)
    cond = np.full((1, 2, 1, 4, 3), 3.0, np.float32)
    arrays = {"cond": cond, "delta": np.full_like(cond, 2.0)}  # so the unconditional one is 1
    for scale, expected in ((0.0, 1.0), (1.0, 3.0), (2.5, 6.0)):
        guided = restore(arrays, manifest, None, "cpu", scale).rows(torch.arange(2)).values
        assert (guided == expected).all()
