"""Records refuse what makes no sense, and sealed documents refuse every altered byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from store import PredictionStore, StoreError
from store.schema import (
    Audit,
    Compact,
    Dense,
    FileSum,
    Full,
    Guidance,
    Head,
    Hidden,
    Latent,
    Manifest,
    Quantization,
    Record,
    Sampler,
    Stream,
    TopK,
)
from store.sealed import MAX_DOCUMENT_BYTES, checksum, seal, unseal
from store.shard import ShardRecord
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.row_stores import BUCKETS, manifest_of

MANIFEST = synthetic_manifest(TopK(k=4, temperatures=(1.0, 2.0), moments=True))


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (Sampler, {"temperature": 0}, "temperature is 0.0 but must be > 0: for greedy"),
        (Sampler, {"top_k": 0}, "top_k is 0 but must be >= 1: use null"),
        (Sampler, {"top_p": 1.5}, r"top_p is 1.5 but must be in \(0, 1\]"),
        (Sampler, {"min_timesteps": 9, "max_timesteps": 8}, r"min_timesteps is 9 .* 8\]: lower it"),
        (Sampler, {"truncated_weight": -1}, r"weight is -1.0 but must be in \[0, 1\]"),
        (Sampler, {"too_short_weight": 1.5}, r"weight is 1.5 but must be in \[0, 1\]"),
        (Sampler, {"max_timesteps_weight": -1}, r"weight is -1.0 but must be in \[0, 1\]"),
        (Sampler, {"rejected_weight": 0}, "Extra inputs are not permitted"),
        (Sampler, {"too_short_multiple": 2, "too_long_multiple": 1}, "every rollout would be"),
        (Sampler, {"end_on": "all"}, "'any', 'first' or 'majority'"),
        (Guidance, {"scale": -1}, "cfg scale is -1.0 but must be >= 0: use 1.0"),
        (Guidance, {"scale": float("nan")}, "finite number"),
        (TopK, {"k": 0}, "k is 0 but must be >= 1: keep at least one id"),
        (TopK, {"k": 1, "temperatures": (2.0, 1.0)}, "rising numbers > 0: list every temperature"),
        (TopK, {"k": 1, "temperature": 1.0}, "Extra inputs are not permitted"),
        (Stream, {"name": "a", "group": "a", "vocabulary": 1}, "is 1 but must be 2 to 2147483648"),
    ],
)
def test_a_refused_setting_names_value_limit_and_remedy(
    record: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        record(**fields)


NO_GROUPS = ["", "lm/head", "a\0b", "..", ".a", "a b", "ä", "a\n", "g" * 65]


@pytest.mark.parametrize("group", NO_GROUPS)
@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (Stream, {"name": "a", "vocabulary": 9}),
        (Latent, {"name": "a", "shape": (4,)}),
        (Head, {"vectors": 1, "width": 4}),
    ],
    ids=["stream", "latent", "head"],
)
def test_a_group_that_cannot_name_an_array_is_refused(
    record: Any, fields: dict[str, Any], group: str
) -> None:
    with pytest.raises(ValidationError, match=r"group is .* but must be 1 to 64 .*: an array"):
        record(group=group, **fields)


def test_the_longest_name_of_a_group_names_an_array(tmp_path: Path) -> None:
    group = "-b.c_" + "g" * 59
    streams = tuple(s.model_copy(update={"group": group}) for s in MANIFEST.streams)
    changes = {"streams": streams, "heads": (Head(group=group, vectors=1, width=4),)}
    hidden = synthetic_manifest(Hidden(branches="both")).model_dump()
    store = synthetic_store(tmp_path, Manifest(**(hidden | changes)), 2, 1, 2)
    write_synthetic_shard(store, 0, 3)
    shard = PredictionStore.open(tmp_path).shard(0)
    assert f"hidden.uncond.{group}" in shard.arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": TopK(k=34)}, "k is 34 but must be <= 33, the allowed ids of stream"),
        ({"forbidden": (40,)}, r"forbidden is \(40,\) but must be rising ids in \[0, 34\)"),
        ({"end_id": 32}, "end_id is 32 but must be an id in .* not forbidden"),
        ({"streams": ()}, "number of streams is 0 but must be 1 to 4096"),
        ({"streams": MANIFEST.streams[:1] * 2}, "stream names given twice"),
        ({"timestep_s": 0.0}, "timestep_s is 0.0 but must be > 0"),
        ({"seed": -1}, "seed is -1 but must be in"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Manifest(**(MANIFEST.model_dump() | change))


def test_a_sealed_manifest_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(seal(MANIFEST))
    assert unseal(path, Manifest) == (MANIFEST, json.loads(path.read_text())["checksum"])
    full = synthetic_manifest(Full(dtype="float32"))
    path.write_bytes(seal(full))
    assert unseal(path, Manifest)[0] == full


def test_a_full_target_without_levels_is_spelled_as_before_there_were_any(tmp_path: Path) -> None:
    assert Full().model_dump() == {"kind": "full", "branches": "guided", "dtype": "float16"}
    for levels in (False, True):
        manifest, path = synthetic_manifest(Full(levels=levels)), tmp_path / f"{levels}.json"
        path.write_bytes(seal(manifest))
        assert unseal(path, Manifest)[0] == manifest
        assert json.loads(path.read_text())["target"].get("levels") == (levels or None)


def test_levels_of_both_branches_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"levels is True but must be false.*guided, or use"):
        Full(branches="both", levels=True)


def test_an_altered_bit_anywhere_in_a_sealed_document_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "manifest.json", seal(MANIFEST)
    for position in range(0, len(text), 3):
        altered = bytearray(text)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            unseal(path, Manifest)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    content = content | {"checksum": checksum(content)}
    path.write_text(json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this foretell reads up to 1: install a newer"),
        ({"format_version": 0}, "has format_version 0 but must have an integer >= 1: no foretell"),
        ({"format_version": -5}, "has format_version -5 but must have an integer >= 1"),
        ({"format_version": "1"}, "has format_version '1' but must have an integer >= 1"),
        ({"format_version": 1.0}, r"has format_version 1\.0 but must have an integer >= 1"),
        ({"format_version": True}, "format_version"),
        ({"seed": "7"}, "seed: Input should be a valid integer"),
        ({"streams": 3}, "streams: Input should be a valid"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"timestep_s": 10**400}, "timestep_s"),
        ({"target": {"kind": "hidden"}}, "target"),
    ],
)
def test_a_wrong_manifest_with_a_right_checksum_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "manifest.json"
    write_sealed(path, MANIFEST.model_dump(mode="json") | change)
    with pytest.raises(StoreError, match=message):
        unseal(path, Manifest)


def fields_of(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where the fields of a JSON object lie, those of the objects in it included."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        if isinstance(value, dict):
            yield (*path, name)
        if isinstance(part, dict | list):
            yield from fields_of(part, *path, name)


RECORD = ShardRecord(
    shard=0, manifest="m", rows=1, rollouts=1, files={"zarr.json": FileSum(bytes=1, xxh3="0")}
)
DOCUMENTS: list[Record] = [
    MANIFEST.model_copy(update={"profile": Compact()}),
    synthetic_manifest(Hidden(branches="both")),
    synthetic_manifest(Dense()),
    manifest_of(tables={"latents": {"rows": 5, "rows_per_part": 2}}, buckets=BUCKETS[:2]),
    RECORD,
]


ADDED = {
    ("architecture",), ("fingerprints", "codes"),
    ("columns",), ("drawn",), ("buckets",), ("tables",), ("recording",),
}  # fmt: skip
"""Fields that docs/format.md allows to be absent, as they are in files of earlier releases."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=["top_k", "hidden", "dense", "rows", "shard"])
def test_a_document_that_lacks_any_field_is_refused_though_the_record_has_a_default(
    tmp_path: Path, document: Record
) -> None:
    path, whole = tmp_path / "document.json", document.model_dump(mode="json")
    write_sealed(path, whole)
    unseal(path, type(document))
    for *above, name in fields_of(whole):
        content = json.loads(json.dumps(whole))
        reduce(lambda part, key: part[key], above, content).pop(name)
        write_sealed(path, content)
        if (*above, name) in ADDED:
            unseal(path, type(document))
        elif "recording" not in above and above[-1:] not in (["files"], ["tables"]):
            # There a name is data.
            with pytest.raises(StoreError, match=rf"document\.json .*{name}"):
                unseal(path, type(document))


