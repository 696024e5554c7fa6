"""Whoever reads ahead, and however a run is split or resumed, the batches are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stages import data
from stages.config import LoaderConfig, TrainConfig
from stages.data import StoreBatches, rollout_batches
from stages.distributed import Place
from stages.errors import UserError
from stages.host_batches import HostBatch, Span, TargetBatch, host_batch, restored_batch
from stages.host_memory import HostMemory
from stages.interruption import STOP_SIGNALS
from stages.loader import Loader
from stages.optimization import Objective, optimize
from stages.packed import Packed
from stages.targets import BranchedTarget, SparseTarget, load_heads, restore
from store import DamagedShard, PredictionStore, StoreError
from store.schema import Compact, Dense, Full, Hidden, Profile, Sampled, Target, TopK
from store.shard import Shard
from store.shard_folder import MappedShard
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.stopping import StopAfter

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SAMPLES, VARIATIONS, ROLLOUTS_PER_SHARD = 22, 2, 6
ROLLOUTS = SAMPLES * VARIATIONS
STARTS = ("fork", "spawn", "forkserver")
PROCESSES = [pytest.param(s, marks=[pytest.mark.slow] if s != "fork" else []) for s in STARTS]


def made(
    path: Path, target: Target, samples: int = SAMPLES, profile: Profile | None = None
) -> PredictionStore:
    manifest = synthetic_manifest(target, profile=profile)
    store = synthetic_store(path, manifest, samples, VARIATIONS, ROLLOUTS_PER_SHARD)
    for shard in range(len(store.plan)):
        write_synthetic_shard(store, shard, 9)
    return PredictionStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    """Eight shards of six rollouts, the last one of two."""
    return made(tmp_path_factory.mktemp("data") / "store", TopK(k=4, moments=True))


def config_of(batch_size: int = 8, workers: int = 0, start: str = "fork", **changes) -> TrainConfig:
    optimizer = {"steps": 100, "batch_size": batch_size}
    optimizer |= {"micro_batch_size": changes.pop("micro", None)}
    loader = {"workers": workers, "start_method": start, "prefetch": 2}
    plain = {
        "model": {"family": "codec_lm"},
        "optimizer": optimizer,
        "loader": loader,
        "buffer_shards": 2,
    }
    return TrainConfig.model_validate(plain | {"neighbours": 8} | changes)


@contextmanager
def batches_of(
    store: PredictionStore, config: TrainConfig, rank: int = 0, world_size: int = 1
) -> Iterator[StoreBatches]:
    with closing(StoreBatches(store, config, 5, Place(rank, world_size, CPU))) as batches:
        yield batches


def walked(
    store: PredictionStore, config: TrainConfig, positions: range, **place: int
) -> list[TargetBatch]:
    with batches_of(store, config, **place) as batches:
        return [batch for position in positions for batch in restored(batches, position)]


def restored(batches: StoreBatches, position: int) -> list[TargetBatch]:
    return [batches.restored(batch) for batch in batches.batches(position)]


def seen(batches: list[TargetBatch] | list[HostBatch]) -> list[tuple[str, int, int]]:
    """(sample_id, variation, epoch) of every rollout, in order."""
    return [(*k, e) for batch in batches for k, e in zip(batch.keys, batch.epochs, strict=True)]


def tensors(batch: TargetBatch) -> dict[str, Tensor]:
    own = {name: getattr(batch, name) for name in ("codes", "lengths", "element_weights")}
    return own | {n: x for n, x in vars(batch.target).items() if isinstance(x, Tensor)}


def assert_equal(ours: list[TargetBatch], theirs: list[TargetBatch]) -> None:
    assert seen(ours) == seen(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.samples == other.samples
        assert one.weight == other.weight
        mine, others = tensors(one), tensors(other)
        assert mine.keys() == others.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == others[name].dtype
            assert bits(tensor).equal(bits(others[name])), name


def bits(tensor: Tensor) -> Tensor:
    """Content as bytes: NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8)


# What a batch holds.


