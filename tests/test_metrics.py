"""Metrics against formulas written a second time, and intervals against known distributions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stages.metrics import (
    Bootstrap,
    character_errors,
    cosine,
    ratio,
    repeated_words,
    repetition,
    word_errors,
)
from stages.transcripts import normalise, readings, spell


def levenshtein(a, b):
    """The textbook recursion, filled row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def random_texts(count, seed):
    generator = random.Random(seed)
    words = ["red", "blue", "door", "garden", "carry", "now"]
    return [" ".join(generator.choices(words, k=generator.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize(("errors", "split"), [(word_errors, str.split), (character_errors, list)])
def test_error_counts_equal_an_independent_edit_distance(require, errors, split):
    require("jiwer", "pip install jiwer")
    references, heard = random_texts(50, 0), random_texts(50, 1)
    counted = errors(references, heard)
    expected = [levenshtein(split(a), split(b)) for a, b in zip(references, heard, strict=True)]
    assert counted.numerator.tolist() == expected
    assert counted.denominator.tolist() == [len(split(text)) for text in references]
    assert counted.value == sum(expected) / sum(len(split(text)) for text in references)


def test_corpus_error_rate_is_a_ratio_of_sums_and_not_a_mean_of_ratios(require):
    require("jiwer", "pip install jiwer")
    assert word_errors(["a", "b c d e"], ["x", "b c d e"]).value == pytest.approx(1 / 5)


def test_nothing_heard_counts_every_word_as_an_error(require):
    require("jiwer", "pip install jiwer")
    assert word_errors(["open the door"], [""]).value == 1
    assert character_errors(["open"], [""]).value == 1


def test_insertions_count_so_that_an_endless_answer_exceeds_one(require):
    require("jiwer", "pip install jiwer")
    assert word_errors(["now"], ["now now now now"]).value == 3


def test_digits_are_read_in_the_way_that_suits_the_reference(require):
    require("jiwer", "pip install jiwer")
    references = ["seven three nine", "seven hundred thirty nine", "seven three two"]
    assert word_errors(references, ["739"] * 3).numerator.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Put it -- DOWN, please!", "put it down please"),
        ("don't, o’clock 'quoted'", "dont oclock quoted"),
        ("well-known café_au", "well known café au"),
        ("21 cups, 3.05 litres and 1,200 m", "twenty one cups three point zero five litres and "
         "one thousand two hundred m"),
        ("\ufb01sh", "fish"),
        ("…", ""),
    ],
)  # fmt: skip
def test_normalisation_keeps_words_alone(text, words):
    assert normalise(text) == words
    assert normalise(normalise(text)) == normalise(text)


def test_text_without_numbers_has_one_reading():
    assert readings("Open it") == ("open it",)
    assert readings("at 42") == ("at forty two", "at four two")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (80, "eighty"),
        (305, "three hundred five"),
        (1_000_001, "one million one"),
        (999_999_999_999, "nine hundred ninety nine billion nine hundred ninety nine million nine "
         "hundred ninety nine thousand nine hundred ninety nine"),
    ],
)  # fmt: skip
def test_numbers_are_spelt(number, words):
    assert spell(number) == words


def test_all_numbers_below_ten_thousand_are_spelt_differently():
    assert len({spell(number) for number in range(10_000)}) == 10_000


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("the red door", 0),
        ("the the the door", 2),
        ("in the in the in the garden", 4),
        ("the door the", 0),
        ("", 0),
    ],
)
def test_immediate_repetitions_are_counted_in_words(words, count):
    assert repeated_words(words.split()) == count


def test_repetition_leaves_out_what_the_text_itself_repeats():
    measured = repetition(["no no", "open it"], ["no no", "open it open it"])
    assert measured.value == 2 / 4


def test_cosine_of_silence_is_zero():
    values = cosine([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], [[4.0, 3.0], [1.0, 0.0], [-2.0, 0.0]])
    np.testing.assert_allclose(values, [24 / 25, 0, -1])


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    metric = Bootstrap.over([str(i) for i in range(400)], draws=4000, seed=1).metric(ratio(values))
    half = 1.96 * values.std() / 20
    assert metric.value == pytest.approx(values.mean())
    assert metric.low == pytest.approx(values.mean() - half, abs=0.01)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.01)


def test_interval_equals_resampling_written_as_a_loop():
    generator = np.random.default_rng(3)
    sentences = [f"s{i % 7}" for i in range(20)]
    values = ratio(generator.integers(0, 4, 20), generator.integers(1, 9, 20))
    bootstrap = Bootstrap.over(sentences, draws=300, seed=5)
    draws = []
    for weights in bootstrap.weights:
        rows = [i for i, name in enumerate(sentences) for _ in range(weights[int(name[1:])])]
        draws.append(values.numerator[rows].sum() / values.denominator[rows].sum())
    metric = bootstrap.metric(values)
    assert bootstrap.weights.sum(axis=1).tolist() == [7] * 300
    np.testing.assert_allclose([metric.low, metric.high], np.percentile(draws, [2.5, 97.5]))


def test_voices_of_one_sentence_are_drawn_together():
    # Every sentence is spoken by 8 voices that all succeed or all fail with it, so the evidence is
    # that of 25 sentences: taking the 200 clips for independent would be sqrt(8) times too sure.
    fails = np.repeat(np.arange(25) % 2, 8)
    sentences = [str(i // 8) for i in range(200)]
    together = Bootstrap.over(sentences, draws=2000, seed=0).metric(ratio(fails))
    apart = Bootstrap.over([str(i) for i in range(200)], draws=2000, seed=0).metric(ratio(fails))
    widths = [metric.high - metric.low for metric in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(8**0.5, rel=0.15)


def test_paired_difference_sees_what_separate_intervals_hide():
    hard = np.random.default_rng(0).uniform(0, 10, 100)
    bootstrap = Bootstrap.over([str(i) for i in range(100)], draws=1000, seed=0)
    ours, theirs = ratio(hard), ratio(hard + 0.2 + 0.1 * np.sin(np.arange(100)))
    difference = bootstrap.difference(ours, theirs)
    assert bootstrap.metric(ours).high > bootstrap.metric(theirs).low
    assert difference.high < 0
    assert difference.value == pytest.approx(ours.value - theirs.value)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values, names = ratio(np.arange(30.0)), [str(i) for i in range(30)]
    first, again, other = (
        Bootstrap.over(names, draws=200, seed=seed).metric(values) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("above", "below"),
    [([1.0], [0.0]), ([np.nan], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [3.0, -1.0])],
)
def test_ratios_without_meaning_are_refused(above, below):
    with pytest.raises(ValueError, match=r"ratio|denominator"):
        ratio(above, below)
