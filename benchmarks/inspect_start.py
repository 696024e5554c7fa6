"""When `foretell inspect` says something of a store of many shards, and when it has said all.

Three steps, each printed as soon as it is known: the manifest; the tables of all shards; the arrays
of sixteen shards that lie evenly over the store. The alternative is to read every array first
(`--all`), after which nothing is an estimate. Every turn is a process of its own, its imports
included, with the page cache warm. Shards hold rollouts as of a codec model: 8 codebooks of 2,048
ids, the 64 likeliest kept.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from measure import report
from read_rate import KEPT, STREAMS, VOCABULARY, synthetic_rollouts

from store import Plan, PredictionStore
from store.schema import TopK
from store.synthetic import synthetic_manifest

STEPS = {"manifest": "shards ", "tables": "Bytes ", "arrays": "Over "}
"""How the first line of each step begins."""


def write_store(folder: Path, shards: int, rollouts_per_shard: int, gib: float) -> None:
    """Write a complete store; its rollouts repeat those that `gib` gives."""
    manifest = synthetic_manifest(TopK(k=KEPT), STREAMS, VOCABULARY)
    manifest = manifest.model_copy(update={"forbidden": (), "end_id": None})
    sample_ids = [f"sample-{number}" for number in range(shards * rollouts_per_shard)]
    samples = pa.table({"sample_id": sample_ids, "text": sample_ids})
    plan = Plan.lay_out(sample_ids, 1, rollouts_per_shard)
    store = PredictionStore.create(folder, manifest, plan, samples)
    rollouts = synthetic_rollouts(gib)
    for shard in range(shards):
        with store.writer(shard) as writer:
            for row, key in enumerate(plan[shard]):
                arrays = rollouts[(shard + row) % len(rollouts)]
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=shard)
            writer.commit()


def said_after(path: Path, *options: str) -> dict[str, float]:
    """Seconds from the start of a process to the first line of every step, and to its end."""
    command = [sys.executable, "-m", "pipeline", "inspect", str(path), *options]
    found: dict[str, float] = {}
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for step, beginning in STEPS.items():
                if line.startswith(beginning):
                    found.setdefault(step, time.perf_counter() - started)
    if process.returncode or found.keys() != STEPS.keys():
        raise RuntimeError(f"{command} said {sorted(found)} and ended with {process.returncode}")
    return found | {"end": time.perf_counter() - started}


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median seconds of every step."""
    return {step: statistics.median(turn[step] for turn in turns) for step in turns[0]}


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of a shard")
    parser.add_argument("--gib", type=float, default=0.01, help="size of different rollouts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Path(folder, "store")
        write_store(store, options.shards, options.rollouts, options.gib)
        said_after(store, "--all")  # warms the page cache
        some = medians([said_after(store) for _ in range(options.repeats)])
        every = medians([said_after(store, "--all") for _ in range(options.repeats)])
    if not options.json:
        print(f"{'seconds until':<24}{'16 shards':>12}{'--all':>12}  of {options.shards:,} shards")
        for step in some:
            print(f"{step:<24}{some[step]:>12.2f}{every[step]:>12.2f}")
    ratios = {
        "first_output_s": some["manifest"],
        "tables_s": some["tables"],
        "end_s": some["end"],
        "all_end_s": every["end"],
        "all_over_first": every["end"] / some["manifest"],
        "all_over_some": every["end"] / some["end"],
    }
    report(__file__, ratios, packages=["zarr", "pydantic", "rich"])


if __name__ == "__main__":
    main()
