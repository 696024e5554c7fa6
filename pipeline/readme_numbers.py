"""Copies the numbers of a run's report into a Markdown file, so that nobody types them.

    python -m pipeline.readme_numbers runs/demo/report README.md

replaces what stands between the lines `<!-- numbers -->` and `<!-- /numbers -->`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.metric_tables import markdown_table, short_count
from stages.errors import UserError
from stages.publish import replace_file
from stages.report_schema import Report

BEGIN, END = "<!-- numbers -->\n", "<!-- /numbers -->"


def fill_numbers(folder: Path, document: Path) -> None:
    """Write the main numbers of `folder`/report.json between the two marks of `document`.

    Raises `UserError` when a mark is missing.
    """
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{document} lacks the lines {BEGIN.strip()} and {END}: add them in order")
    report = Report.read(folder / "report.json")
    filled = f"{before}{BEGIN}{numbers(report)}{END}{after}"
    replace_file(document, filled.encode())


def numbers(report: Report) -> str:
    """Return the table of the systems and a line on stages and samples, as Markdown."""
    memory = ", ".join(
        f"{name} {cost.peak_rss_bytes / 2**20:.0f} MiB in {cost.wall_s:.0f} s"
        for name, cost in report.stages.items()
    )
    note = (
        f"{short_count(report.samples)} held-out samples of {short_count(report.sentences)} "
        "sentences; 95 % bootstrap intervals over sentences in brackets."
    )
    stages = f" Peak memory and time of the stages: {memory}." if memory else ""
    return f"\n{markdown_table(report)}\n{note}{stages}\n\n"


if __name__ == "__main__":
    fill_numbers(Path(sys.argv[1]), Path(sys.argv[2]))