WEIGHTS = ("max_timesteps_weight", "too_short_weight", "too_long_weight")


def test_a_manifest_of_one_weight_for_rejected_rollouts_means_what_it_meant(tmp_path: Path) -> None:
    path, content = tmp_path / "manifest.json", MANIFEST.model_dump(mode="json")
    older = {name: value for name, value in content["sampler"].items() if name not in WEIGHTS}
    older |= {"truncated_weight": 0.25, "rejected_weight": 0.01}
    write_sealed(path, content | {"sampler": older})
    manifest, fingerprint = unseal(path, Manifest)
    assert manifest.sampler == MANIFEST.sampler.model_copy(
        update={
            "truncated_weight": 0.25, "max_timesteps_weight": 0.25,
            "too_short_weight": 0.01, "too_long_weight": 0.01,
        }
    )  # fmt: skip
    assert fingerprint == json.loads(path.read_text())["checksum"], "it is the file's own"


def test_a_manifest_of_before_architectures_and_replays_has_none(tmp_path: Path) -> None:
    path, content = tmp_path / "manifest.json", MANIFEST.model_dump(mode="json")
    del content["architecture"], content["fingerprints"]["codes"]
    write_sealed(path, content)
    manifest, _ = unseal(path, Manifest)
    assert (manifest.architecture, manifest.fingerprints.codes) == ({}, "")