def test_a_mean_over_rollouts_spreads_the_weight_of_each_over_its_predictions(
    store: PredictionStore,
) -> None:
    weights = (1.0, 0.1, 0.0, 0.5)
    keys = [key for key, _ in zip(store.keys(), weights, strict=False)]
    spans = [Span.of(store[k])._replace(weight=w) for k, w in zip(keys, weights, strict=True)]
    host = host_batch(store.manifest, spans, [{}] * 4, [0] * 4, HostMemory(), "rollouts")
    batch = restored_batch(host, store.manifest, None, CPU, None)
    assert host.weight == batch.weight == 4, "whatever they weigh"
    for row, (key, weight) in enumerate(zip(keys, weights, strict=True)):
        length, each = len(store[key]), batch.element_weights[row]
        assert float(each.double().sum()) == pytest.approx(weight, rel=1e-6)
        assert each[:length].unique().tolist() == pytest.approx([weight / length / 2], rel=1e-6)
    assert len(set(batch.lengths.tolist())) > 1


def test_training_takes_the_mean_that_its_loss_says(store: PredictionStore) -> None:
    for batch in walked(store, config_of(micro=3, loss={"mean": "rollouts"}), range(0, 24, 8)):
        assert batch.weight == len(batch.keys) <= 3
        totals = batch.element_weights.sum((1, 2))
        torch.testing.assert_close(totals, torch.ones_like(totals))


def test_a_batch_holds_its_rollouts_and_nothing_that_could_be_read_beyond_them(
    store: PredictionStore,
) -> None:
    for batch in walked(store, config_of(), range(0, ROLLOUTS, 8)):
        assert isinstance(batch.target, SparseTarget)
        assert batch.codes.shape[1] == batch.lengths.max()
        stored = {
            "ids": "ids",
            "logits": "logits",
            "tail_logmass": "tail_logmass",
            "moments": "moments",
        }
        for row, key in enumerate(batch.keys):
            rollout, length = store[key], int(batch.lengths[row])
            assert length == len(rollout)
            assert batch.samples[row] == store.sample(key[0])
            np.testing.assert_array_equal(batch.codes[row, :length], rollout.codes)
            assert (batch.codes[row, length:] == 0).all()
            for field, name in stored.items():
                tensor = getattr(batch.target, field).numpy()
                array = rollout.arrays[f"top_k.{name}"]
                assert tensor.dtype == array.dtype, "as narrow as in the store"
                np.testing.assert_array_equal(tensor[row, :length], array)
                beyond = tensor[row, length:]
                assert (np.isnan(beyond) if beyond.dtype.kind == "f" else beyond == 0).all()
            expected = rollout.weight * (torch.arange(batch.codes.shape[1]) < length)
            assert torch.equal(batch.element_weights[row], expected[:, None].expand(-1, 2))
        assert batch.weight == float(batch.element_weights.double().sum())


