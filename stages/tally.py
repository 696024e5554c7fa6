"""From the answers of listeners to means and preferences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from stages.answers import Answer, Answers, Fault
from stages.binomial import exact_interval, sign_test
from stages.listening import Key
from stages.metrics import Bootstrap, crossed_metric, ratio
from stages.report_schema import Metric
from store.schema import Record


class Rating(Record):
    """How natural listeners found a system."""

    mos: Metric
    """Mean opinion score, 1 to 5; its interval is null with one sentence and one listener."""
    answers: int
    """Ratings that it is the mean of."""
    listeners: int
    """Listeners who gave them."""


class Preference(Record):
    """Which of two systems listeners found more natural."""

    system: str
    """Name of the one."""
    against: str
    """Name of the other."""
    preferred: int
    """Answers for `system`."""
    rejected: int
    """Answers for `against`."""
    equal: int
    """Answers that found no difference."""
    share: Metric | None
    """Share of `system` among the answers that found a difference; null where none did."""
    p_value: float
    """Of the two-sided sign test on them: small where one is preferred."""


class Tally(Record):
    """What the answers to the sheets of an export add up to."""

    run: str
    """Name of the run."""
    files: int
    """Answers files that were read."""
    listeners: tuple[str, ...]
    """Who answered."""
    answers: int
    """Answers that count."""
    unanswered: int
    """Items that were left empty."""
    ratings: dict[str, Rating]
    """System → how natural it was found."""
    preferences: tuple[Preference, ...]
    """Pairs of systems that were compared."""
    faults: tuple[Fault, ...]
    """What does not count, and why."""


def tally(key: Key, answers: Answers, *, files: int, draws: int, seed: int) -> Tally:
    """Sum up what listeners answered.

    Intervals of means are 95 % percentile intervals of a bootstrap that draws sentences and
    listeners; those of shares are exact for answers that are independent.
    """
    ratings = {s: [a for a in answers.given if _rates(a, s)] for s in key.systems}
    pairs = {
        pair: [a for a in answers.given if _compares(a, pair)]
        for pair in combinations(key.systems, 2)
    }
    return Tally(
        run=key.run,
        files=files,
        listeners=tuple(sorted({answer.listener for answer in answers.given})),
        answers=len(answers.given),
        unanswered=answers.unanswered,
        ratings={s: _rating(given, draws, seed) for s, given in ratings.items() if given},
        preferences=tuple(_preference(*pair, given) for pair, given in pairs.items() if given),
        faults=answers.faults,
    )


def _rates(answer: Answer, system: str) -> bool:
    question = answer.question
    return question.kind == "mos" and question.clips[0].system == system


def _compares(answer: Answer, pair: tuple[str, str]) -> bool:
    question = answer.question
    return question.kind == "ab" and {clip.system for clip in question.clips} == set(pair)


def _rating(given: Sequence[Answer], draws: int, seed: int) -> Rating:
    scores = ratio([int(answer.answer) for answer in given])
    texts = [answer.question.sentence.text for answer in given]
    listeners = [answer.listener for answer in given]
    mos = Metric(value=scores.value)
    if len(set(texts)) > 1 or len(set(listeners)) > 1:
        mos = crossed_metric(
            Bootstrap.over(texts, draws=draws, seed=seed),
            # Of another seed: the two must not be drawn alike.
            Bootstrap.over(listeners, draws=draws, seed=seed + 1),
            scores,
        )
    return Rating(mos=mos, answers=len(given), listeners=len(set(listeners)))


def _preference(system: str, against: str, given: Sequence[Answer]) -> Preference:
    preferred, rejected = (
        sum(_preferred(answer) == name for answer in given) for name in (system, against)
    )
    decided = preferred + rejected
    share = None
    if decided:
        low, high = exact_interval(preferred, decided)
        share = Metric(value=preferred / decided, low=low, high=high)
    return Preference(
        system=system,
        against=against,
        preferred=preferred,
        rejected=rejected,
        equal=len(given) - decided,
        share=share,
        p_value=sign_test(preferred, decided),
    )


def _preferred(answer: Answer) -> str | None:
    """The system that an answer prefers; None where it finds no difference."""
    first, second = (clip.system for clip in answer.question.clips)
    return {"a": first, "b": second}.get(answer.answer)
