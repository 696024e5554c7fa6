"""How a text is written before it is compared with what a recogniser heard.

Both sides are brought to lower case, apostrophes are dropped inside words, every other character
that is no letter becomes a space, and numbers become English words. A recogniser writes `352` both
for "three hundred fifty two" and for "three five two", so digits have two readings, and the one
nearer to the reference is counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (100, "hundred"))

NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?")
LONGEST_CARDINAL = 12
"""Digits above which a number is read digit by digit."""


def normalise(text: str) -> str:
    """Return the words of `text`, lower-case, with numbers spelt as cardinals."""
    return _words(text, _cardinal)


def readings(text: str) -> tuple[str, ...]:
    """Return the ways in which `text` may have been spoken: numbers whole, or digit by digit."""
    return tuple(dict.fromkeys((_words(text, _cardinal), _words(text, _digits))))


def spell(number: int) -> str:
    """Spell a number from 0 to 10**12 - 1 in English, without "and" and hyphens."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        rest = number % 10
        return TENS[number // 10] + (f" {UNITS[rest]}" if rest else "")
    value, name = next(scale for scale in SCALES if number >= scale[0])
    count, rest = divmod(number, value)
    return f"{spell(count)} {name}" + (f" {spell(rest)}" if rest else "")


def _words(text: str, read: Callable[[str], str]) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = NUMBER.sub(lambda match: f" {_read_number(match, read)} ", text)
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    return " ".join(re.findall(r"[^\W\d_]+", text))


def _read_number(match: re.Match[str], read: Callable[[str], str]) -> str:
    whole, decimals = match.group(1).replace(",", ""), match.group(2)
    return read(whole) + (f" point {_digits(decimals)}" if decimals else "")


def _cardinal(digits: str) -> str:
    return spell(int(digits)) if len(digits) <= LONGEST_CARDINAL else _digits(digits)


def _digits(digits: str) -> str:
    return " ".join(UNITS[int(digit)] for digit in digits)
