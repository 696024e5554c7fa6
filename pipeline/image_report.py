"""What the page of an evaluation shows of images: tables at several step counts, and a grid."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from PIL import Image

from pipeline.embedding import data_address, named_file
from pipeline.html_tables import html_table, row_head
from pipeline.metric_tables import (
    MAIN_METRICS,
    metric_table,
    seed_hint,
    system_dot,
    system_label,
)
from stages.report_schema import Images, ImageSample, Report

LARGEST_SIDE = 384
"""Pixels of a side up to which a picture is in the page as it is; larger ones are scaled."""
SMALL_SIDE = 64
"""Pixels of a side up to which pixels are drawn as squares."""
LONGEST_CAPTION = 40
"""Letters of a caption that the head of a column surely shows."""
REFERENCE = "reference"
OF_A_MODEL = ("parameters", "flops_per_timestep", "passes")
"""Metrics that are the same at every count of solver steps."""

FOOTER = (
    "Intervals are 95\N{NO-BREAK SPACE}% percentile bootstrap intervals over images. Differences "
    "are paired: both systems are resampled with the same images, which begin in the same noise. "
    "The numbers of this page are in report.json beside it."
)
STEPS_HINT = "The same images with the same start noise; the guided teacher's take as many steps."
FEATURES = {
    "pixels": "the pixels themselves",
    "areas": "the means over an 8\N{MULTIPLICATION SIGN}8 grid of areas of every channel",
}


def lead(report: Report) -> str:
    """Say in one sentence what was compared."""
    assert report.images is not None
    ran = [judge.name for judge in report.judges if judge.reason is None]
    judged = f"judged by {', '.join(ran)}" if ran else "with no judge"
    return (
        f"{report.samples} images per system of {report.sentences} different conditions, "
        f"{report.images.solver_steps} solver steps, {judged}."
    )


def systems_hint(images: Images) -> str:
    """Say what the numbers of systems are of."""
    return (
        "All systems draw the same conditions from the same start noise. The Fréchet distance "
        f"takes {FEATURES[images.features]} for Gaussian, to {images.references} reference "
        "images; in small samples it is too large, for all systems alike. That of the reference "
        "images is between two halves of them, each with half as many images."
    )


def grid_hint(report: Report) -> str:
    """Say what stands beside what in the grid."""
    return (
        f"Every column begins in the same noise{seed_hint(report)}, and has the same condition; "
        "the reference is the sample's own image."
    )


def system_table(report: Report, images: Images) -> str:
    """Return the table of systems, the reference images first."""
    first = {} if images.reference is None else {REFERENCE: images.reference}
    caption = "Metrics of all systems and of the reference images"
    return metric_table(report, MAIN_METRICS, caption, first | report.systems)


def other_steps(report: Report, images: Images) -> str:
    """Return one table per further count of solver steps, of what depends on it."""
    metrics = {name: shown for name, shown in MAIN_METRICS.items() if name not in OF_A_MODEL}
    return "".join(
        f"<h3>{count}</h3>{metric_table(report, metrics, f'Metrics after {count}', systems)}"
        for steps, systems in images.other_steps.items()
        for count in [f"{steps} {'step' if steps == 1 else 'steps'}"]
    )


def image_grid(report: Report, images: Images, folder: Path) -> str:
    """Return the pictures as a table: conditions across, the reference and the systems down."""
    if not images.samples:
        return ""
    columns = [
        f'<span class="caption" title="{escape(sample.sample_id)}">{escape(sample.text)}</span>'
        for sample in images.samples
    ]
    names = [REFERENCE, *report.systems]
    rows = (_row(name, report, images.samples, folder) for name in names)
    table = html_table(
        "Images by system and condition", ["system", *columns], filter(None, rows), "pictures"
    )
    return table + _captions(images)


def _captions(images: Images) -> str:
    """Return the captions in full, where the heads of columns cannot hold them."""
    if max(len(sample.text) for sample in images.samples) <= LONGEST_CAPTION:
        return ""
    items = "".join(f"<li>{escape(sample.text)}</li>" for sample in images.samples)
    return f"<details><summary>Captions</summary><ol>{items}</ol></details>"


def _row(name: str, report: Report, samples: tuple[ImageSample, ...], folder: Path) -> str:
    files = [s.reference if name == REFERENCE else s.files.get(name) for s in samples]
    if not any(files):
        return ""
    cells = "".join(
        f"<td>{_picture(file, f'{system_label(name)}: {sample.text}', folder) if file else ''}</td>"
        for file, sample in zip(files, samples, strict=True)
    )
    return f"{row_head(system_label(name), mark=system_dot(name, report))}{cells}"


def _picture(file: str, described: str, folder: Path) -> str:
    content = named_file(folder, file, "picture").read_bytes()
    width, height = _size(content)
    kind = ' class="squares"' if max(width, height) <= SMALL_SIDE else ""
    address = (
        data_address("image/png", content)
        if max(width, height) <= LARGEST_SIDE
        else data_address("image/jpeg", _scaled(content))
    )
    return f'<img{kind} src="{address}" alt="{escape(described)}">'


def _size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file, from its first chunk (RFC 2083, 11.2.2)."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def _scaled(png: bytes) -> bytes:
    """Return a large picture as a JPEG file for a page; the PNG file stays beside it."""
    packed = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        picture.save(packed, "JPEG", quality=90)
    return packed.getvalue()