QUANTIZATION = Quantization(
    method="int4", dtype="bfloat16", backend="package", backend_version="1.2", layers=("up",),
    kept={"head": "named by 'head'"},
    audit=Audit(samples=2, predictions=9, kl_mean=0.1, kl_p99=0.4, kl_largest=0.2, agreement=0.9),
)  # fmt: skip


def test_a_manifest_says_how_the_teacher_was_quantized_or_nothing_as_before(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    quantized = MANIFEST.model_copy(update={"quantization": QUANTIZATION})
    path.write_bytes(seal(quantized))
    assert unseal(path, Manifest)[0] == quantized
    assert "quantization" not in MANIFEST.model_dump(mode="json")
    path.write_bytes(seal(MANIFEST))
    assert unseal(path, Manifest)[0].quantization is None


@pytest.mark.parametrize("field", ["method", "dtype", "backend", "layers", "kept", "audit"])
def test_what_a_manifest_says_of_quantization_is_whole(tmp_path: Path, field: str) -> None:
    path = tmp_path / "manifest.json"
    content = MANIFEST.model_copy(update={"quantization": QUANTIZATION}).model_dump(mode="json")
    del content["quantization"][field]
    write_sealed(path, content)
    with pytest.raises(StoreError, match=rf"quantization\.{field}"):
        unseal(path, Manifest)


def test_a_manifest_that_gives_one_weight_and_weights_apart_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "manifest.json", MANIFEST.model_dump(mode="json")
    write_sealed(path, content | {"sampler": content["sampler"] | {"rejected_weight": 0.0}})
    with pytest.raises(StoreError, match=r"rejected_weight: Extra inputs"):
        unseal(path, Manifest)


def test_a_newer_format_that_is_spelled_and_sealed_otherwise_asks_for_a_newer_foretell(
    tmp_path: Path,
) -> None:
    path = tmp_path / "manifest.json"
    for text in ('{"format_version":2}', '{"format_version": 3, "checksum": 7, "seed": [1e400]}'):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"reads up to 1: install a newer foretell"):
            unseal(path, Manifest)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"a": NaN}',
        b"\xff\xfe",
        b"{}\n",
        b'{"format_version": 1, "a": 1e400}',
    ],
)
def test_what_is_no_sealed_json_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        unseal(path, Manifest)


def test_an_absurdly_large_document_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StoreError, match=f"over the limit of {MAX_DOCUMENT_BYTES} bytes"):
        unseal(path, Manifest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PredictionStore:
    path = tmp_path_factory.mktemp("fuzz") / "store"
    return synthetic_store(path, MANIFEST, samples=2, variations=1, rollouts_per_shard=2)


@given(field=st.sampled_from(sorted(Manifest.model_fields)), value=JSON)
@settings(max_examples=80)
def test_no_value_of_any_field_breaks_opening_other_than_as_a_store_error(
    store: PredictionStore, field: str, value: Any
) -> None:
    content = store.manifest.model_dump(mode="json") | {field: value}
    with suppress(StoreError):  # a lone surrogate cannot be written
        write_sealed(store.path / "manifest.json", content)
    message = opening_error(store.path)
    assert message is None or str(store.path) in message


def opening_error(path: Path) -> str | None:
    try:
        PredictionStore.open(path)
    except StoreError as error:
        return str(error)
    return None
