"""Stage one: what is stored is what the guided teacher predicts, whoever writes it and when."""

from __future__ import annotations

import json
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.config import DatasetFacts, RolloutConfig
from stages.dataset import Dataset
from stages.errors import UserError
from stages.families.codec_lm import CodecLM
from stages.family import load_family
from stages.interruption import StopRequest
from stages.model_config import CodecLMConfig
from stages.philox import uniforms
from stages.rollout import predict, refuse_not_finite, rollout
from stages.rollout_plan import create_store, lay_out
from stages.sampling import keyed_seed
from stages.targets import load_heads, restore
from store import PredictionStore, StoreError, verify
from store.commit import ShardWriter
from tests.stopping import StopAfter

VARIANTS = {
    "plain": {},
    "stacked": {"frames_per_step": 2},
    "local": {"local_transformer": {"d_model": 16, "heads": 2}},
    "experts": {"experts": {"experts": 3, "active": 2}},
    "all": {
        "frames_per_step": 2,
        "local_transformer": {"d_model": 16, "heads": 2},
        "experts": {"experts": 3, "active": 1},
    },
}


def facts_of(context_frames: int = 0) -> DatasetFacts:
    return DatasetFacts(
        alphabet=" abcdefg",
        speakers=("low", "high"),
        codebooks=2,
        codes_per_codebook=14,
        frame_rate_hz=25.0,
        audio_codec="ab",
        context_frames=context_frames,
    )


def samples_of(count: int = 7, context: bool = False) -> list[dict]:
    random, samples = np.random.default_rng(0), []
    for i in range(count):
        sample = {
            "sample_id": f"clip/{i}",
            "text": "".join(random.choice(list(" abcdefg"), size=2 + i)),
            "speaker": ("low", "high")[i % 2],
            "codes": random.integers(0, 14, size=2 * (3 + i)).astype(np.uint16),
        }
        if context:
            sample["context_codes"] = random.integers(0, 14, size=2 * (2 + i)).astype(np.uint16)
        samples.append(sample)
    return samples


