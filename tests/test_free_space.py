"""What stage one will write is known before it begins, and it never fills the disk."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from stages import free_space
from stages.background_writer import BackgroundWriter, Drawn
from stages.diffusion.record import record, rollout_rows, time_rows
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.errors import UserError
from stages.estimate import Estimate, estimated, missing_of
from stages.free_space import (
    FloorReached,
    committed_share,
    free_bytes,
    refuse_small_disk,
    require_floor,
)
from stages.interruption import StopRequest
from store import PredictionStore, verify
from store.encoding import array_specs
from store.schema import Compact, Profile, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
)
from tests.recorded import TARGETS, FakeDenoiser, config_of, images, planned, written
from tests.test_garbage import foretell

pytestmark = pytest.mark.slow

TIMESTEPS = 300


def store_at(path: Path, profile: Profile | None = None) -> PredictionStore:
    return synthetic_store(path, synthetic_manifest(TopK(k=4), profile=profile), 6, 1, 2)


def lengths(_key: tuple[str, int]) -> int:
    return TIMESTEPS


def write(store: PredictionStore, shard: int) -> None:
    with store.writer(shard) as writer:
        for key in store.plan[shard]:
            arrays = synthetic_arrays(store.manifest, key, TIMESTEPS)
            writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=0)
        assert writer.commit()


def data_bytes(store: PredictionStore) -> int:
    """Bytes of the data files of all committed shards, without their indices and headers."""
    return sum(array_bytes(PredictionStore.open(store.path)).values())


def array_bytes(store: PredictionStore) -> Counter[str]:
    """The same, of every array."""
    found: Counter[str] = Counter()
    for shard in store.committed:
        folder = store.folder(shard)
        for name, files in folder.files.items():
            # Each of the chunks has 16 bytes in an index, which ends in 4 more.
            index = 16 * files.chunk_count(folder.record().rows) + 4
            found[name] += folder.record().files[files.data].bytes - index
    return found


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(free_space, "free_bytes", lambda _path: size)


def test_free_space_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    found = free_bytes(tmp_path / "not/yet/there")
    assert abs(found - shutil.disk_usage(tmp_path).free) < 2**30  # others write there too


def test_a_disk_is_refused_from_the_first_byte_that_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected of plain arrays is exactly what is then written."""
    store, twin = store_at(tmp_path / "store"), store_at(tmp_path / "twin")
    write(store, 1)
    for shard in (0, 2):
        write(twin, shard)
    needed = data_bytes(twin)
    store = PredictionStore.open(store.path)
    free(monkeypatch, needed + 1000)
    refuse_small_disk(store, lengths, 1000)
    free(monkeypatch, needed + 999)
    with pytest.raises(UserError) as refused:
        refuse_small_disk(store, lengths, 1000)
    message = str(refused.value)
    assert f"the 2 missing shards of {store.path} will take about {needed:,} bytes" in message
    assert f"{needed + 999:,} are free" in message
    assert "rollout.disk_check: false" in message
    for shard in (0, 2):
        write(store, shard)
    refuse_small_disk(PredictionStore.open(store.path), lengths, 10**18)  # nothing is missing


def test_encoded_shards_are_measured_by_those_that_are_committed_and_before_only_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, twin = (store_at(tmp_path / name, Compact()) for name in ("store", "twin"))
    assert committed_share(store) is None
    free(monkeypatch, 10)
    refuse_small_disk(store, lengths, 0)
    assert "--estimate` measures it before" in caplog.text
    write(store, 1)
    for shard in (0, 2):
        write(twin, shard)
    store = PredictionStore.open(store.path)
    share = committed_share(store)
    assert share is not None
    assert all(0 < part < 1 for part in share.values())
    needed = data_bytes(twin)
    free(monkeypatch, round(needed * 1.1))
    refuse_small_disk(store, lengths, 0)
    free(monkeypatch, round(needed * 0.9))
    with pytest.raises(UserError, match="2 missing shards"):
        refuse_small_disk(store, lengths, 0)


def test_with_less_than_the_floor_no_shard_is_begun_and_what_was_committed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_at(tmp_path / "store")

    def drawn(shard: int) -> list[Drawn]:
        return [
            Drawn(key, synthetic_arrays(store.manifest, key, 5), "end", 1.0, 0)
            for key in store.plan[shard]
        ]

    def fill_up(shard: int) -> list[Drawn]:
        free(monkeypatch, 499)  # from here on; the shard itself was begun before
        return drawn(shard)

    def write_all() -> None:
        with BackgroundWriter(store, free_floor=500) as writer:
            free(monkeypatch, 500)
            for shard, collect in ((0, drawn), (1, fill_up), (2, drawn)):
                writer.append(shard, lambda s=shard, c=collect: c(s))
                writer.commit(shard)

    with pytest.raises(FloorReached, match=r"499 bytes are free at .* less than 500"):
        write_all()
    found = verify(store.path)
    assert (found.ok, found.not_committed) == (True, (2,))
    assert list((store.path / "tmp").iterdir()) == []


