"""A store of another profile holds the same, within the loss that its manifest states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import DamagedShard, PredictionStore, StoreError
from store.chunk_codec import ChunkCodec
from store.convert import Conversion, convert
from store.logits_codec import Logits
from store.schema import (
    Ancestor,
    Compact,
    Dense,
    Fast,
    Full,
    Hidden,
    Profile,
    Sampled,
    Target,
    TopK,
)
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from store.verify import verify
from store.zarr_codecs import LogMass, Pco, Rounded, States

TARGETS: dict[str, Target] = {
    "top_k": TopK(k=4, temperatures=(1.0, 2.0), moments=True, tail_samples=3),
    "full": Full(),
    "full_levels": Full(levels=True),
    "full_both": Full(branches="both"),
    "sampled": Sampled(draws=5),
    "hidden": Hidden(),
    "hidden_both": Hidden(branches="both", dtype="float32"),
    "dense": Dense(),
}
ROUNDED = (".logits", "tail_logmass", "moments", "hidden")


def made(path: Path, target: Target, shards: int = 3, **more: Any) -> PredictionStore:
    """A store of which the last of four shards is not committed."""
    store = synthetic_store(path, synthetic_manifest(target, **more), 8, 1, 2)
    for shard in range(shards):
        write_synthetic_shard(store, shard, 150)
    return PredictionStore.open(path)


def probabilities(logits: Any) -> Any:
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def divergence(p: Any, q: Any) -> Any:
    """KL(p, q) [...] of probabilities [..., K] that may be 0 in both."""
    return (p * np.log(np.divide(p, q, out=np.ones_like(p), where=p > 0))).sum(-1)


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in tree(root).items()}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_compact_copy_is_exact_but_for_what_its_profile_rounds(
    tmp_path: Path, target: Target
) -> None:
    source = made(tmp_path / "fast", target)
    before = tree(source.path)
    done = convert(source.path, tmp_path / "compact", Compact())
    assert tree(source.path) == before
    copy = PredictionStore.open(tmp_path / "compact")
    ancestor = Ancestor(fingerprint=source.fingerprint, profile=Fast())
    assert copy.manifest.lineage == done.lineage == (ancestor,)
    assert copy.manifest.model_copy(update={"profile": Fast(), "lineage": ()}) == source.manifest
    assert (copy.plan, copy.samples, copy.committed) == (source.plan, source.samples, [0, 1, 2])
    assert verify(copy.path).ok
    for name, head in source.heads.items():
        np.testing.assert_array_equal(copy.heads[name], head)
    for shard in source.committed:
        ours, theirs = source.shard(shard), copy.shard(shard)
        for one, two in zip(ours, theirs, strict=True):
            assert (one.stop_reason, one.weight, one.seed) == (
                two.stop_reason,
                two.weight,
                two.seed,
            )
        for name, loss in done.losses.items():
            equal = np.array_equal(ours.arrays[name], theirs.arrays[name])
            assert loss.exact == (not any(part in name for part in ROUNDED))
            assert equal or not loss.exact
    assert (done.shards, done.written, done.missing, done.rollouts) == (3, 3, 1, 6)
    assert done.bytes_after < done.bytes_before == shard_bytes(source)
    assert done.bytes_after == shard_bytes(copy)
    assert done.max_kl <= 3e-4 * (1 + 1e-6)


def shard_bytes(store: PredictionStore) -> int:
    files = [
        p for p in (store.path / "shards").rglob("*") if p.is_file() and p.name != "shard.json"
    ]
    return sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_fast_copy_of_a_compact_store_loses_nothing(tmp_path: Path, target: Target) -> None:
    source = made(tmp_path / "compact", target, profile=Compact())
    done = convert(source.path, tmp_path / "fast", Fast())
    assert all(loss.exact for loss in done.losses.values())
    assert (done.mean_kl, done.max_kl) == (0, 0)
    copy = PredictionStore.open(tmp_path / "fast")
    for shard in source.committed:
        for name, array in source.shard(shard).arrays.items():
            np.testing.assert_array_equal(copy.shard(shard).arrays[name], array)


def test_the_divergence_of_logits_and_of_the_tail_is_that_of_their_rows(tmp_path: Path) -> None:
    source = made(tmp_path / "fast", TopK(k=5, temperatures=(1.0, 2.0)))
    done = convert(source.path, tmp_path / "compact", Compact(loss_nats=2e-3))
    copy = PredictionStore.open(tmp_path / "compact")
    kept, tails = [], []
    for shard in source.committed:
        one, two = (store.shard(shard).arrays for store in (source, copy))
        logits = [array["top_k.logits"].astype(np.float64) for array in (one, two)]
        at = [t**2 * divergence(*(probabilities(x / t) for x in logits)) for t in (1, 2)]
        kept.append(np.maximum(*at))
        masses = (np.exp(a["top_k.tail_logmass"].astype(np.float64)) for a in (one, two))
        tails.append(divergence(*(np.stack([mass, 1 - mass], -1) for mass in masses)))
    for name, rows in (("top_k.logits", kept), ("top_k.tail_logmass", tails)):
        loss, kl = done.losses[name], np.concatenate(rows)
        assert loss.mean_kl == pytest.approx(kl.mean(), rel=1e-6, abs=1e-12)
        assert loss.max_kl == pytest.approx(kl.max(), rel=1e-6, abs=1e-12)
    assert 0 < done.losses["top_k.tail_logmass"].max_kl < done.losses["top_k.logits"].mean_kl
    assert done.max_kl == done.losses["top_k.logits"].max_kl <= 2e-3


def chain(
    tmp_path: Path, target: Target, profiles: Sequence[Profile]
) -> tuple[PredictionStore, PredictionStore, Conversion]:
    """A store, what became of it through one profile after another, and the last conversion."""
    source = store = made(tmp_path / "0", target, shards=1)
    for number, profile in enumerate(profiles, 1):
        done = convert(store.path, tmp_path / str(number), profile)
        store = PredictionStore.open(tmp_path / str(number))
    return source, store, done


@pytest.mark.parametrize("target", [TopK(k=5, dtype="float32"), Full()], ids=["top_k", "full"])
def test_no_conversion_makes_the_loss_of_an_earlier_one_forgotten(
    tmp_path: Path, target: Target
) -> None:
    profiles = [Compact(loss_nats=0.05), Fast(), Compact(loss_nats=1e-6)]
    source, last, done = chain(tmp_path, target, profiles)
    assert [ancestor.profile for ancestor in last.manifest.lineage] == [Fast(), *profiles[:2]]
    assert last.manifest.lineage[0].fingerprint == source.fingerprint
    name = f"{target.kind}.logits"
    lost = divergence(*(probabilities(s.shard(0).arrays[name]) for s in (source, last)))
    assert 0.02 < lost.max() <= done.stated_nats
    assert done.stated_nats == pytest.approx((0.05**0.5 + 1e-3) ** 2)
    assert done.max_kl < 1e-4


def test_roundings_that_build_up_stay_within_what_their_profiles_state(tmp_path: Path) -> None:
    losses = (1e-3, 7e-4, 1.3e-3, 9e-4)
    source, last, done = chain(tmp_path, Full(), [Compact(loss_nats=loss) for loss in losses])
    lost = divergence(*(probabilities(s.shard(0).arrays["full.logits"]) for s in (source, last)))
    assert max(losses) < lost.max() <= done.stated_nats
    assert done.stated_nats == pytest.approx(sum(loss**0.5 for loss in losses) ** 2)


def test_the_roundings_of_states_add_up_in_what_is_stated(tmp_path: Path) -> None:
    steps = (0.2, 0.13, 0.21)
    source, last, done = chain(tmp_path, Hidden(), [Compact(hidden_step=step) for step in steps])
    one, two = (s.shard(0).arrays["hidden.backbone"].astype(float) for s in (source, last))
    sizes = np.sqrt((one**2).mean(-1, keepdims=True))
    assert max(steps) / 2 < (np.abs(one - two) / sizes).max() <= done.stated_rms
    assert (done.stated_nats, done.stated_rms) == (0, pytest.approx(sum(steps) / 2))


def test_states_are_compared_through_their_heads(tmp_path: Path) -> None:
    source = made(tmp_path / "fast", Hidden(), shards=1)
    done = convert(source.path, tmp_path / "compact", Compact(hidden_step=0.1))
    copy = PredictionStore.open(tmp_path / "compact")
    states = [store.shard(0).arrays["hidden.backbone"][:, 0] for store in (source, copy)]
    chosen = np.linspace(0, len(states[0]) - 1, 32).astype(int)
    allowed = np.delete(np.arange(34), source.manifest.forbidden)
    rows = []
    for weight, bias in zip(
        source.heads["backbone.weight"], source.heads["backbone.bias"], strict=True
    ):
        logits = (part[chosen].astype(np.float64) @ weight[allowed].T for part in states)
        rows.append(divergence(*(probabilities(part + bias[allowed]) for part in logits)))
    loss = done.losses["hidden.backbone"]
    assert loss.mean_kl == pytest.approx(np.mean(rows), rel=1e-3)
    assert loss.max_kl == pytest.approx(np.max(rows), rel=1e-3)


class Interrupted(Exception):
    pass


def test_an_interrupted_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = made(tmp_path / "fast", TARGETS["top_k"])

    def stop_after_one(shards: Sequence[int]) -> Iterator[int]:
        yield shards[0]
        raise Interrupted

    whole = convert(source.path, tmp_path / "whole", Compact())
    with pytest.raises(Interrupted):
        convert(source.path, tmp_path / "copy", Compact(), stop_after_one)
    kept = tree(tmp_path / "copy/shards/00000")
    again = convert(source.path, tmp_path / "copy", Compact())
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
    assert tree(tmp_path / "copy/shards/00000") == kept
    assert again == whole.model_copy(update={"written": 2})
    assert convert(source.path, tmp_path / "copy", Compact()).written == 0


def test_progress_wraps_the_list_of_shards(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(shards: Sequence[int]) -> Iterable[int]:
        seen.extend(shards)
        return shards

    convert(made(tmp_path / "fast", TopK(k=3)).path, tmp_path / "copy", Compact(), progress)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "destination"),
    [("a", "a"), ("a", "a/b"), ("a", "a/shards/b"), ("a/tmp", "a"), ("a", "link"), ("a", "link/b")],
)
def test_stores_within_one_another_are_refused(
    tmp_path: Path, source: str, destination: str
) -> None:
    made(tmp_path / source, TopK(k=3))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match="one lies within the other; choose a folder beside it"):
        convert(tmp_path / source, tmp_path / destination, Compact())
    assert tree(tmp_path) == before


def test_a_destination_that_is_another_store_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "a", TopK(k=3))
    made(tmp_path / "b", TopK(k=3))
    with pytest.raises(StoreError, match=r"exists and differs in lineage: .*; profile\..*kind"):
        convert(source.path, tmp_path / "b", Compact())
    convert(source.path, tmp_path / "c", Compact())
    with pytest.raises(StoreError, match=r"profile\.loss_nats: 0\.0003 in the store, 0\.001 given"):
        convert(source.path, tmp_path / "c", Compact(loss_nats=1e-3))


def test_a_damaged_source_is_never_copied(tmp_path: Path) -> None:
    source = made(tmp_path / "a", TopK(k=3))
    file = source.path / "shards/00001/top_k.ids/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[7] ^= 2
    file.write_bytes(content)
    with pytest.raises(DamagedShard, match=r"shard 00001.*was altered"):
        convert(source.path, tmp_path / "b", Compact())
    assert PredictionStore.open(tmp_path / "b").committed == [0]


WRONG = [
    (Pco, "codes", TopK(k=3), lambda a: a ^ 1),
    (Logits, "top_k.logits", TopK(k=3), lambda a: a * np.float16(1.5)),
    (LogMass, "top_k.tail_logmass", TopK(k=3), lambda a: a * np.float32(1.1)),
    (Rounded, "top_k.moments", TopK(k=3, moments=True), lambda a: a * np.float32(1.001)),
    (States, "hidden.backbone", Hidden(), lambda a: a * np.float16(1.1)),
]


@pytest.mark.parametrize(
    ("codec", "array", "target", "change"), WRONG, ids=[array for _, array, *_ in WRONG]
)
def test_a_codec_that_loses_more_than_the_profile_states_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codec: type[ChunkCodec],
    array: str,
    target: Target,
    change: Any,
) -> None:
    source, decode = made(tmp_path / "a", target, shards=1), codec.decode_into

    def wrong(self: ChunkCodec, content: bytes, out: Any) -> None:
        decode(self, content, out)
        out[:] = change(out)

    monkeypatch.setattr(codec, "decode_into", wrong)
    file = rf"file '{array}/c/0[0/]*' \(array '{array}'\)"
    place = f"shard 00000 of {tmp_path}/b, {file}, sample 'sample-[01]', variation 0, timestep"
    with pytest.raises(StoreError, match=f"{place} .* differs more from the source than"):
        convert(source.path, tmp_path / "b", Compact())


def test_other_facts_than_the_source_has_are_found(tmp_path: Path) -> None:
    source = made(tmp_path / "a", TopK(k=3), shards=1)
    convert(source.path, tmp_path / "b", Compact())
    copy = PredictionStore.open(tmp_path / "b")
    (copy.path / "shards/00000").rename(tmp_path / "away")
    with copy.writer(0) as writer:
        for rollout in source.shard(0):
            facts = {"stop_reason": "end", "weight": 0.5, "seed": rollout.seed}
            writer.append(rollout.sample_id, rollout.variation, rollout.arrays, **facts)
        writer.commit()
    with pytest.raises(
        StoreError, match=r"shard 00000 of .*rollouts\.parquet' holds other weights"
    ):
        convert(source.path, copy.path, Compact())


def test_a_store_without_shards_is_converted(tmp_path: Path) -> None:
    source = made(tmp_path / "a", TopK(k=3), shards=0)
    done = convert(source.path, tmp_path / "b", Compact())
    assert done == Conversion(
        profile=Compact(), shards=0, written=0, missing=4, rollouts=0, timesteps=0,
        bytes_before=0, bytes_after=0, losses={}, mean_kl=0, max_kl=0, stated_rms=0,
        stated_nats=done.stated_nats,
        lineage=(Ancestor(fingerprint=source.fingerprint, profile=Fast()),),
    )  # fmt: skip