def teacher_of(context: bool = False, seed: int = 0, **changes) -> CodecLM:
    """A teacher with weights large enough for its branches to disagree."""
    tiny = {
        "d_model": 16, "heads": 2, "text_layers": 1, "decoder_layers": 2, "feed_forward": 24,
        "dropout": 0.5, "max_timesteps": 40, "max_characters": 20,
    }  # fmt: skip
    config = CodecLMConfig.model_validate(tiny | changes)
    facts = facts_of(7 * context).model_dump(mode="json")
    family = CodecLM.build(config, facts, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            if "norm" not in name and "position" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    family.condition_dropout = 0.1
    return family


def config_of(**changes) -> RolloutConfig:
    plain = {
        "variations": 2,
        "guidance": {"scale": 2.5},
        "sampler": {"temperature": 0.9, "min_timesteps": 2, "max_timesteps": 10, "top_k": 12},
        "target": {"kind": "full", "dtype": "float32"},
        "rollouts_per_shard": 5,
        "batch_size": 3,
    }
    return RolloutConfig.model_validate(plain | changes)


def store_of(path: Path, family: CodecLM, samples: list[dict], *, seed: int = 4, **changes):
    config = config_of(**changes)
    return create_store(
        path,
        family,
        lay_out(config, family, samples, facts=family.facts, dataset_fingerprint="d", seed=seed),
    ), config


def written(path: Path, family: CodecLM, samples: list[dict], **changes) -> PredictionStore:
    """A complete store of a teacher's rollouts."""
    store, config = store_of(path, family, samples, **changes)
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert rollout(
        family, store, by_id, store.missing(), batch_size=config.batch_size, stop=StopRequest()
    )
    return PredictionStore.open(path)


def logprobs_again(family: CodecLM, store: PredictionStore, key, samples: list[dict], scale: float):
    """Guided log-probabilities [T, C, V] in fp64 of a stored rollout, scored alone."""
    codes = torch.from_numpy(store[key].codes.astype(np.int64))[None]
    sample = next(sample for sample in samples if sample["sample_id"] == key[0])
    with torch.no_grad():
        lengths = torch.tensor([codes.shape[1]])
        logits = family.score([sample], codes, lengths, cfg_scale=scale).logits[0].double()
    logits[..., list(family.forbidden)] = -torch.inf
    return logits.log_softmax(-1)


def stored_logprobs(store: PredictionStore, key) -> torch.Tensor:
    """Log-probabilities [T, C, V] in fp64 that a `full` store holds of a rollout."""
    logits = store[key].arrays["full.logits"].astype(np.float64)
    return torch.from_numpy(logits).log_softmax(-1)


@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("context", [False, True], ids=["no context", "context"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scoring_a_stored_rollout_again_gives_what_was_stored(tmp_path, variant, context, source):
    family, samples = teacher_of(context, **VARIANTS[variant]), samples_of(context=context)
    store = written(tmp_path / "store", family, samples, source=source)
    assert len(store) == 14
    assert verify(tmp_path / "store").ok
    for key in store:
        stored = stored_logprobs(store, key)
        again = logprobs_again(family, store, key, samples, 2.5)
        torch.testing.assert_close(stored.exp(), again.exp(), atol=2e-5, rtol=1e-4, msg=str(key))


def test_what_a_top_k_store_keeps_is_the_same_distribution(tmp_path):
    family, samples = teacher_of(), samples_of()
    target = {"kind": "top_k", "k": 5, "temperatures": [1.0, 2.0], "dtype": "float16"}
    store = written(tmp_path / "store", family, samples, target=target)
    for key in store:
        again = logprobs_again(family, store, key, samples, 2.5)
        arrays = store[key].arrays
        kept = restore(
            {name.split(".")[1]: x.copy() for name, x in arrays.items() if "." in name},
            store.manifest, None, "cpu",
        )  # fmt: skip
        for temperature in (1.0, 2.0):
            exact = (again / temperature).log_softmax(-1).exp()
            logprobs, tail = kept.logprobs(temperature).double().split([5, 1], -1)
            expected = exact.gather(-1, kept.ids.long())
            torch.testing.assert_close(logprobs.exp(), expected, atol=1e-3, rtol=1e-2)
            left = 1 - expected.sum(-1, keepdim=True)
            torch.testing.assert_close(tail.exp(), left, atol=1e-4, rtol=1e-3)
        drawn = torch.from_numpy(arrays["codes"].astype(np.int64))
        assert (kept.ids.long() == drawn[..., None]).any(-1).all()
        assert (kept.ids.long() == family.end_id).any(-1).all()


BOTH = {"branches": "both", "dtype": "float32"}
WIDE = {"kind": "top_k", "k": 5, "temperatures": [0.5, 1.0, 2.0], "moments": True,
        "tail_samples": 6, "dtype": "float32"}  # fmt: skip


def head_logits(store: PredictionStore, key, part: str) -> torch.Tensor:
    """Logits [T, C, V] in fp64 of a store of hidden states, by the heads that lie in it."""
    heads, arrays = store.heads, store[key].arrays
    logits = []
    for head in store.manifest.heads:
        weight = heads[f"{head.group}.weight"].astype(np.float64)
        bias = heads[f"{head.group}.bias"].astype(np.float64)
        states = arrays[f"hidden.{part}{head.group}"].astype(np.float64)
        assert states.shape[1] == head.vectors
        states = np.broadcast_to(states, (len(states), len(weight), head.width))
        logits.append(np.einsum("cvd,tcd->tcv", weight, states) + bias)
    return torch.from_numpy(np.concatenate(logits, 1))


def masked_probabilities(logits: torch.Tensor, family: CodecLM) -> torch.Tensor:
    return logits.index_fill(-1, torch.tensor(family.forbidden), -torch.inf).softmax(-1)


@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("branches", ["guided", "both"])
@pytest.mark.parametrize("variant", ["stacked", "all"])
def test_stored_states_and_heads_give_the_teacher_s_whole_distribution(
    tmp_path, variant, branches, source
):
    family, samples = teacher_of(**VARIANTS[variant]), samples_of(4)
    target = {"kind": "hidden", "branches": branches, "dtype": "float32"}
    store = written(tmp_path / "store", family, samples, target=target, source=source)
    assert [head.group for head in store.manifest.heads] == sorted(
        {stream.group for stream in family.streams}
    )
    for key in store:
        for scale in (2.5,) if branches == "guided" else (0.0, 1.0, 2.5, 4.0):
            if branches == "guided":
                logits = head_logits(store, key, "")
            else:
                cond, uncond = (head_logits(store, key, part) for part in ("cond.", "uncond."))
                logits = scale * cond + (1 - scale) * uncond
            again = logprobs_again(family, store, key, samples, scale).exp()
            stored = masked_probabilities(logits, family)
            torch.testing.assert_close(stored, again, atol=3e-5, rtol=3e-4, msg=str(key))


@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("drawn_at", [1.0, 2.5])
def test_both_branches_are_stored_whatever_scale_the_codes_were_drawn_at(
    tmp_path, drawn_at, source
):
    family, samples = teacher_of(**VARIANTS["local"]), samples_of(4)
    settings = {"guidance": {"scale": drawn_at}, "source": source}
    store = written(tmp_path / "store", family, samples, target={"kind": "full"} | BOTH, **settings)
    plain = written(tmp_path / "plain", family, samples, **settings)
    for key in store:
        assert store[key].codes.tolist() == plain[key].codes.tolist()
        for part, scale in (("cond", 1.0), ("uncond", 0.0)):
            again = logprobs_again(family, store, key, samples, scale)
            stored = torch.from_numpy(store[key].arrays[f"full.{part}"].copy()).double()
            assert (stored.amax(-1) == 0).all()
            torch.testing.assert_close(
                stored.softmax(-1), again.exp(), atol=2e-5, rtol=2e-4, msg=str(key)
            )


def restored_probabilities(store: PredictionStore, key, scale: float | None) -> torch.Tensor:
    """What a loss reads of a stored rollout, [T, C, V] in fp64."""
    prefix = f"{store.manifest.target.kind}."
    arrays = {
        name.removeprefix(prefix): torch.from_numpy(array.copy())[None]
        for name, array in store[key].arrays.items()
        if name != "codes"
    }
    target = restore(arrays, store.manifest, load_heads(store.heads, "cpu"), "cpu", scale)
    return target.rows(torch.arange(len(store[key]))).logits.double().softmax(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2)])
@pytest.mark.parametrize("kind", ["full", "hidden"])
def test_branches_mixed_when_they_are_read_are_what_a_store_of_that_scale_holds(
    tmp_path, kind, dtype, tolerance
):
    family, samples = teacher_of(**VARIANTS["all"]), samples_of(4)
    target = {"kind": kind, "dtype": dtype}
    both = written(
        tmp_path / "both", family, samples, source="dataset", target=target | {"branches": "both"}
    )
    for scale in (1.0, 2.0, 3.5):
        guidance = {"scale": scale}
        guided = written(
            tmp_path / f"{scale}", family, samples, source="dataset", target=target,
            guidance=guidance,
        )  # fmt: skip
        for key in guided:
            mixed = restored_probabilities(both, key, scale)
            expected = restored_probabilities(guided, key, None)
            torch.testing.assert_close(mixed, expected, atol=tolerance, rtol=tolerance)


def drawn_again(probabilities: torch.Tensor, store: PredictionStore, key, draws: int) -> np.ndarray:
    """Ids [T, C, draws] by inverting cumulative sums in NumPy with the numbers of the key."""
    timesteps, streams, _ = probabilities.shape
    seed = keyed_seed(store.manifest.seed, "target draws", *key)
    numbers = uniforms(torch.full((timesteps,), seed), torch.arange(timesteps), streams, draws)
    ends = probabilities.double().numpy().cumsum(-1)
    ends /= ends[..., -1:]
    return np.sort((ends[..., None, :] <= numbers.numpy()[..., None]).sum(-1), -1)


@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_samples_are_drawn_from_the_guided_teacher_with_numbers_of_their_own(tmp_path, source):
    family, samples = teacher_of(**VARIANTS["local"]), samples_of(4)
    greedy = {"temperature": 0.3, "top_k": 2, "max_timesteps": 8}  # of no effect on the target
    store = written(
        tmp_path / "store", family, samples, source=source, sampler=greedy,
        target={"kind": "sampled", "draws": 40},
    )  # fmt: skip
    kinds, agreed = set(), []
    for key in store:
        again = logprobs_again(family, store, key, samples, 2.5).exp()
        ids = store[key].arrays["sampled.ids"]
        # Rounding of the logits moves a draw in a hundred thousand over a border.
        agreed.append((ids == drawn_again(again, store, key, 40)).mean())
        kinds.add(ids.tobytes())
    assert np.mean(agreed) > 0.999
    assert len(kinds) == len(store), "variations must not share their draws"


def test_a_top_k_store_may_carry_moments_and_draws_of_its_tail(tmp_path):
    family, samples = teacher_of(**VARIANTS["all"]), samples_of(4)
    store = written(tmp_path / "store", family, samples, target=WIDE)
    agreed = []
    for key in store:
        again = logprobs_again(family, store, key, samples, 2.5)
        arrays = {n.removeprefix("top_k."): x.copy() for n, x in store[key].arrays.items()}
        ids = torch.from_numpy(arrays["ids"].astype(np.int64))
        tail = again.scatter(-1, ids, -torch.inf)
        for place, temperature in enumerate((0.5, 1.0, 2.0)):
            exact = (tail / temperature).logsumexp(-1) - (again / temperature).logsumexp(-1)
            stored = torch.from_numpy(arrays["tail_logmass"][..., place]).double()
            torch.testing.assert_close(stored, exact, atol=2e-4, rtol=2e-4)
        agreed.append((arrays["tail_ids"] == drawn_again(tail.exp(), store, key, 6)).mean())
        allowed = np.delete(again.numpy(), family.forbidden, axis=-1)
        relative = allowed - allowed.max(-1, keepdims=True)
        expected = np.stack([relative.mean(-1), relative.std(-1)], -1)
        np.testing.assert_allclose(arrays["moments"], expected, rtol=1e-3, atol=1e-4)
    assert np.mean(agreed) > 0.999


TARGETS = {
    "top_k": WIDE,
    "sampled": {"kind": "sampled"},
    "full": {"kind": "full", "branches": "both"},
    "hidden": {"kind": "hidden", "branches": "both"},
}


def arrays_of(store: PredictionStore) -> dict[tuple, bytes]:
    return {
        (*key, name): array.tobytes() for key in store for name, array in store[key].arrays.items()
    }


@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_store_does_not_depend_on_the_blocks_in_which_it_was_reduced(
    tmp_path, monkeypatch, kind, source
):
    family, samples = teacher_of(**VARIANTS["local"]), samples_of(4)
    settings = {"target": TARGETS[kind], "source": source}
    whole = written(tmp_path / "whole", family, samples, **settings)
    monkeypatch.setattr("stages.capture.CPU_BLOCK_VALUES", 1)
    parted = written(tmp_path / "parted", family, samples, **settings)
    assert shard_bytes(whole.path) == shard_bytes(parted.path)


@pytest.mark.parametrize("kind", TARGETS)
def test_codes_that_are_scored_in_parts_give_the_same_up_to_how_products_are_rounded(
    tmp_path, monkeypatch, kind
):
    family, samples = teacher_of(**VARIANTS["local"]), samples_of(4)
    settings = {"target": TARGETS[kind], "source": "dataset"}
    whole = written(tmp_path / "whole", family, samples, **settings)
    monkeypatch.setattr("stages.rollout.SCORED_TIMESTEPS", 3)
    parted = written(tmp_path / "parted", family, samples, **settings)
    if kind == "hidden":  # which multiplies nothing
        assert shard_bytes(whole.path) == shard_bytes(parted.path)
    for key in whole:
        for name, array in whole[key].arrays.items():
            near = 2e-3 if array.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(parted[key].arrays[name], array, near, near, err_msg=name)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_draws_of_targets_do_not_depend_on_the_batch_or_on_an_interruption(tmp_path, kind):
    family, samples = teacher_of(), samples_of()
    names = {"top_k": "top_k.tail_ids", "sampled": "sampled.ids"}
    store = written(tmp_path / "a", family, samples, target=TARGETS[kind])
    other = written(
        tmp_path / "b", family, samples[::-1], target=TARGETS[kind],
        batch_size=5, rollouts_per_shard=14,
    )  # fmt: skip
    for key in store:
        ours, theirs = (s[key].arrays[names[kind]] for s in (store, other))
        assert ours.tolist() == theirs.tolist()
    begun, _ = store_of(tmp_path / "c", family, samples, target=TARGETS[kind])
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert not rollout(family, begun, by_id, begun.missing(), batch_size=3, stop=StopAfter(3))
    resumed = written(tmp_path / "c", family, samples, target=TARGETS[kind])
    assert shard_bytes(resumed.path) == shard_bytes(store.path)


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_the_profile_is_the_manifest_s_and_every_array_is_of_it(tmp_path, profile):
    family, samples = teacher_of(), samples_of(4)
    store = written(tmp_path / "store", family, samples, target=WIDE, profile={"kind": profile})
    assert store.manifest.profile.kind == profile
    assert verify(store.path).ok
    exact = written(tmp_path / "exact", family, samples, target=WIDE)
    for key in store:
        ours, theirs = store[key].arrays, exact[key].arrays
        for name in ("codes", "top_k.ids", "top_k.tail_ids"):
            assert ours[name].tolist() == theirs[name].tolist()
        ours, theirs = (torch.from_numpy(a["top_k.logits"].copy()).double() for a in (ours, theirs))
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
        assert kl.max() < (1e-12 if profile == "fast" else 1e-3)


class DiskFull(Exception):
    """What a test lets the store raise."""


def test_what_fails_in_the_thread_that_writes_ends_the_rollout_with_its_own_words(
    tmp_path, monkeypatch
):
    family, samples = teacher_of(), samples_of(4)
    store, _ = store_of(tmp_path / "store", family, samples)
    commits = iter([ShardWriter.commit])

    def commit(writer: ShardWriter) -> bool:
        for works in commits:
            return works(writer)
        raise DiskFull

    monkeypatch.setattr(ShardWriter, "commit", commit)
    by_id = {sample["sample_id"]: sample for sample in samples}
    with pytest.raises(DiskFull):
        rollout(family, store, by_id, store.missing(), batch_size=3, stop=StopRequest())
    assert PredictionStore.open(tmp_path / "store").committed == [0]
    assert not [t for t in threading.enumerate() if t.name.startswith("shard-writer")]
    monkeypatch.undo()
    resumed = written(tmp_path / "store", family, samples)
    assert shard_bytes(resumed.path) == shard_bytes(written(tmp_path / "w", family, samples).path)


def test_the_targets_are_of_the_guided_teacher_and_not_of_the_condition_alone(tmp_path):
    family, samples = teacher_of(), samples_of()
    store = written(tmp_path / "store", family, samples, source="dataset")
    key = next(iter(store))
    stored = stored_logprobs(store, key)
    alone = logprobs_again(family, store, key, samples, 1.0)
    finite = alone.isfinite()
    assert (stored[finite] - alone[finite]).abs().max() > 0.5


def test_the_filters_of_the_sampler_choose_codes_and_leave_the_targets_whole(tmp_path):
    family, samples = teacher_of(), samples_of()
    greedy = {"temperature": 0.5, "top_k": 1, "max_timesteps": 6}
    store = written(tmp_path / "store", family, samples, sampler=greedy)
    for key in store:
        logits = store[key].arrays["full.logits"]
        allowed = np.delete(logits, family.forbidden, axis=-1)
        assert np.isfinite(allowed).all()
        if store[key].stop_reason != "end":
            assert (store[key].codes == logits.argmax(-1)).mean() > 0.8


def test_a_shard_that_another_worker_has_committed_costs_the_teacher_nothing(tmp_path, monkeypatch):
    family, samples = teacher_of(), samples_of()
    late, config = store_of(tmp_path / "store", family, samples)
    written(tmp_path / "store", family, samples)
    monkeypatch.setattr(family, "rollout", lambda *_: pytest.fail("the teacher ran again"))
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert late.missing() == [0, 1, 2]
    assert rollout(
        family, late, by_id, late.missing(), batch_size=config.batch_size, stop=StopRequest()
    )


def test_the_recordings_own_codes_are_scored_when_the_dataset_is_the_source(tmp_path):
    family, samples = teacher_of(frames_per_step=2), samples_of()
    store = written(tmp_path / "store", family, samples, source="dataset", variations=1)
    for sample in samples:
        codes = store[sample["sample_id"], 0].codes
        assert codes.tolist() == family.reference_codes(sample).tolist()
        assert (codes[-1] == family.end_id).all(), "the end must be taught"


def test_draws_depend_on_the_key_alone_not_on_the_batch_it_was_drawn_in(tmp_path):
    family, samples = teacher_of(frames_per_step=2), samples_of()
    store = written(tmp_path / "a", family, samples, batch_size=3)
    other = written(tmp_path / "b", family, samples[::-1], batch_size=5, rollouts_per_shard=14)
    alone = written(tmp_path / "c", family, samples[2:3], batch_size=1)
    assert set(store) == set(other)
    for key in store:
        assert store[key].codes.tolist() == other[key].codes.tolist()
        assert store[key].seed == other[key].seed == keyed_seed(4, *key)
    for key in alone:
        assert store[key].codes.tolist() == alone[key].codes.tolist()


@pytest.mark.parametrize("change", [{"seed": 5}, {"first_variation": 2}])
def test_another_seed_or_variation_draws_other_codes(tmp_path, change):
    family, samples = teacher_of(), samples_of()
    store = written(tmp_path / "a", family, samples)
    other = written(tmp_path / "b", family, samples, **change)
    pairs = zip(sorted(store), sorted(other), strict=True)
    same = [store[ours].codes.tolist() == other[theirs].codes.tolist() for ours, theirs in pairs]
    assert not all(same)
    assert sum(same) < len(same) / 2


def test_a_sample_of_the_same_run_draws_other_codes_in_every_variation(tmp_path):
    family, samples = teacher_of(), samples_of()
    store = written(tmp_path / "a", family, samples, variations=3)
    for sample in samples:
        drawn = {store[sample["sample_id"], v].codes.tobytes() for v in range(3)}
        assert len(drawn) == 3


def test_every_rollout_has_its_stop_reason_and_weight(tmp_path):
    family, samples = teacher_of(), samples_of(12)
    sampler = {
        "min_timesteps": 5, "max_timesteps": 9, "temperature": 1.5,
        "reference_multiple": 1.0, "truncated_weight": 0.25, "max_timesteps_weight": 0.5,
        "too_short_multiple": 0.6,
    }  # fmt: skip
    store = written(tmp_path / "a", family, samples, sampler=sampler, variations=8)
    references = {s["sample_id"]: family.timesteps(s) for s in samples}
    found = set()
    for key in store:
        one, reference = store[key], references[key[0]]
        ends = (one.codes == family.end_id).any(-1)
        rejected = len(one) < 0.6 * reference
        found.add((one.stop_reason, rejected))
        assert not ends[:5].any()
        if one.stop_reason == "end":
            assert not ends[:-1].any()
        else:
            assert not ends.any()
            assert len(one) == min(max(reference, 5), 9)
            assert one.stop_reason == ("max_timesteps" if reference >= 9 else "truncated")
        weights = {"end": 1.0, "truncated": 0.25, "max_timesteps": 0.5}
        assert one.weight == (0.0 if rejected else weights[one.stop_reason])
    assert {reason for reason, _ in found} == {"end", "truncated", "max_timesteps"}
    assert {rejected for _, rejected in found} == {True, False}


@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_nan_from_the_teacher_is_refused_by_name_and_nothing_is_committed(tmp_path, source):
    family, samples = teacher_of(), samples_of()
    store, _ = store_of(tmp_path / "store", family, samples, source=source)
    with torch.no_grad():
        family.module.head.weight[3] = torch.nan
    by_id = {sample["sample_id"]: sample for sample in samples}
    with pytest.raises(FloatingPointError) as caught:
        rollout(family, store, by_id, store.missing(), batch_size=3, stop=StopRequest())
    sample_id, variation = store.plan[0][0]
    assert "NaN" in str(caught.value)
    assert f"{sample_id!r} variation {variation}" in str(caught.value)
    if source == "dataset":
        assert "nothing of this shard was stored" in str(caught.value)
    assert PredictionStore.open(tmp_path / "store").committed == []
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def spoiled_by_a_code(store: PredictionStore, family: CodecLM) -> tuple[CodecLM, dict]:
    """A teacher that predicts NaN after a code that few draw, and where each rollout then ends."""

    def ends(code: int) -> dict:
        drawn = {key: np.flatnonzero(store[key].codes[:-1, 0] == code) for key in store}
        return {key: int(places[0]) + 1 for key, places in drawn.items() if len(places)}

    code = min((c for c in range(14) if ends(c)), key=lambda c: len(ends(c)))
    with torch.no_grad():
        family.module.code_embedding.weight[code] = torch.nan
    return family, ends(code)


@pytest.mark.parametrize("target", ["full", "hidden"])
def test_a_rollout_ends_before_the_timestep_that_is_not_finite_and_harms_no_other(
    tmp_path, monkeypatch, caplog, target
):
    monkeypatch.setattr("stages.rollout.NOT_FINITE_SHARE", 0.9)
    changes = {"target": {"kind": target, "dtype": "float32"}}
    healthy = written(tmp_path / "healthy", teacher_of(), samples_of(), **changes)
    family, ends = spoiled_by_a_code(healthy, teacher_of())
    store = written(tmp_path / "store", family, samples_of(), **changes)
    assert 0 < len(ends) < len(healthy)
    for key in healthy:
        one, other = store[key], healthy[key]
        if key in ends:
            assert (one.stop_reason, one.weight, len(one)) == ("not_finite", 0.0, ends[key])
        else:
            assert (one.stop_reason, one.weight) == (other.stop_reason, other.weight)
            assert len(one) == len(other)
        assert np.array_equal(one.codes, other.codes[: len(one)])
        for name, array in one.arrays.items():
            np.testing.assert_allclose(array, other.arrays[name][: len(one)], atol=1e-5)
    assert verify(store.path).ok
    for sample_id, variation in ends:
        assert f"{sample_id!r} variation {variation}" in caplog.text


def test_a_shard_with_too_many_rollouts_that_are_not_finite_is_refused(tmp_path):
    family = teacher_of()
    with torch.no_grad():
        family.module.code_embedding.weight[:14] = torch.nan
    with pytest.raises(FloatingPointError, match=r"of the 14 rollouts .* at most 10% may"):
        written(tmp_path / "store", family, samples_of(), rollouts_per_shard=14)
    assert PredictionStore.open(tmp_path / "store").committed == []


@pytest.mark.parametrize(
    ("count", "planned", "refused"),
    [(0, 1, False), (1, 1, True), (1, 2, False), (2, 2, True), (2, 20, False), (3, 20, True)],
)
def test_a_tenth_of_a_shard_may_be_not_finite_and_one_always_unless_it_is_all(
    count, planned, refused
):
    reasons = ["not_finite"] * count + ["end"] * (planned - count)
    with pytest.raises(FloatingPointError) if refused else nullcontext():
        refuse_not_finite(reasons, planned)


def test_a_rollout_that_is_nan_from_the_first_timestep_is_named_and_its_neighbours_are_not(
    tmp_path,
):
    family, samples = teacher_of(), samples_of()
    store, _ = store_of(tmp_path / "store", family, samples)
    with torch.no_grad():
        family.module.text_embedding.weight[family.facts.alphabet.index("g")] = torch.nan
    for number, sample in enumerate(samples):
        sample["text"] = "gag" if number == 2 else "abc"
    by_id = {sample["sample_id"]: sample for sample in samples}
    with pytest.raises(FloatingPointError) as caught:
        rollout(family, store, by_id, store.missing(), batch_size=99, stop=StopRequest())
    named = {sample["sample_id"] for sample in samples if sample["sample_id"] in str(caught.value)}
    assert named == {"clip/2"}


def test_nan_in_one_branch_only_is_noticed_too(tmp_path):
    family, samples = teacher_of(), samples_of()
    store, _ = store_of(tmp_path / "store", family, samples)
    with torch.no_grad():
        family.module.null_text[0] = torch.nan
    by_id = {sample["sample_id"]: sample for sample in samples}
    with pytest.raises(FloatingPointError, match="NaN"):
        rollout(family, store, by_id, [0], batch_size=3, stop=StopRequest())
    assert PredictionStore.open(tmp_path / "store").committed == []


def test_a_stop_drops_the_shard_in_hand_and_keeps_those_before(tmp_path):
    family, samples = teacher_of(), samples_of()
    store, _ = store_of(tmp_path / "store", family, samples)
    by_id = {sample["sample_id"]: sample for sample in samples}
    # Shards of 5 rollouts are two batches each: the fourth question is amid the second shard.
    finished = rollout(family, store, by_id, store.missing(), batch_size=3, stop=StopAfter(3))
    assert not finished
    assert PredictionStore.open(tmp_path / "store").committed == [0]
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
    assert verify(tmp_path / "store").ok
    whole = written(tmp_path / "whole", family, samples)
    resumed = written(tmp_path / "store", family, samples)
    assert shard_bytes(resumed.path) == shard_bytes(whole.path)


def test_two_workers_on_one_shard_leave_one_and_neither_fails(tmp_path):
    family, samples = teacher_of(), samples_of()
    store, _ = store_of(tmp_path / "store", family, samples)
    by_id = {sample["sample_id"]: sample for sample in samples}
    for _ in range(2):  # the second worker opened the store before the first had committed
        assert rollout(family, store, by_id, [0, 1], batch_size=3, stop=StopRequest())
    assert PredictionStore.open(tmp_path / "store").committed == [0, 1]
    assert verify(tmp_path / "store").ok


def test_guidance_of_a_teacher_without_an_unconditional_branch_warns_with_the_reason(
    tmp_path, caplog
):
    family, samples = teacher_of(), samples_of()
    store_of(tmp_path / "trained", family, samples)
    assert not caplog.records
    family.condition_dropout = 0.0
    store_of(tmp_path / "unguided", family, samples, guidance={"scale": 1.0})
    assert not caplog.records
    store_of(tmp_path / "guided", family, samples)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "scale 2.5" in record.getMessage()
    assert "trained without condition dropout" in record.getMessage()
    assert "rollout.guidance.scale: 1" in record.getMessage()
    caplog.clear()
    both = {"guidance": {"scale": 1.0}, "target": {"kind": "hidden", "branches": "both"}}
    store_of(tmp_path / "both", family, samples, **both)
    (record,) = caplog.records
    assert "target.branches: both is asked" in record.getMessage()
    assert "rollout.target.branches: guided" in record.getMessage()


DIFFERENCES = {
    "another teacher": ({"teacher": 1}, {}, "fingerprints.teacher"),
    "another dataset": ({"dataset": "e"}, {}, "fingerprints.dataset: 'd' in the store, 'e' given"),
    "another seed": ({"seed": 9}, {}, "seed: 4 in the store, 9 given"),
    "other samples": ({"samples": 6}, {}, "plan.parquet"),
    "another guidance": ({}, {"guidance": {"scale": 3.0}}, "guidance.scale: 2.5 in the store, 3.0"),
    "another target": ({}, {"target": {"kind": "top_k", "k": 4}}, "target.k"),
    "another source": ({}, {"source": "dataset"}, "source: 'teacher' in the store"),
    "other variations": ({}, {"variations": 1}, "plan.parquet"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_store_of_something_else_is_refused_naming_what_differs(tmp_path, difference):
    given, changes, words = DIFFERENCES[difference]
    samples = samples_of()
    store_of(tmp_path / "store", teacher_of(), samples)
    with pytest.raises(StoreError) as caught:
        create_store(
            tmp_path / "store",
            teacher_of(seed=given.get("teacher", 0)),
            lay_out(
                config_of(**changes),
                teacher_of(seed=given.get("teacher", 0)),
                samples[: given.get("samples", 7)],
                facts=facts_of(),
                dataset_fingerprint=given.get("dataset", "d"),
                seed=given.get("seed", 4),
            ),
        )
    assert words in str(caught.value)
    assert str(tmp_path / "store") in str(caught.value)


def test_a_store_with_colliding_keys_is_refused(tmp_path):
    samples = samples_of()
    twins = [*samples, samples[0] | {"text": "gag"}]
    with pytest.raises((StoreError, UserError), match=r"'clip/0'.* twice"):
        store_of(tmp_path / "store", teacher_of(), twins)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_more_kept_ids_than_the_teacher_has_are_refused_before_anything_is_written(tmp_path):
    target = {"kind": "top_k", "k": 16}
    with pytest.raises(UserError, match=r"k is 16 but must be <= 15"):
        store_of(tmp_path / "store", teacher_of(), samples_of(), target=target)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("k", [1, 2])
def test_fewer_kept_ids_than_must_always_be_kept_are_refused(tmp_path, k):
    # The likeliest id, the drawn code and the end id may be three different ones.
    with pytest.raises(UserError, match=rf"k is {k}.* 3"):
        store_of(tmp_path / "s", teacher_of(), samples_of(), target={"kind": "top_k", "k": k})


MISFITS = {
    "no tail to draw from": ({"kind": "top_k", "k": 15, "tail_samples": 2}, "tail_samples is 2"),
    "continuous targets": ({"kind": "dense"}, "target is 'dense'.*continuous"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_targets_that_do_not_fit_the_teacher_are_refused_with_the_reason(tmp_path, misfit):
    target, words = MISFITS[misfit]
    with pytest.raises(UserError, match=f"section rollout does not fit the teacher: .*{words}"):
        store_of(tmp_path / "store", teacher_of(), samples_of(), target=target)
    assert not (tmp_path / "store").exists()


def test_hidden_states_without_a_linear_head_for_all_streams_are_refused(tmp_path):
    family = teacher_of(**VARIANTS["local"])
    family.heads = family.heads[:1]
    with pytest.raises(UserError, match=r"no linear head for the streams of \['local'\].*top_k"):
        store_of(tmp_path / "store", family, samples_of(), target={"kind": "hidden"})
    store_of(tmp_path / "store", family, samples_of())  # no other target minds


def test_an_empty_split_is_refused_with_its_name(tmp_path):
    with pytest.raises(UserError, match="split 'train' of the dataset is empty"):
        store_of(tmp_path / "store", teacher_of(), [])


def test_a_teacher_of_another_audio_codec_is_refused(tmp_path):
    other = facts_of().model_copy(update={"audio_codec": "cd"})
    with pytest.raises(UserError, match=r"audio codec.*'ab'.*'cd'"):
        create_store(
            tmp_path / "store",
            teacher_of(),
            lay_out(
                config_of(),
                teacher_of(),
                samples_of(),
                facts=other,
                dataset_fingerprint="d",
                seed=4,
            ),
        )


def shard_bytes(store: Path) -> dict[str, bytes]:
    """Every file of the committed shards, by its path."""
    shards = store / "shards"
    return {str(p.relative_to(shards)): p.read_bytes() for p in shards.rglob("*") if p.is_file()}


SMALL_SHARDS = {"rollouts_per_shard": 2, "batch_size": 2}


@pytest.mark.slow
def test_one_worker_three_tasks_and_a_killed_one_write_the_same_bytes(
    tiny_run, run_of, start_worker
):
    section = tiny_run.document["rollout"] | SMALL_SHARDS | {"variations": 3}

    def make(name: str):
        return run_of(name, fitted=True, rollout=section, students=None)

    whole, tasks, killed = make("whole"), make("tasks"), make("killed")
    whole.do("rollout")
    planned = PredictionStore.open(whole.root / "store").planned_shards
    workers = [start_worker("rollout", tasks, f"--task={task}/3") for task in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]

    def shards() -> int:
        folder = killed.root / "store" / "shards"
        return len(list(folder.iterdir())) if folder.exists() else 0

    assert start_worker("rollout", killed).kill_when(lambda: shards() >= 3, signal.SIGKILL) == -9
    assert 3 <= shards() < planned
    resumed = start_worker("rollout", killed)
    assert resumed.wait() == 0, resumed.stderr.read_text()

    expected = shard_bytes(whole.root / "store")
    assert len(PredictionStore.open(whole.root / "store").committed) == planned > 10
    for other in (tasks, killed):
        assert shard_bytes(other.root / "store") == expected
        assert verify(other.root / "store").ok
        manifests = [run.root / "store" / "manifest.json" for run in (whole, other)]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()


def test_a_student_draws_the_codes_and_the_teacher_scores_them(tiny_run, run_of):
    student = tiny_run.root / "student"
    section = tiny_run.document["rollout"] | {
        "source": "student", "student": str(student), "first_variation": 2,
        "target": {"kind": "full", "dtype": "float32"},
        "sampler": {"end_on": "majority", "min_timesteps": 2, "max_timesteps": 8},
    }  # fmt: skip
    run = run_of("round", fitted=True, rollout=section, students=None)
    run.do("draw", "rollout")
    store = PredictionStore.open(run.root / "store")
    assert {variation for _, variation in store} == {2, 3}
    family, teacher = (
        load_family("codec_lm").load(path, device="cpu", dtype=torch.float32)
        for path in (student, tiny_run.root / "teacher")
    )
    assert store.manifest.fingerprints.student == family.fingerprint()
    samples = Dataset.open(tiny_run.root / "dataset").samples("train")
    by_id = {sample["sample_id"]: sample for sample in samples}
    own = store.manifest.model_copy(update={"source": "teacher", "guidance": type(
        store.manifest.guidance)(scale=1.0)})  # fmt: skip
    for key in list(store)[:6]:
        with torch.inference_mode():
            (drawn,) = predict(family, own, [key], by_id)
        assert store[key].codes.tolist() == drawn.arrays["codes"].tolist()
        stored = stored_logprobs(store, key)
        again = logprobs_again(teacher, store, key, samples, 2.0)
        torch.testing.assert_close(stored.exp(), again.exp(), atol=2e-5, rtol=1e-4)
        # A student that did not end must not teach that this is how speech ends.
        assert store[key].stop_reason == drawn.stop_reason
        assert store[key].weight == drawn.weight
    assert {"max_timesteps"} <= {store[key].stop_reason for key in store}


OTHER_ORIGINS = {
    "student": {"student": "teacher"},
    "sampler": {"sampler": {"top_k": 1, "max_timesteps": 8}},
    "plan": {"variations": 3},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize(
    ("stage", "changed"),
    [("draw", name) for name in OTHER_ORIGINS]
    + [("rollout", name) for name in OTHER_ORIGINS if name != "student"],  # it is loaded to draw
)
def test_codes_of_a_student_are_not_taken_for_those_of_another_or_of_other_settings(
    tiny_run, run_of, changed, stage
):
    section = tiny_run.document["rollout"] | {"source": "student", "student": "student"}

    def round_of(changes: dict):
        own = section | changes
        own["student"] = str(tiny_run.root / own["student"])
        return run_of("round", fitted=True, rollout=own, students=None)

    round_of({}).do("draw")
    other = round_of(OTHER_ORIGINS[changed])
    with pytest.raises(UserError, match=rf"00000.parquet was drawn with another {changed}.* than"):
        other.do(stage)
    assert not (other.root / "store").exists()


def test_the_plan_does_not_depend_on_workers_batches_or_targets(tmp_path):
    samples, family = samples_of(), teacher_of()
    plans = [
        store_of(tmp_path / str(number), family, samples, **changes)[0].plan
        for number, changes in enumerate(
            [{}, {"batch_size": 1}, {"processes": 3}, {"target": {"kind": "top_k", "k": 4}}]
        )
    ]
    assert all(plan == plans[0] for plan in plans)
    planned = [key for shard in plans[0] for key in shard]
    assert sorted(planned) == sorted((s["sample_id"], v) for s in samples for v in range(2))


def test_a_store_holds_what_a_student_needs_and_no_codes_of_the_recordings(tmp_path):
    store, _ = store_of(tmp_path / "store", teacher_of(), samples_of())
    assert store.samples.column_names == ["sample_id", "text", "speaker"]
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["conditioning"] == facts_of().model_dump(mode="json")