def test_the_floor_itself_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 500)
    require_floor(tmp_path, 500)
    with pytest.raises(FloorReached, match=r"rollout\.free_floor lets no shard"):
        require_floor(tmp_path, 501)


HUGE = 10**18


def test_a_rollout_that_cannot_fit_is_refused_and_writes_no_shard(run_of, start_worker) -> None:
    run = run_of("own", fitted=True, students=None)
    worker = start_worker("rollout", run, f"--set=rollout.free_floor={HUGE}")
    assert worker.wait() == 2
    message = worker.stderr.read_text()
    assert "missing shards of" in message
    assert f"rollout.free_floor keeps {HUGE:,} free" in message
    assert "Traceback" not in message
    assert PredictionStore.open(run.root / "store").committed == []


def test_a_rollout_that_comes_to_the_floor_fails_says_what_to_do_and_goes_on_later(
    run_of, start_worker
) -> None:
    run = run_of("own", fitted=True, students=None)
    options = (f"--set=rollout.free_floor={HUGE}", "--set=rollout.disk_check=false")
    worker = start_worker("rollout", run, *options)
    assert worker.wait() == 1  # a scheduler would requeue 75 at once, again and again
    message = worker.stderr.read_text()
    assert f"rollout.free_floor lets no shard be begun with less than {HUGE:,}" in message
    assert "what was finished before is safe: free space" in message
    assert "Traceback" not in message
    again = start_worker("rollout", run)
    assert again.wait() == 0, again.stderr.read_text()
    assert PredictionStore.open(run.root / "store").missing() == []


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_an_estimate_says_what_a_rollout_then_takes_and_writes_nothing(
    run_of, tiny_run, profile: str
) -> None:
    section = tiny_run.document["rollout"] | {"profile": {"kind": profile}}
    run = run_of("own", fitted=True, students=None, rollout=section)
    done = foretell("rollout", run.path, "--estimate", "--json")
    assert done.code == 0, done.err
    assert not run.root.exists()
    found = json.loads(done.out)
    run.do("rollout")
    store = PredictionStore.open(run.root / "store")
    specs = array_specs(store.manifest)
    rows = sum(store.folder(shard).record().rows for shard in store.committed)
    assert found["samples"] == len(store.plan.sample_ids)
    assert found["rollouts"] == len(store)
    assert found["shards"] == found["missing_shards"] == store.planned_shards
    assert set(found["bytes"]) == set(specs)
    assert found["bytes_in_all"] == sum(found["bytes"].values()) == found["missing_bytes"]
    assert found["targets"]["top_k"] + found["targets"]["codes"] == found["bytes_in_all"]
    # All rollouts were predicted in the timed batches but one shard's or two.
    assert 0.7 * rows < found["timesteps"] < 1.4 * rows
    assert found["timed_rollouts"] > 0
    assert found["hours"] * 3600 * found["timesteps_per_s"] == pytest.approx(found["timesteps"])
    if profile == "fast":
        written = data_bytes(store)
        assert written == found["bytes_in_all"], "every shard is one chunk, whatever its length"
    assert found["fits"]

    text = foretell("rollout", run.path, "--estimate").out
    assert f"{len(store):,} rollouts of {len(store.plan.sample_ids):,} samples" in text
    assert "0 shards are missing: 0 bytes" in text
    assert "timesteps/s" not in text, "nothing is left that could be timed"


def test_an_estimate_warns_of_a_disk_that_is_too_small(run_of) -> None:
    run = run_of("own", fitted=True, students=None)
    done = foretell("rollout", run.path, "--estimate", "--set", f"rollout.free_floor={HUGE}")
    assert (done.code, "IT DOES NOT FIT" in done.out) == (0, True)