TARGETS: dict[str, Target] = {
    "full": Full(),
    "full of both": Full(branches="both", dtype="float32"),
    "sampled": Sampled(draws=7),
    "top_k with tail": TopK(k=3, tail_samples=2),
    "hidden": Hidden(),
    "hidden of both": Hidden(branches="both", dtype="float32"),
    "dense": Dense(branches="guided"),
    "dense of both": Dense(),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_kind_of_target_arrives_as_what_its_arrays_are_restored_to(
    tmp_path: Path, target: Target, workers: int
) -> None:
    store = made(tmp_path, target, samples=3)
    manifest = store.manifest
    scale = 1.5 if manifest.branches == "both" else None
    config = config_of(batch_size=6, workers=workers, loss={"guidance_scale": scale})
    (batch,) = walked(store, config, range(1))
    heads = load_heads(store.heads, CPU)
    for row, key in enumerate(batch.keys):
        arrays = {n.split(".", 1)[-1]: a[None].copy() for n, a in store[key].arrays.items()}
        length = int(batch.lengths[row])
        codes = arrays.pop("codes", np.zeros((1, length, len(manifest.streams)), np.int64))
        np.testing.assert_array_equal(batch.codes[row, :length], codes[0])
        alone = restore(arrays, manifest, heads, CPU, scale).rows(torch.arange(length))
        places = row * batch.codes.shape[1] + torch.arange(length)
        together = batch.target.rows(places)
        for name, tensor in vars(alone).items():
            if isinstance(tensor, Tensor):
                torch.testing.assert_close(getattr(together, name), tensor, rtol=1e-6, atol=1e-6)


@given(
    st.dictionaries(
        st.text("ab.", min_size=1),
        st.tuples(
            st.sampled_from(["u1", "u2", "u4", "i8", "f2", "f4", "f8"]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_packed_arrays_lie_apart_in_one_piece_of_memory(
    fields: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    shapes = {n: (np.dtype(d), shape) for n, (d, shape) in fields.items()}
    packed = Packed.empty(shapes, HostMemory())
    contents = {}
    for number, (name, (dtype, shape)) in enumerate(fields.items()):
        contents[name] = np.full(shape, number + 1, dtype)
        packed[name].numpy()[...] = contents[name]
    copy = pickle.loads(pickle.dumps(packed.to(CPU)))
    for name, content in contents.items():
        assert copy[name].numpy().dtype == content.dtype
        np.testing.assert_array_equal(copy[name].numpy(), content)


def addresses(memory: HostMemory, *sizes: int) -> list[int]:
    """Where pieces that are held together lie."""
    return [piece.data_ptr() for piece in [memory.take(size) for size in sizes]]


def test_memory_that_nobody_holds_is_given_out_again_and_no_other() -> None:
    memory = HostMemory()
    view = memory.take(1000)[10:20].numpy()[2:4]
    view[:] = 7
    held = memory.take(900)
    held.fill_(1)
    assert view.tolist() == [7, 7]
    address = held.data_ptr()
    del held
    assert addresses(memory, 500) == [address]  # smaller, and the only one that is free
    del view
    first = addresses(memory, 900, 1000)
    assert first[0] == address
    assert addresses(memory, 1000, 900) == first[::-1]  # the smallest that is large enough


def test_there_is_never_more_memory_than_was_in_use_at_once() -> None:
    memory = HostMemory()
    for size in range(1, 50):
        memory.take(size)
    assert [len(piece) for piece in memory._free.values()] == [49]
    assert not pickle.loads(pickle.dumps(memory))._free
    assert memory.take(0).stride() == (1,)


def test_threads_never_share_a_piece_of_memory() -> None:
    memory = HostMemory()

    def write(number: int) -> bool:
        return all(
            bool((memory.take(64 + turn % 7).fill_(number) == number).all()) for turn in range(300)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(4)))


# The same batches, whoever reads them.


@pytest.fixture(scope="module")
def reference(store: PredictionStore) -> list[TargetBatch]:
    """More than an epoch of batches of 8 in micro-batches of 3, read by the thread."""
    return walked(store, config_of(micro=3), range(0, 56, 8))


@pytest.mark.parametrize("start", PROCESSES)
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_read_the_same_batches_as_a_thread(
    store: PredictionStore, reference: list[TargetBatch], start: str, workers: int
) -> None:
    config = config_of(micro=3, workers=workers, start=start)
    assert_equal(walked(store, config, range(0, 56, 8)), reference)
    assert not multiprocessing.active_children()


def test_only_the_micro_batch_that_is_asked_for_is_moved_to_the_device(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Packed] = []
    plain = Packed.to
    monkeypatch.setattr(
        Packed, "to", lambda self, device: moved.append(self) or plain(self, device)
    )
    with batches_of(store, config_of(micro=3)) as batches:
        found = batches.batches(0)
        assert len(found) == 3
        assert not moved
        batches.restored(found[1])
        assert moved == [found[1].arrays]


def test_a_batch_read_alone_equals_the_one_that_was_read_ahead(
    store: PredictionStore, reference: list[TargetBatch]
) -> None:
    with batches_of(store, config_of(micro=3)) as batches:
        backwards = [restored(batches, position) for position in range(48, -1, -8)]
    assert_equal([batch for part in reversed(backwards) for batch in part], reference)


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (11, 0), (6, 2), (50, 1)])
def test_a_run_resumes_anywhere_with_another_batch_size_and_other_processes(
    store: PredictionStore, batch_size: int, workers: int
) -> None:
    sequence = seen(walked(store, config_of(batch_size=1), range(130)))
    assert len({*sequence[:ROLLOUTS]}) == len({*sequence[ROLLOUTS : 2 * ROLLOUTS]}) == ROLLOUTS
    assert {epoch for *_, epoch in sequence[:ROLLOUTS]} == {0}
    config = config_of(batch_size=batch_size, workers=workers)
    resumed = walked(store, config, range(24, 25 + batch_size, batch_size))
    assert seen(resumed) == sequence[24 : 24 + 2 * batch_size]


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_processes_of_a_run_share_every_batch_without_gaps(
    store: PredictionStore, world_size: int, workers: int
) -> None:
    whole = seen(walked(store, config_of(), range(0, 24, 8)))
    shares = [
        walked(store, config_of(workers=workers), range(0, 24, 8), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(3):
        parts = [seen([share[step]]) for share in shares]
        found = whole[step * 8 : step * 8 + 8]
        assert [found[rank::world_size] for rank in range(world_size)] == parts


def test_micro_batches_are_the_batch_in_parts(
    store: PredictionStore, reference: list[TargetBatch]
) -> None:
    assert [len(batch.keys) for batch in reference[:3]] == [3, 3, 2]
    assert seen(reference) == seen(walked(store, config_of(), range(0, 56, 8)))


def test_reading_ahead_takes_nothing_from_the_random_state_of_a_step(
    store: PredictionStore,
) -> None:
    for workers in (0, 1):
        torch.manual_seed(3)
        walked(store, config_of(workers=workers), range(0, 16, 8))
        drawn = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(3))


def test_an_epoch_may_hold_one_variation_of_every_sample(store: PredictionStore) -> None:
    config = config_of(batch_size=SAMPLES, variations="one")
    epochs = [seen([batch]) for batch in walked(store, config, range(0, 12 * SAMPLES, SAMPLES))]
    for number, epoch in enumerate(epochs):
        assert sorted(sample for sample, _, _ in epoch) == sorted(f"sample-{n}" for n in range(22))
        assert {e for *_, e in epoch} == {number}
    assert {(s, v) for epoch in epochs for s, v, _ in epoch} == {*store}
    workers = config_of(batch_size=5, variations="one", workers=1)
    resumed = seen(walked(store, workers, range(SAMPLES, SAMPLES + 20, 5)))
    assert resumed == epochs[1][:20]


def test_the_scale_of_a_rollout_depends_on_itself_and_the_epoch_alone(tmp_path: Path) -> None:
    store = made(tmp_path, Full(branches="both"), samples=8)
    found: list[dict[tuple[str, int, int], float]] = []
    for changes in (
        {"batch_size": 16},
        {"batch_size": 5, "workers": 1},
        {"batch_size": 6, "micro": 1},
    ):
        config = config_of(loss={"guidance_scale": (1.0, 3.0)}, **changes)
        scales = {}
        for batch in walked(store, config, range(0, 30, config.optimizer.batch_size)):
            assert isinstance(batch.target, BranchedTarget)
            for rollout, scale in zip(
                seen([batch]), batch.target.logits.scale[:, 0].tolist(), strict=True
            ):
                scales[rollout] = scale
        found.append(scales)
    first = found[0]
    assert len({*first.values()}) == len(first)
    assert all(1 <= scale <= 3 for scale in first.values())
    for scales in found[1:]:
        both = first.keys() & scales.keys()
        assert len(both) >= 30
        assert all(first[rollout] == scales[rollout] for rollout in both)


def test_rollouts_are_evaluated_in_the_order_that_is_asked_for(store: PredictionStore) -> None:
    keys = list(store.keys())[::-3]
    batches = list(rollout_batches(store, keys, 4, CPU))
    assert [key for batch in batches for key in batch.keys] == keys
    assert [len(batch.keys) for batch in batches] == [4, 4, 4, 3]


# What goes wrong surfaces where it belongs, and nothing hangs.


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fail, rather than hang."""

    def fail(*_: object) -> None:
        raise AssertionError(f"it hung for {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(("workers", "start"), [(0, "fork"), (1, "fork"), (2, "fork")])
def test_a_damaged_shard_surfaces_at_the_batch_that_needs_it(
    store: PredictionStore, tmp_path: Path, workers: int, start: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    config = config_of(batch_size=2, workers=workers, start=start, buffer_shards=1)
    expected = seen(walked(store, config, range(0, 20, 2)))
    damaged, _ = store.plan.locate(expected[-1][:2])
    first = next(n for n, r in enumerate(expected) if store.plan.locate(r[:2])[0] == damaged)
    assert first >= 6, "it lies in the middle"
    files = (copy / f"shards/{damaged:05d}/top_k.ids/c").rglob("*")
    file = max(files, key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with no_longer_than(60), batches_of(PredictionStore.open(copy), config) as batches:
        for position in range(0, first // 2 * 2, 2):
            assert seen(batches.batches(position)) == expected[position : position + 2]
        for _ in range(2):  # asked again it fails again
            with pytest.raises(
                DamagedShard, match=rf"shard {damaged:05d}, file 'top_k.ids"
            ) as error:
                batches.batches(first // 2 * 2)
            assert error.value.shard == damaged
        assert seen(batches.batches(0)) == expected[:2]


class Numbers:
    """Reads a position as the number itself, notes it in a folder, and may fail."""

    def __init__(self, folder: Path, failing: int = -1, error: Exception | None = None) -> None:
        self.folder, self.failing, self.error = folder, failing, error

    def __call__(self, position: int) -> tuple[int, int]:
        (self.folder / f"{position}-{time.monotonic_ns()}").touch()
        if position == self.failing and self.error is not None:
            raise self.error
        return position, os.getpid()

    @property
    def count(self) -> int:
        return len(list(self.folder.iterdir()))

    def settled(self, expected: int) -> bool:
        """Whether this many positions were read and, given time, no more."""
        deadline = time.monotonic() + 30
        while self.count < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        return self.count == expected


def loader_of(read: Callable[[int], Any], workers: int, prefetch: int = 3) -> Loader[Any]:
    config = LoaderConfig(workers=workers, prefetch=prefetch, start_method="fork")
    return Loader(read, config, step=10)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_no_more_is_read_ahead_than_was_allowed(tmp_path: Path, workers: int) -> None:
    numbers = Numbers(tmp_path)
    with no_longer_than(60), closing(loader_of(numbers, workers)) as loader:
        for taken in range(1, 6):
            assert loader[10 * taken][0] == 10 * taken
            assert numbers.settled(taken + 3 * max(workers, 1))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [StoreError("no disk"), ValueError("no number"), MemoryError("no room")]
)
def test_what_a_reader_raises_is_raised_at_its_position_and_no_other(
    tmp_path: Path, workers: int, error: Exception
) -> None:
    numbers = Numbers(tmp_path, 30, error)
    with no_longer_than(60), closing(loader_of(numbers, workers)) as loader:
        assert [loader[position][0] for position in (0, 10, 20)] == [0, 10, 20]
        with pytest.raises(type(error), match=str(error)):
            loader[30]
        assert loader[40][0] == 40


@pytest.mark.parametrize("start", PROCESSES)
def test_a_process_that_is_killed_is_an_error_and_no_hang(tmp_path: Path, start: str) -> None:
    config = LoaderConfig(workers=2, prefetch=1, start_method=start)
    with no_longer_than(60), closing(Loader(Numbers(tmp_path), config, step=1)) as loader:
        _, pid = loader[0]
        os.kill(pid, signal.SIGKILL)
        message = rf"reads ahead \(pid {pid}\) has ended with exit code -9 .* lower loader.workers"
        with pytest.raises(UserError, match=message):
            assert {loader[position][1] for position in range(1, 9)}


def test_what_was_read_before_a_process_was_killed_is_given_out_first(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path)
    with no_longer_than(60), closing(loader_of(numbers, workers=1)) as loader:
        _, pid = loader[0]
        assert numbers.settled(4)
        os.kill(pid, signal.SIGKILL)
        assert [loader[position] for position in (10, 20, 30)] == [(n, pid) for n in (10, 20, 30)]
        with pytest.raises(UserError, match="has ended with exit code -9"):
            loader[40]


def large(position: int) -> tuple[int, bytes]:
    """More than a pipe holds."""
    return os.getpid(), bytes(2**20)


@pytest.mark.parametrize("start", PROCESSES)
def test_a_process_that_is_killed_in_the_middle_of_an_item_is_an_error_and_no_hang(
    start: str,
) -> None:
    config = LoaderConfig(workers=2, prefetch=1, start_method=start)
    with no_longer_than(60), closing(Loader(large, config, step=1)) as loader:
        pids = [loader[position][0] for position in range(2)]
        time.sleep(0.2)  # until it waits for room in the pipe
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(UserError, match=rf"\(pid {pids[0]}\) has ended"):
            loader[2]
        assert not multiprocessing.active_children()
        assert loader[2][0] not in pids


ORPHANS = """
import os, time
from stages.config import LoaderConfig
from stages.loader import Loader
from tests.test_data import large
loader = Loader(large, LoaderConfig(workers=2, prefetch=2, start_method="fork"), step=1)
print(*(loader[position][0] for position in range(2)), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_the_one_that_they_read_for_even_when_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len({*pids}) == 2
        parent.kill()
    with no_longer_than(60):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)


def test_items_of_processes_are_pinned_on_arrival_and_what_fails_there_is_raised() -> None:
    config = LoaderConfig(workers=2, prefetch=1, start_method="fork")

    def pin(item: tuple[int, bytes]) -> str:
        pinned.append(threading.current_thread().name)
        if len(pinned) == 5:
            raise MemoryError("no page-locked memory")
        return f"pinned {len(item[1])}"

    pinned: list[str] = []
    with no_longer_than(60), closing(Loader(large, config, 1, cast(Any, pin))) as loader:
        assert [loader[position] for position in range(4)] == [f"pinned {2**20}"] * 4
        with pytest.raises(MemoryError, match="page-locked"):
            loader[4]
        assert all(name.startswith("loader-pin") for name in pinned)
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("start", PROCESSES)
def test_signals_that_ask_for_a_stop_leave_the_reading_processes_alone(
    tmp_path: Path, start: str
) -> None:
    config = LoaderConfig(workers=1, prefetch=1, start_method=start)
    with no_longer_than(60), closing(Loader(Numbers(tmp_path), config, step=1)) as loader:
        _, pid = loader[0]
        for number in STOP_SIGNALS:
            os.kill(pid, number)
        assert [loader[position] for position in range(1, 6)] == [(p, pid) for p in range(1, 6)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*STOP_SIGNALS}


@pytest.mark.parametrize("workers", [0, 1])
def test_closing_ends_threads_and_processes_and_a_later_batch_begins_anew(
    tmp_path: Path, workers: int
) -> None:
    loader = loader_of(Numbers(tmp_path), workers)
    loader.close()
    assert loader[0][0] == 0
    running = [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert len(running) + len(multiprocessing.active_children()) >= 1
    loader.close()
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert loader[70][0] == 70
    loader.close()


# The store that readers hold.


def test_a_shard_is_decoded_once_in_an_epoch_and_two_buffers_at_most_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "s", TopK(k=4), profile=Compact())
    decoded: list[tuple[int, weakref.ref[Any]]] = []
    alive: list[int] = []
    plain_load, plain_batch = MappedShard.load, data.host_batch

    def load(self: MappedShard) -> Shard:
        shard = plain_load(self)
        # A slice of a slice refers to the whole: it lives as long as any rollout of the shard.
        decoded.append((shard.number, weakref.ref(shard.arrays["codes"].base)))
        alive.append(sum(reference() is not None for _, reference in decoded))
        return shard

    def slow_batch(*arguments: Any) -> HostBatch:
        time.sleep(0.002)
        return plain_batch(*arguments)

    monkeypatch.setattr(MappedShard, "load", load)
    monkeypatch.setattr(data, "host_batch", slow_batch)
    store = PredictionStore.open(tmp_path / "s", cached_shards=2)
    # 44 rollouts in batches of 5 and micro-batches of 2, so that some span two buffers.
    config = config_of(batch_size=5, micro=2, loader={"prefetch": 16})
    with batches_of(store, config) as batches:
        read = [len(b.keys) for position in range(0, 40, 5) for b in batches.batches(position)]
    assert sum(read) == 40
    assert len({number for number, _ in decoded[:8]}) == 8
    assert max(alive) <= 4


def test_a_reader_in_another_process_reads_the_shards_that_were_pinned(tmp_path: Path) -> None:
    made_store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=4)), 12, 1, 4)
    for shard in (0, 2):
        write_synthetic_shard(made_store, shard, 5)
    reader = reader_of(PredictionStore.open(tmp_path / "s"))
    write_synthetic_shard(made_store, 1, 5)
    plain = [keys_of(reader(position)) for position in range(0, 16, 8)]
    travelled = pickle.loads(pickle.dumps(reader))
    assert [keys_of(travelled(position)) for position in range(0, 16, 8)] == plain
    assert {*plain[0]} == {*made_store.plan[0], *made_store.plan[2]}
    content = pickle.dumps(reader)
    shutil.rmtree(tmp_path / "s")
    made(tmp_path / "s", TopK(k=3))
    with pytest.raises(StoreError, match="is another store than the one that was pickled"):
        pickle.loads(content)


def reader_of(store: PredictionStore) -> Callable[[int], list[HostBatch]]:
    batches = StoreBatches(store, config_of(), 5, Place(0, 1, CPU))
    return batches._loader._read


def keys_of(batches: list[HostBatch]) -> list[tuple[str, int]]:
    return [key for batch in batches for key in batch.keys]


class Guesser:
    """Learns how often each id is drawn, from batches of a store and with noise of the step."""

    def __init__(self, batches: StoreBatches) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(1, 34)
        self.batches, self.restored = batches.batches, batches.restored

    def objective(self, _step: int, host_batch: HostBatch) -> Objective:
        batch = self.restored(host_batch)
        logits = self.module(torch.rand(1)).log_softmax(-1)
        loss = -(logits[batch.codes] * batch.element_weights).sum()
        return Objective(loss, {"ce": loss})

    def validate(self) -> dict[str, float]:
        return {}


def test_a_run_ends_with_the_same_weights_whoever_reads_and_wherever_it_was_stopped(
    store: PredictionStore, tmp_path: Path
) -> None:
    def learn(folder: Path, workers: int, questions: int = 100) -> dict[str, Tensor]:
        optimizer = {"steps": 8, "batch_size": 8, "micro_batch_size": 5, "warmup_steps": 1}
        config = config_of(workers=workers, optimizer=optimizer | {"checkpoint_every": 3})
        with batches_of(store, config) as batches:
            guesser = Guesser(batches)
            optimize(
                guesser.module, guesser.module, guesser, config.optimizer, folder,
                seed=1, identity="", place=Place(0, 1, CPU), stop=StopAfter(questions),
            )  # fmt: skip
        return guesser.module.state_dict()

    whole = learn(tmp_path / "whole", workers=0)
    ahead = learn(tmp_path / "ahead", workers=2)
    learn(tmp_path / "stopped", workers=0, questions=4)
    resumed = learn(tmp_path / "stopped", workers=1)
    for other in (ahead, resumed):
        assert all(torch.equal(weights, other[name]) for name, weights in whole.items())
    log = (tmp_path / "ahead/log.jsonl").read_text().splitlines()
    assert log
    assert all(0 <= json.loads(line)["data_wait_share"] <= 1 for line in log)
