"""How fast a shard is committed, against one plain sequential write and fsync of the same bytes.

The shard holds rollouts as of a codec model: 8 codebooks of 2,048 ids, the 64 likeliest kept,
2.1 kB per timestep. Timed is `commit` alone: every file written, hashed and synced, every folder
synced, renamed. `append`, which checks and copies, is timed apart. Each turn follows one of the
plain write of the logical bytes, in which nothing is encoded, hashed or renamed; the ratio `disk`
divides the bytes that reach the disk, not the logical ones, by the seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import Turns, interleaved, report, seconds
from peers import FIELDS, Arrays
from read_rate import KEPT, STREAMS, VOCABULARY, synthetic_rollouts

from store import Plan, PredictionStore
from store.commit import ShardWriter
from store.schema import Compact, Fast, Profile, TopK
from store.synthetic import synthetic_manifest


def empty_store(folder: Path, profile: Profile, rollouts: int, shards: int) -> PredictionStore:
    """A store whose shards each plan as many rollouts."""
    manifest = synthetic_manifest(TopK(k=KEPT), STREAMS, VOCABULARY, profile)
    manifest = manifest.model_copy(update={"forbidden": (), "end_id": None})
    sample_ids = [f"sample-{number}" for number in range(rollouts * shards)]
    samples = pa.table({"sample_id": sample_ids, "text": sample_ids})
    return PredictionStore.create(folder, manifest, Plan.lay_out(sample_ids, 1, rollouts), samples)


def filled(store: PredictionStore, shard: int, rollouts: Sequence[Arrays]) -> ShardWriter:
    """A writer that waits for its commit."""
    writer = store.writer(shard)
    for key, arrays in zip(store.plan[shard], rollouts, strict=True):
        writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=shard)
    return writer


def plain_write(folder: Path, content: np.ndarray) -> Callable[[], None]:
    """Write the bytes into a new file and sync it."""
    numbers = count()

    def write() -> None:
        path = folder / f"plain-{next(numbers)}"
        with path.open("wb", buffering=0) as file:
            remaining = content.data
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        path.unlink()

    return write


def commits(store: PredictionStore, rollouts: Sequence[Arrays], turns: int) -> Callable[[], bool]:
    """Commit one shard after another, each filled before the clock starts."""
    writers = iter([filled(store, shard, rollouts) for shard in range(turns)])
    return lambda: next(writers).commit()


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the files of one committed shard of the store in `folder`."""
    files = (folder / "shards/00000").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=64, help="logical size of a shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()

    rollouts = synthetic_rollouts(options.mib / 1024)
    content = np.concatenate(
        [r[name].reshape(-1).view(np.uint8) for name in FIELDS for r in rollouts]
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        turns = options.repeats + 1  # the first one warms up
        stores: dict[str, PredictionStore] = {
            profile.kind: empty_store(Path(folder, profile.kind), profile, len(rollouts), turns)
            for profile in (Fast(), Compact())
        }
        ways: dict[str, Callable[[], object]] = {
            name: commits(store, rollouts, turns) for name, store in stores.items()
        }
        ways["plain"] = plain_write(Path(folder), content)
        timed = interleaved(ways, "plain", options.repeats)
        append_s = seconds(lambda: filled(stores["fast"], 0, rollouts))
        disk = {name: bytes_on_disk(Path(folder, name)) for name in stores}

    if not options.json:
        show(timed, len(content), disk, append_s)
    ratios = {
        "fast_over_plain": timed["fast"].speedup,
        "compact_over_plain": timed["compact"].speedup,
        "compact_disk_over_plain": timed["compact"].speedup * disk["compact"] / len(content),
        "append_over_plain": timed["plain"].median_s / append_s,
    }
    report(__file__, ratios, packages=["zarr", "pcodec", "xxhash"])


def show(timed: dict[str, Turns], logical: int, disk: Mapping[str, int], append_s: float) -> None:
    """Print rates in logical bytes."""
    for name, turns in timed.items():
        size = disk.get(name, logical)
        print(
            f"{name:<10}{logical / turns.median_s / 1e6:>8,.0f} MB/s logical"
            f"{size / turns.median_s / 1e6:>8,.0f} MB/s on disk{turns.speedup:>8.2f} of plain"
        )
    print(f"{'append':<10}{logical / append_s / 1e6:>8,.0f} MB/s logical, checked and copied")


if __name__ == "__main__":
    main()
