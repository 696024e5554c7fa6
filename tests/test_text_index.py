"""A text is found by its hash, and by its hash alone never."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.text_index import BLOCK, TextIndex

TEXTS = ["a", "b", "ü", "日本", "a b", "", "😀", "ab"]


@given(st.lists(st.text(), unique=True), st.text())
def test_every_text_is_found_in_its_row_and_no_other_is_found(texts: list[str], other: str) -> None:
    valid = [text for text in texts if text.isprintable()]
    index = TextIndex(pa.array(valid, pa.string()))
    assert [index.find(text) for text in valid] == list(range(len(valid)))
    if other not in valid:
        assert index.find(other) is None


@pytest.mark.parametrize("digest", [lambda _: 0, lambda _: 2**64 - 1, lambda text: len(text) % 2])
def test_texts_with_one_hash_are_told_apart(digest) -> None:
    index = TextIndex(pa.array(TEXTS), digest)
    assert [index.find(text) for text in TEXTS] == list(range(len(TEXTS)))
    assert index.find("c") is None
    assert index.find("\ud800") is None


@given(st.lists(st.sampled_from(TEXTS)), st.sampled_from([lambda t: len(t) % 2, None]))
def test_a_column_is_encoded_as_arrow_encodes_it_even_where_texts_share_a_hash(
    column: list[str], digest
) -> None:
    array = pa.array(column, pa.string())
    index, numbers = TextIndex.encode(array, *([digest] if digest else []))
    expected = array.dictionary_encode()
    assert index.texts.equals(expected.dictionary)
    assert numbers.tolist() == expected.indices.to_pylist()
    assert [index.find(text) for text in column] == numbers.tolist()
    assert index.find("c") is None


@pytest.mark.parametrize("digest", [lambda _: 0, lambda text: len(text) % 2, None])
def test_all_texts_of_a_column_are_found_at_once_as_one_by_one(digest) -> None:
    index = TextIndex(pa.array(TEXTS[:5]), *([digest] if digest else []))
    column = pa.array(["none", *reversed(TEXTS), "a", "c"])
    each = [index.find(text) for text in column.to_pylist()]
    assert index.find_all(column).tolist() == [-1 if n is None else n for n in each]
    assert TextIndex(pa.array([], pa.string())).find_all(column).tolist() == [-1] * len(column)


def test_a_column_may_be_long_or_in_chunks_or_a_slice() -> None:
    texts = [f"text {n}" for n in range(BLOCK + 2)]
    index = TextIndex(pa.chunked_array([texts[:3], texts[3:]]))
    assert [index.find(texts[row]) for row in (0, 3, BLOCK - 1, BLOCK, BLOCK + 1)] == [
        0, 3, BLOCK - 1, BLOCK, BLOCK + 1,
    ]  # fmt: skip
    assert TextIndex(pa.array(texts).slice(5)).find(texts[5]) == 0
    assert TextIndex(pa.array([], pa.string())).find("a") is None


def test_an_index_travels_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(TextIndex(pa.array(TEXTS)))).find("日本") == 3
