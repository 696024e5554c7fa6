"""The bytes on disk are those of docs/format.md, read here without the store and without Zarr."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash

from store import PredictionStore, StoreError
from store.encoding import ArraySpec, array_specs
from store.schema import (
    Ancestor,
    Compact,
    Dense,
    Fast,
    FileSum,
    Fingerprints,
    Full,
    Guidance,
    Head,
    Hidden,
    Latent,
    Manifest,
    Profile,
    Sampled,
    Sampler,
    Stream,
    Target,
    TopK,
)
from store.shard import ShardRecord
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from store.zarr_codecs import CODECS, Pco
from store.zarr_files import ArrayFiles, Unencodable, check_group, group_header

ROOT = Path(__file__).parent.parent


def encode(spec: ArraySpec, values: Any, profile: Profile | None = None) -> bytes:
    """The data file of an array, given in one part."""
    return b"".join(map(bytes, ArrayFiles.of(spec, profile or Fast()).encode([values])))


def chunks_by_hand(content: bytes, count: int) -> list[bytes]:
    """The chunks of a data file, as docs/format.md describes it."""
    data = content[: -16 * count - 4]
    index, crc = content[-16 * count - 4 : -4], struct.unpack("<I", content[-4:])[0]
    assert google_crc32c.value(index) == crc
    chunks, end = [], 0
    for offset, size in struct.iter_unpack("<QQ", index):
        assert offset == end
        end = offset + size
        chunks.append(content[offset:end])
    assert end == len(data)
    return chunks


@pytest.mark.parametrize("timesteps", [1, 256, 257, 4096, 4097])
def test_a_data_file_is_its_chunks_in_order_and_an_index(timesteps: int) -> None:
    spec = ArraySpec("codes", np.dtype(np.uint16), (2,))
    values = np.arange(timesteps * 2, dtype=np.uint16).reshape(-1, 2)
    count = -(-timesteps // 256)
    chunks = chunks_by_hand(encode(spec, values), count)
    raw = b"".join(chunks)
    assert raw[: values.nbytes] == values.tobytes()
    assert raw[values.nbytes :] == b"\xff\xff" * ((len(raw) - values.nbytes) // 2)
    assert [len(chunk) for chunk in chunks] == [256 * spec.row_bytes] * count


@pytest.mark.parametrize("cuts", [[], [1], [255], [256, 257], [3, 3, 300, 511, 512]])
@pytest.mark.parametrize("profile", [Fast(), Compact()], ids=lambda profile: profile.kind)
def test_how_an_array_was_cut_into_rollouts_does_not_show(
    cuts: list[int], profile: Profile
) -> None:
    files = ArrayFiles.of(ArraySpec("codes", np.dtype(np.uint16), (3,)), profile)
    values = np.random.default_rng(0).integers(99, size=(700, 3)).astype(np.uint16)
    parts = np.split(values, cuts)
    assert b"".join(map(bytes, files.encode(parts))) == encode(files.spec, values, profile)


def test_what_lies_beyond_the_last_timestep_is_no_plausible_value() -> None:
    for dtype in (np.float16, np.float32):
        spec = ArraySpec("logits", np.dtype(dtype), (3,))
        (chunk,) = chunks_by_hand(encode(spec, np.zeros((5, 3), dtype)), 1)
        padded = np.frombuffer(chunk, dtype).reshape(256, 3)
        assert (padded[:5] == 0).all()
        assert np.isnan(padded[5:]).all()


def test_a_compact_data_file_is_what_the_codec_makes_of_each_padded_chunk() -> None:
    spec = ArraySpec("codes", np.dtype(np.uint16), (2,))
    values = (np.arange(300 * 2) % 7).astype(np.uint16).reshape(-1, 2)
    first, second = chunks_by_hand(encode(spec, values, Compact()), 2)
    padded = np.full((512, 2), 65535, np.uint16)
    padded[:300] = values
    assert first == Pco().encode_chunk(padded[:256])
    assert second == Pco().encode_chunk(padded[256:])


def test_the_bytes_of_an_array_never_change() -> None:
    values = (np.arange(300 * 2 * 3) % 251).astype(np.float16).reshape(300, 2, 3)
    content = encode(ArraySpec("top_k.logits", np.dtype(np.float16), (2, 3)), values)
    assert xxhash.xxh3_128_hexdigest(content) == "a9b883523bae306c1a792e5122de3027"


def test_an_array_of_fill_values_is_written_all_the_same() -> None:
    spec = ArraySpec("codes", np.dtype(np.uint16), (2,))
    for value in (0, 65535):
        content = encode(spec, np.full((300, 2), value, np.uint16))
        assert len(chunks_by_hand(content, 2)) == 2


def test_values_that_a_codec_cannot_hold_are_refused_from_its_thread() -> None:
    spec = ArraySpec("hidden.backbone", np.dtype(np.float32), (1, 4))
    values = np.ones((600, 1, 4), np.float32)
    values[300, 0, 1] = np.inf
    with pytest.raises(Unencodable, match="a state is NaN or infinite") as caught:
        encode(spec, values, Compact())
    assert caught.value.timestep == 256


HEADER: dict[str, Any] = {
    "attributes": {},
    "zarr_format": 3,
    "node_type": "array",
    "storage_transformers": [],
    "shape": [300, 2, 4],
    "data_type": "float16",
    "fill_value": "NaN",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [512, 2, 4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [256, 2, 4],
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "index_codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "index_location": "end",
            },
        }
    ],
}


def test_the_header_of_an_array_is_the_documented_one() -> None:
    logits = ArrayFiles.of(ArraySpec("top_k.logits", np.dtype(np.float16), (2, 4)), Fast())
    assert json.loads(logits.encode_header(300)) == HEADER
    logits.check_header(json.dumps(HEADER | {"attributes": {"unit": "nats"}}).encode(), 300)
    compact = ArrayFiles.of(logits.spec, Compact())
    codec = {
        "name": "foretell.logits",
        "configuration": {"loss_nats": 3e-4, "temperatures": [1.0], "level": 8},
    }
    text = json.dumps(HEADER).replace(
        json.dumps(HEADER["codecs"][0]["configuration"]["codecs"][0]), json.dumps(codec), 1
    )
    assert json.loads(compact.encode_header(300)) == json.loads(text)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("300", "301", "shape"),
        ('"float16"', '"float32"', "data_type"),
        ('"NaN"', "0.0", "fill_value"),
        ('"end"', '"start"', "codecs"),
        ("512", "1024", "chunk_grid"),
        ('"/"', '"."', "chunk_key_encoding"),
        ('"storage_transformers": []', '"storage_transformers": [{"name": "x"}]', "storage_tr"),
        ('"attributes": {}', '"surprise": {}', "surprise"),
    ],
)
def test_a_header_that_says_anything_else_is_refused(old: str, new: str, key: str) -> None:
    files = ArrayFiles.of(ArraySpec("top_k.logits", np.dtype(np.float16), (2, 4)), Fast())
    text = json.dumps(HEADER)
    assert old in text
    with pytest.raises(StoreError, match=f"its {key}.* is .* but format and manifest call for"):
        files.check_header(text.replace(old, new).encode(), 300)


def test_big_endian_values_are_refused_with_what_to_do() -> None:
    files = ArrayFiles.of(ArraySpec("top_k.logits", np.dtype(np.float16), (2, 4)), Fast())
    text = json.dumps(HEADER).replace('"little"', '"big"', 1)
    with pytest.raises(StoreError, match=r"big-endian but this format is little-endian.*: write"):
        files.check_header(text.encode(), 300)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"3"])
def test_a_header_that_is_no_json_object_is_refused(text: bytes) -> None:
    files = ArrayFiles.of(ArraySpec("codes", np.dtype(np.uint16), (2,)), Fast())
    for check in (files.check_header, partial(check_group, arrays=[files])):
        with pytest.raises(StoreError, match=r"it is not JSON|it describes no Zarr"):
            check(text, timesteps=300)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"codes"', '"code"', r"it lists the arrays \['code'\]"),
        ("300", "301", r"its shape is \[301, 2\]"),
        ('"group"', '"array"', "it describes no Zarr group"),
        ('"consolidated_metadata"', '"consolidated"', "it describes no Zarr group"),
    ],
)
def test_a_header_of_the_group_that_does_not_describe_its_arrays_is_refused(
    old: str, new: str, message: str
) -> None:
    files = ArrayFiles.of(ArraySpec("codes", np.dtype(np.uint16), (2,)), Fast())
    content = group_header([files], 300)
    check_group(content, [files], 300)
    with pytest.raises(StoreError, match=message):
        check_group(content.replace(old.encode(), new.encode(), 1), [files], 300)


def test_the_code_and_the_header_in_the_documentation_are_right(tmp_path: Path) -> None:
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    (header,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert json.loads(header) | {"attributes": {}} == HEADER
    mapping, stock, _in_object_storage = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    store = synthetic_store(tmp_path, synthetic_manifest(TopK(k=3)), 2, 1, 2)
    write_synthetic_shard(store, 0, 300)
    names: dict[str, Any] = {}
    exec(mapping, names)
    exec(stock.replace("STORE/shards/00042", str(tmp_path / "shards/00000")), names)
    for name, array in PredictionStore.open(tmp_path).shard(0).arrays.items():
        np.testing.assert_array_equal(names["map_array"](tmp_path / "shards/00000", name), array)
        np.testing.assert_array_equal(names["group"][name][:], array)


def test_the_documentation_names_every_codec_array_and_field() -> None:
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    for codec in CODECS:
        assert f"| `{codec.name}` | " in text
        for setting in dataclasses.fields(codec):
            assert f"`{setting.name}`" in text
    for _, arrays in ARRAYS:
        for name in arrays:
            assert f"`{name.replace('backbone', 'GROUP')}`" in text
    for record in (Manifest, ShardRecord):
        for name in record.model_fields:
            assert f"| `{name}` | " in text
    within = (TopK, Full, Sampled, Hidden, Dense, Compact, Head, Stream, Latent, Ancestor)
    for kind in (*within, Guidance, Sampler, Fingerprints, FileSum):
        for name in kind.model_fields:
            assert re.search(rf"[`{{ ]{name}[`}},: ]", text), name


ARRAYS: list[tuple[Target, list[str]]] = [
    (
        TopK(k=3, moments=True, tail_samples=2),
        ["top_k.ids", "top_k.logits", "top_k.moments", "top_k.tail_ids", "top_k.tail_logmass"],
    ),
    (Full(), ["full.logits"]),
    (Full(levels=True), ["full.levels", "full.logits"]),
    (Full(branches="both"), ["full.cond", "full.uncond"]),
    (Sampled(draws=4), ["sampled.ids"]),
    (Hidden(), ["hidden.backbone"]),
    (Hidden(branches="both"), ["hidden.cond.backbone", "hidden.uncond.backbone"]),
    (Dense(), ["dense.cond", "dense.delta"]),
    (Dense(branches="guided"), ["dense.guided"]),
]


@pytest.mark.parametrize("profile", [Fast(), Compact()], ids=lambda profile: profile.kind)
@pytest.mark.parametrize(("target", "arrays"), ARRAYS)
def test_the_files_of_a_store_are_the_documented_ones(
    tmp_path: Path, target: Target, arrays: list[str], profile: Profile
) -> None:
    store = synthetic_store(tmp_path, synthetic_manifest(target, profile=profile), 2, 1, 2)
    write_synthetic_shard(store, 0, 10)
    dense = target.kind == "dense"
    data = [] if dense else ["codes/c/0/0", "codes/zarr.json"]
    for name in arrays:
        axes = array_specs(store.manifest)[name].trailing
        data += [f"{name}/zarr.json", f"{name}/c/0{'/0' * len(axes)}"]
    shard = tmp_path / "shards/00000"
    found = sorted(str(p.relative_to(shard)) for p in shard.rglob("*") if p.is_file())
    assert found == sorted(["rollouts.parquet", "shard.json", "zarr.json", *data])
    beside = {"manifest.json", "plan.parquet", "samples.parquet", "shards", "tmp"}
    beside |= {"heads"} if target.kind == "hidden" else set()
    assert {p.name for p in tmp_path.iterdir()} == beside


def test_a_seal_is_the_sha_256_of_the_compact_document(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path, synthetic_manifest(Hidden()), 2, 1, 2)
    text = (tmp_path / "manifest.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    seal = content.pop("checksum")
    compact = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    assert seal == hashlib.sha256(compact.encode()).hexdigest() == store.fingerprint
    names = {"plan.parquet", "samples.parquet", "heads/heads.safetensors"}
    assert_sums(tmp_path, content["files"], names)
    write_synthetic_shard(store, 0, 10)
    shard = tmp_path / "shards/00000"
    record = json.loads((shard / "shard.json").read_text())
    assert record["manifest"] == PredictionStore.open(tmp_path).fingerprint
    files = {str(p.relative_to(shard)) for p in shard.rglob("*") if p.is_file()}
    assert_sums(shard, record["files"], files - {"shard.json"})


def assert_sums(folder: Path, recorded: dict[str, Any], names: set[str]) -> None:
    assert set(recorded) == names
    for name, entry in recorded.items():
        stored = (folder / name).read_bytes()
        assert entry == {"bytes": len(stored), "xxh3": xxhash.xxh3_128_hexdigest(stored)}
