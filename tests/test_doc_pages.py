"""Pages are complete and can be read aloud: links, anchors, headings, pictures, and the index."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.pages import (
    PAGES,
    ROOT,
    anchors_of,
    blocks_of,
    headings_of,
    links_of,
    page_name,
    pictures_of,
    prose_of,
)

LANGUAGES = {"sh", "console", "python", "yaml", "json", "text"}
INDEX = ROOT / "docs" / "README.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


@every_page
def test_links_lead_to_files_and_headings_that_exist(page):
    dead = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert dead == []


@every_page
def test_a_page_has_one_title_and_no_level_is_skipped(page):
    levels = [level for level, _ in headings_of(page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@every_page
def test_headings_of_a_page_differ(page):
    texts = [text for _, text in headings_of(page)]
    assert len(set(texts)) == len(texts)


@every_page
def test_pictures_are_described_in_a_sentence(page):
    for alternative, file in pictures_of(page):
        assert re.fullmatch(r"[A-Z].{40,}\.", alternative), f"{file} needs words"
    assert "<img" not in prose_of(page)


@every_page
def test_every_block_says_its_language(page):
    unknown = [str(block) for block in blocks_of(page) if block.language not in LANGUAGES]
    assert unknown == []


def test_every_page_is_in_the_index_with_a_sentence():
    lines = {
        (INDEX.parent / link).resolve(): rest
        for link, rest in re.findall(r"\[[^]]+\]\(([^)]+)\)(.*)", INDEX.read_text("utf-8"))
    }
    pages = set(PAGES) - {INDEX, ROOT / "README.md"}
    assert pages <= set(lines)
    assert all(re.search(r"\w.*\.", lines[page]) for page in pages)


def test_the_readme_leads_to_the_index():
    assert "docs/README.md" in links_of(ROOT / "README.md")


def test_anchors_are_named_as_github_names_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `a_b`: what, and why?\n\n```sh\n# no heading\n```\n\n## Twice\n\n## Twice\n")
    assert anchors_of(page) == {"a_b-what-and-why", "twice", "twice-1"}
