"""Columns, buckets, drawn numbers and tables of a store: written, read, verified, converted."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from store import Plan, PredictionStore, verify
from store.encoding import array_specs
from store.schema import Bucket, Column, Compact, Dense, Fast, Latent, Manifest, Profile
from store.side_tables import SideTableWriter
from store.synthetic import synthetic_arrays, synthetic_manifest, write_synthetic_shard

COLUMNS = (
    Column(name="t", dtype="float64"),
    Column(name="crc", dtype="uint32"),
    Column(name="status", dtype="uint8"),
    Column(name="noise", dtype="float16", latent=True),
)
BUCKETS = (
    Bucket(shape=(4, 2, 3)),
    Bucket(shape=(4, 3, 2)),
    Bucket(shape=(4, 2, 3), predicted=False),
)
PLAN = Plan.of([[("a", 0), ("b", 0)], [("c", 0)], [("d", 0), ("d", 1)]], buckets=[0, 1, 2])
TABLE = [{"latent": np.full((4, 2, 3), row, np.float16)} for row in range(5)]


def manifest_of(profile: Profile | None = None, **changes: object) -> Manifest:
    base = synthetic_manifest(Dense(), streams=1, profile=profile)
    fields = {
        "streams": (Latent(name="prediction", group="denoiser", shape=(4, 2, 3)),),
        "columns": COLUMNS,
        "buckets": BUCKETS,
        "drawn": ("latent", "condition"),
        "timestep_s": None,
        "recording": {"kind": "diffusion"},
    }
    return Manifest.model_validate(base.model_dump() | fields | changes)


def store_at(folder: Path, profile: Profile | None = None) -> PredictionStore:
    writer = SideTableWriter(folder / "latents", rows_per_part=2)
    for row in TABLE:
        writer.append(row)
    manifest = manifest_of(profile, tables={"latents": writer.finish().model_dump()})
    samples = pa.table({"sample_id": list("abcd"), "text": list("wxyz")})
    store = PredictionStore.create(
        folder / "store", manifest, PLAN, samples, tables={"latents": folder / "latents"}
    )
    for shard in range(len(PLAN)):
        write_synthetic_shard(store, shard, 20)
    return PredictionStore.open(store.path)


@pytest.mark.parametrize("profile", [Fast(), Compact()], ids=lambda profile: profile.kind)
def test_what_was_written_is_read(tmp_path, profile):
    store = pickle.loads(pickle.dumps(store_at(tmp_path, profile)))
    assert store.plan == PLAN
    for shard, keys in enumerate(PLAN):
        bucket = PLAN.bucket_of(shard)
        for key in keys:
            found = store[key]
            expected = synthetic_arrays(store.manifest, key, len(found), bucket)
            assert (
                found.arrays.keys() == expected.keys() == array_specs(store.manifest, bucket).keys()
            )
            for name, values in expected.items():
                np.testing.assert_array_equal(found.arrays[name], values)
                np.testing.assert_array_equal(found[3].arrays[name], values[3])
            assert (
                found.drawn == found[3].drawn == {"latent": found.seed, "condition": found.seed + 1}
            )
    assert "dense.cond" not in store["d", 1].arrays
    assert verify(store.path).ok