@pytest.mark.parametrize("case", ["dataset", "replay", "student", "hidden"])
def test_codes_that_are_given_and_other_targets_are_estimated_too(
    run_of, tiny_run, case: str
) -> None:
    section = dict(tiny_run.document["rollout"])
    section |= {
        "dataset": {"source": "dataset"},
        "replay": {"source": "replay", "replay": str(tiny_run.root / "store")},
        "student": {"source": "student", "student": str(tiny_run.root / "student")},
        "hidden": {"target": {"kind": "hidden", "branches": "both"}},
    }[case]
    run = run_of("own", fitted=True, students=None, rollout=section)
    done = foretell("rollout", run.path, "--estimate", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["timesteps_per_s"] > 0
    assert found["missing_shards"] == 5
    assert not run.root.exists()


ROWS = {
    "forward": {"kind": "forward", "slots": 3},
    "noise": {"kind": "forward", "slots": 3, "store_noise": True},
    "trajectory": {"kind": "trajectory", "steps": 4, "keep": [0, 2]},
}
EACH = {"forward": 3, "noise": 3, "trajectory": 3}


@pytest.mark.parametrize("profile", ["fast", "compact"])
@pytest.mark.parametrize("kind", ROWS)
def test_an_estimate_of_a_diffusion_model_is_what_its_store_then_takes(
    tmp_path: Path, kind: str, profile: str
) -> None:
    """Of samples of two shapes, some of which are their own targets."""
    targets = ["teacher"] * 6 if kind == "trajectory" else TARGETS
    dataset = images(tmp_path / "images", targets)
    denoiser = FakeDenoiser(dataset.facts)
    config = config_of(rows=ROWS[kind], profile={"kind": profile}, rollouts_per_shard=8)
    laid = lay_out_records(config, denoiser, dataset, seed=7)

    def estimate(missing: Sequence[int]) -> Estimate:
        return estimated(
            laid.manifest,
            laid.plan,
            missing,
            lambda _key: rollout_rows(config.rows),
            time_rows(denoiser, laid, missing, dataset, config),
            rejected=0,
            processes=2,
            path=tmp_path / "store",
            free_floor=0,
        )

    found = estimate(missing_of(tmp_path / "store", laid.plan))
    assert not (tmp_path / "store").exists()
    store = create_record_store(
        tmp_path / "store", dataset, lay_out_records(config, denoiser, dataset, seed=7)
    )
    asked = [s for s in store.missing() if laid.manifest.buckets[laid.plan.buckets[s]].predicted]
    assert record(denoiser, store, dataset, asked[:1], config, stop=StopRequest())
    halfway = estimate(missing_of(store.path, laid.plan))
    assert halfway.missing_shards == len(store.plan) - 1
    assert record(denoiser, store, dataset, store.missing(), config, stop=StopRequest())
    store = PredictionStore.open(store.path)

    rows = sum(store.folder(shard).record().rows for shard in store.committed)
    assert found.timesteps == rows == EACH[kind] * found.rollouts == EACH[kind] * len(store)
    sizes = array_bytes(store)
    assert set(found.bytes) == set(sizes)
    if profile == "fast":
        assert found.bytes == sizes
    else:
        assert sum(sizes.values()) / 2 < found.bytes_in_all < 2 * sum(sizes.values())
    assert found.timesteps_per_s is not None
    seconds = found.hours * 3600 * found.processes * found.timesteps_per_s
    asked_rows = sum(store.folder(shard).record().rows for shard in asked)
    assert seconds == pytest.approx(asked_rows), "what is not asked for takes no time"
    after = estimate([])
    assert (after.timesteps_per_s, after.hours, after.missing_bytes) == (None, 0, 0)
    assert after.fits


def test_what_is_timed_are_full_batches_of_rows_that_the_teacher_is_asked_for(
    tmp_path: Path,
) -> None:
    dataset = images(tmp_path / "images", ["data", "teacher"] * 6)
    denoiser = FakeDenoiser(dataset.facts)
    config = config_of(rows=ROWS["forward"], rollouts_per_shard=8, batch_size=6)
    laid = lay_out_records(config, denoiser, dataset, seed=7)
    timed = time_rows(denoiser, laid, range(len(laid.plan)), dataset, config)
    assert timed is not None
    assert (timed.rollouts, timed.timesteps, timed.expected) == (6, 18, 18)
    assert denoiser.batches == [12] * 4, "both branches; the first batch also before it is timed"


def test_a_recording_is_refused_by_a_small_disk_to_the_byte_and_stops_at_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts)
    needed = data_bytes(written(tmp_path / "twin", dataset, denoiser))
    store, config = planned(tmp_path / "store", dataset, denoiser, free_floor=1000)
    each = rollout_rows(config.rows)
    free(monkeypatch, needed + 1000)
    refuse_small_disk(store, lambda _key: each, 1000)
    free(monkeypatch, needed + 999)
    with pytest.raises(UserError, match=f"will take about {needed:,} bytes"):
        refuse_small_disk(store, lambda _key: each, 1000)
    first, second, *_ = store.missing()
    assert record(denoiser, store, dataset, [first], config, stop=StopRequest())
    free(monkeypatch, 999)
    with pytest.raises(FloorReached, match=r"999 bytes are free at .* less than 1,000"):
        record(denoiser, store, dataset, [second], config, stop=StopRequest())
    found = verify(store.path)
    assert (found.ok, found.shards) == (True, 1)
    assert list((store.path / "tmp").iterdir()) == []


def test_an_estimate_of_a_store_of_other_settings_is_refused(run_of, tiny_run) -> None:
    run = run_of("own", fitted=True, students=None)
    run.do("rollout")
    done = foretell("rollout", run.path, "--estimate", "--set", "rollout.variations=3")
    assert done.code == 2
    assert "was planned with other settings" in done.err
    assert foretell("rollout", run.path, "--json").code == 2
