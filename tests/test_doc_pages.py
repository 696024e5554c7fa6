"""Pages are complete and can be read aloud: links, anchors, headings, pictures, and the index."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from pipeline.config import KINDS
from store.schema import Manifest
from tests.pages import (
    PAGES,
    ROOT,
    anchors_of,
    blocks_of,
    code_of,
    headings_of,
    links_of,
    page_name,
    pictures_of,
    prose_of,
)
from tests.test_configs import records_of

LANGUAGES = {"sh", "console", "python", "yaml", "json", "text"}
RECORDS = {record for kind in (*KINDS.values(), Manifest) for record in records_of(kind, set())}
SECTIONS = {field for kind in KINDS.values() for field in kind.model_fields} | {
    "buckets", "encoder", "guidance", "init", "loader", "loss", "optimizer", "previews",
    "quantization", "sampler", "target",
}  # fmt: skip
"""What a setting that a page names begins with."""
OF_OTHERS = {"dataset.json", "sampler.rejected_weight", "stages/families/my_family.py"}
"""A file, a field of stores of earlier releases, and a module that a reader is to write."""
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


@every_page
def test_settings_and_files_within_sentences_exist(page):
    fields = {field for record in RECORDS for field in record.model_fields}
    unknown = []
    for code in code_of(page):
        setting = re.fullmatch(r"([a-z_]+)(?:\.[A-Za-z_]+)*\.([a-z_]+)(?:[=:].*)?", code)
        if setting is not None and setting[1] in SECTIONS and setting[2] not in fields:
            unknown.append(code)
        file = re.fullmatch(r"(?:\w+/)+[\w.-]+\.(?:py|yaml|md)", code)
        if file is not None and not (ROOT / code).exists():
            unknown.append(code)
    assert set(unknown) <= OF_OTHERS


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
