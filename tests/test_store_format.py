"""The bytes on disk are those of docs/format.md, read here without the store and without Zarr."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from store import PredictionStore
from store.encoding import ArraySpec
from store.schema import Full, TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from store.zarr_files import encode_array, expected_files

ABSENT = 2**64 - 1


def chunks_by_hand(content: bytes) -> list[bytes]:
    """The chunks of a data file, as docs/format.md describes it."""
    index, crc = content[-260:-4], struct.unpack("<I", content[-4:])[0]
    assert google_crc32c.value(index) == crc
    chunks, end = [], 0
    for offset, size in struct.iter_unpack("<QQ", index):
        if (offset, size) == (ABSENT, ABSENT):
            continue
        assert offset == end
        end = offset + size
        chunk, crc = content[offset : end - 4], struct.unpack("<I", content[end - 4 : end])[0]
        assert google_crc32c.value(chunk) == crc
        chunks.append(chunk)
    assert end == len(content) - 260
    return chunks


@pytest.mark.parametrize("timesteps", [1, 256, 257, 4096, 4097])
def test_a_data_file_is_its_chunks_in_order_and_an_index(timesteps: int) -> None:
    spec = ArraySpec("codes", np.dtype(np.uint16), (2,))
    values = np.arange(timesteps * 2, dtype=np.uint16).reshape(-1, 2)
    files = encode_array(spec, values)
    assert sorted(files) == sorted(expected_files(spec, timesteps))
    data = [files[name] for name in expected_files(spec, timesteps)[1:]]
    raw = b"".join(chunk for content in data for chunk in chunks_by_hand(content))
    assert raw[: values.nbytes] == values.tobytes()
    assert raw[values.nbytes :] == b"\xff\xff" * ((len(raw) - values.nbytes) // 2)
    assert len(raw) == -(-timesteps // 256) * 256 * spec.row_bytes


def test_what_lies_beyond_the_last_timestep_is_no_plausible_value() -> None:
    for dtype in (np.float16, np.float32):
        spec = ArraySpec("logits", np.dtype(dtype), (3,))
        files = encode_array(spec, np.zeros((5, 3), dtype))
        (chunk,) = chunks_by_hand(files["logits/c/0/0"])
        padded = np.frombuffer(chunk, dtype).reshape(256, 3)
        assert (padded[:5] == 0).all()
        assert np.isnan(padded[5:]).all()


def test_the_bytes_of_an_array_never_change() -> None:
    values = (np.arange(300 * 2 * 3) % 251).astype(np.float16).reshape(300, 2, 3)
    files = encode_array(ArraySpec("top_k.logits", np.dtype(np.float16), (2, 3)), values)
    data = hashlib.sha256(files["top_k.logits/c/0/0/0"]).hexdigest()
    assert data == "bbf1620f767040c54a98f7e6b2a9f97997951d8d9c4d802fcac8f25d8570af1d"


def test_an_array_of_fill_values_is_written_all_the_same() -> None:
    spec = ArraySpec("codes", np.dtype(np.uint16), (2,))
    for value in (0, 65535):
        files = encode_array(spec, np.full((300, 2), value, np.uint16))
        assert len(chunks_by_hand(files["codes/c/0/0"])) == 2


@pytest.mark.parametrize("target", [TopK(k=3, moments=True), Full()])
def test_the_files_of_a_store_are_the_documented_ones(tmp_path: Path, target: TopK | Full) -> None:
    store = synthetic_store(tmp_path, synthetic_manifest(target), 2, 1, 2)
    write_synthetic_shard(store, 0, 10)
    arrays = {
        "top_k": ["top_k.ids", "top_k.logits", "top_k.moments", "top_k.tail_logmass"],
        "full": ["full.logits"],
    }[target.kind]
    data = ["codes/c/0/0", *(f"{name}/c/0/0/0" for name in arrays)]
    headers = [f"{name}/zarr.json" for name in ("codes", *arrays)]
    shard = tmp_path / "shards/00000"
    found = sorted(str(p.relative_to(shard)) for p in shard.rglob("*") if p.is_file())
    assert found == sorted(["rollouts.parquet", "shard.json", "zarr.json", *data, *headers])


def test_a_seal_is_the_sha_256_of_the_compact_document(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3)), 2, 1, 2)
    text = (tmp_path / "manifest.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    seal = content.pop("checksum")
    compact = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    assert seal == hashlib.sha256(compact.encode()).hexdigest() == store.fingerprint
    for name, recorded in content["files"].items():
        stored = (tmp_path / name).read_bytes()
        assert recorded == {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    write_synthetic_shard(store, 0, 10)
    record = json.loads((tmp_path / "shards/00000/shard.json").read_text())
    assert record["manifest"] == PredictionStore.open(tmp_path).fingerprint
