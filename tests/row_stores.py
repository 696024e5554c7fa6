"""Small stores with columns, buckets, drawn numbers and a side table.

`python -m tests.row_stores` makes golden/PROFILE/rows anew, with golden/rows.npz, which is right
only when the format itself changes: they are what releases to come must still read.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from store import Plan, PredictionStore
from store.schema import Bucket, Column, Compact, Dense, Fast, Latent, Manifest, Profile, TableFacts
from store.side_tables import SideTableWriter
from store.synthetic import synthetic_manifest, write_synthetic_shard
from tests.golden_stores import GOLDEN

COLUMNS = (
    Column(name="t", dtype="float64"),
    Column(name="scale", dtype="float32"),
    Column(name="half", dtype="float16"),
    Column(name="x_t_crc", dtype="uint32"),
    Column(name="hash", dtype="uint64"),
    Column(name="place", dtype="int64"),
    Column(name="status", dtype="uint8"),
    Column(name="noise", dtype="float16", latent=True),
)
BUCKETS = (
    Bucket(shape=(4, 2, 3)),
    Bucket(shape=(4, 3, 2)),
    Bucket(shape=(4, 2, 3), predicted=False),
)
PLAN = Plan.of([[("a", 0), ("b", 0)], [("c", 0)], [("d", 0), ("d", 1)]], buckets=[0, 1, 2])
SAMPLES = pa.table({"sample_id": list("abcd"), "text": list("wxyz")})
ROWS = [
    {"latent": np.full((4, 2, 3), row, np.float16), "label": np.array(row, np.int64)}
    | ({"mask": np.ones((1, 2, 3), np.float16)} if row == 3 else {})
    for row in range(5)
]


def manifest_of(profile: Profile | None = None, **changes: Any) -> Manifest:
    """A manifest of one continuous stream with everything beside its target but a table."""
    base = synthetic_manifest(Dense(), streams=1, profile=profile)
    fields = {
        "streams": (Latent(name="prediction", group="denoiser", shape=(4, 2, 3)),),
        "columns": COLUMNS,
        "buckets": BUCKETS,
        "drawn": ("latent", "condition"),
        "timestep_s": None,
        "recording": {"kind": "diffusion", "schedule": {"alphas": [0.5] * 20}},
    }
    return Manifest.model_validate(base.model_dump() | fields | changes)


def table_at(folder: Path, rows: list[dict[str, Any]] | None = None) -> TableFacts:
    """Write a table of five rows, two to a file."""
    writer = SideTableWriter(folder, rows_per_part=2)
    for row in rows or ROWS:
        writer.append(row)
    return writer.finish()


def rows_store(
    path: Path, table: Path, profile: Profile | None = None, timesteps: int = 4
) -> PredictionStore:
    """A complete store of three shards, one of each bucket, and the table it was made with."""
    manifest = manifest_of(profile, tables={"latents": table_at(table).model_dump()})
    tables = {"latents": table}
    store = PredictionStore.create(path, manifest, PLAN, SAMPLES, tables=tables)
    for shard in range(len(PLAN)):
        write_synthetic_shard(store, shard, timesteps)
    return PredictionStore.open(path)


def make(profile: Profile) -> dict[str, Any]:
    """Write a golden store, and return what it holds."""
    folder, table = GOLDEN / profile.kind / "rows", GOLDEN / "rows-table"
    shutil.rmtree(folder, ignore_errors=True)
    store = rows_store(folder, table, profile)
    shutil.rmtree(table)
    found = {"fingerprint": np.array(store.fingerprint)}
    for shard in store.committed:
        for rollout in store.shard(shard):
            key = f"{rollout.sample_id}/{rollout.variation}"
            found |= {f"{key}/{name}": values for name, values in rollout.arrays.items()}
            found |= {f"{key}/drawn/{n}": np.int64(d) for n, d in rollout.drawn.items()}
    return {f"{profile.kind}/{name}": values for name, values in found.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN / "rows.npz", **(make(Fast()) | make(Compact())))
