"""The pages of the documentation as tests read them: blocks of code, headings, links, pictures."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARK = re.compile(r"<!-- (needs|tested): (\S.*\S) -->")
FENCE = re.compile(r" *```(.*)")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first fence, from 1."""
    language: str
    text: str
    mark: tuple[str, str] | None
    """`needs` or `tested`, and what: the comment directly above, which a reader does not see."""

    def __str__(self) -> str:
        return f"{page_name(self.page)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is executed as it stands here."""
        return self.mark is None and self.language in ("sh", "console", "python")

    def commands(self) -> list[str]:
        """Lines of a shell that are typed: of a `console` those behind a `$`."""
        return [command for command, _ in self.exchanges()]

    def exchanges(self) -> list[tuple[str, list[str]]]:
        """What is typed, each with the output that the page shows below it."""
        found: list[tuple[str, list[str]]] = []
        continued = False
        for line in self.text.splitlines():
            if continued:
                found[-1] = (f"{found[-1][0]} {line.strip()}", [])
            elif self.language == "sh" and line.strip() and not line.startswith("#"):
                found.append((line, []))
            elif self.language == "console" and line.startswith("$ "):
                found.append((line[2:], []))
            elif self.language == "console":
                found[-1][1].append(line)
            continued = line.endswith("\\")
            if continued:
                found[-1] = (found[-1][0].removesuffix("\\"), [])
        return found


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, opened = [], None
    for number, line in enumerate(lines):
        fence = FENCE.fullmatch(line)
        if fence is None:
            continue
        if opened is None:
            opened = number, fence[1]
            continue
        begin, language = opened
        above = MARK.fullmatch(lines[begin - 1].strip()) if begin else None
        text = textwrap.dedent("\n".join(lines[begin + 1 : number])) + "\n"
        mark = (above[1], above[2]) if above else None
        found.append(Block(page, begin + 1, language, text, mark))
        opened = None
    assert opened is None, f"{page}: a block is not closed"
    return found


def prose_of(page: Path) -> str:
    """The page without its blocks."""
    outside, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.fullmatch(line):
            inside = not inside
        elif not inside:
            outside.append(line)
    return "\n".join(outside)


def headings_of(page: Path) -> list[tuple[int, str]]:
    """Level and text of every heading, in order."""
    found = re.findall(r"^(#+) (.+)$", prose_of(page), flags=re.MULTILINE)
    return [(len(signs), text) for signs, text in found]


def anchors_of(page: Path) -> set[str]:
    """Names of headings in links, as GitHub forms them."""
    seen: Counter[str] = Counter()
    found = set()
    for _, text in headings_of(page):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def links_of(page: Path) -> list[str]:
    """Where links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose_of(page)))


def pictures_of(page: Path) -> list[tuple[str, str]]:
    """Alternative text and file of every picture."""
    return re.findall(r"!\[([^]]*)\]\(([^)\s]+)\)", prose_of(page))


def code_of(page: Path) -> Iterator[str]:
    """Yield what stands as code within sentences and tables."""
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(page)):
        yield " ".join(span.split())
