"""Which images enter a dataset: checks of rows, files, sizes, captions, labels and splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from tqdm import tqdm

from stages.diffusion.captions import draw_captions
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.image_source import ImageRow, ImageSource, Listed
from stages.diffusion.images import Crop, Mode, Placement, draw_crop, place, resize_mask
from stages.errors import UserError
from stages.rejections import Rejection, kind_of
from stages.sampling import keyed_seed

Conditioning = Literal["texts", "labels", "none"]
"""What becomes the condition of an image."""

ID_DIGITS = 16
"""Hexadecimal digits of the sha256 of an image's file that its sample_id begins with."""

MAX_CLASSES = 2**16
"""Labels may be numbered up to this: each has a row in the table of conditions."""


@dataclass(frozen=True)
class AcceptedImage:
    """An image that enters the dataset, with all that was drawn for it."""

    sample_id: str
    row: ImageRow
    split: str
    placement: Placement
    label: int
    """-1 for none."""
    captions: tuple[str, ...]
    """Of every text variation; none where captions are no condition."""
    crops: tuple[Crop, ...]
    """Of every image variation."""


@dataclass
class ScreenedImages:
    """What was accepted, in the source's order, and what was not, check by check."""

    images: list[AcceptedImage] = field(default_factory=list)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    """Triples of sample_id (empty where the image was not read), file and reason."""
    classes: tuple[str, ...] = ()
    """Names of the labels in id order."""

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Reject those of the accepted images that have a reason, by sample_id."""
        gone = [image for image in self.images if image.sample_id in reasons]
        self.images = [image for image in self.images if image.sample_id not in reasons]
        self.rejected += [(i.sample_id, i.row.file_name, reasons[i.sample_id]) for i in gone]

    def kinds(self) -> dict[str, int]:
        """Count what was rejected by kind of reason."""
        return dict(sorted(Counter(kind_of(reason) for *_, reason in self.rejected).items()))


@dataclass(frozen=True)
class _Read:
    """A sound row with what its file says."""

    row: ImageRow
    content: str
    """Hexadecimal sha256 of the image's file."""
    placement: Placement


def choose_conditioning(source: ImageSource, *, has_text_encoders: bool) -> Conditioning:
    """Captions are encoded where there are text encoders; labels need none; else there is nothing.

    One label makes it a dataset of labels, so that rows without one are noticed.
    """
    if has_text_encoders:
        return "texts"
    labelled = any(
        listed.row is not None and listed.row.label is not None for listed in source.rows
    )
    return "labels" if labelled else "none"


def screen_images(
    source: ImageSource, config: ImagesConfig, conditioning: Conditioning, mode: Mode
) -> ScreenedImages:
    """Check every row of a source, and draw splits, crops and captions for the sound ones.

    Images and masks are decoded whole, so that a damaged one is found before anything is encoded.
    Raises UserError for labels that do not go with `prepare.classes`.
    """
    screened = ScreenedImages()
    times = Counter(_path(listed.file) for listed in source.rows)
    read: list[_Read] = []
    for listed in tqdm(source.rows, desc="reading images", unit="image", disable=None):
        content = ""
        try:
            row = _check_row(listed, times, conditioning)
            content = source.content(row.file_name)
            read.append(_Read(row, content, _check_images(source, row, config, mode)))
        except Rejection as error:
            screened.rejected.append((content[:ID_DIGITS], listed.file, str(error)))
    ids, splits = _sample_ids(read), _splits(read, config)
    numbers = _number_labels(read, config) if conditioning == "labels" else {}
    screened.classes = tuple(numbers)
    for sample_id, each in zip(ids, read, strict=True):
        try:
            image = _accept(sample_id, each, splits[each.content], numbers, config, conditioning)
            screened.images.append(image)
        except Rejection as error:
            screened.rejected.append((sample_id, each.row.file_name, str(error)))
    return screened


def _path(file: str) -> str:
    return str(PurePosixPath(file))


def _check_row(listed: Listed, times: Counter[str], conditioning: Conditioning) -> ImageRow:
    if listed.row is None:
        raise Rejection(listed.fault)
    if (count := times[_path(listed.file)]) > 1:
        raise Rejection(f"duplicate file_name: {count} rows have it; list captions in texts")
    captions = listed.row.captions
    if conditioning == "texts" and not captions:
        raise Rejection("no caption: the row has neither text nor texts")
    if conditioning == "texts" and not all(captions):
        raise Rejection("empty caption: nothing is left without blanks")
    if conditioning == "labels" and listed.row.label in (None, ""):
        raise Rejection("no label: other rows have one")
    return listed.row


def _check_images(
    source: ImageSource, row: ImageRow, config: ImagesConfig, mode: Mode
) -> Placement:
    placement = place(source.image(row.file_name, mode).size, config.buckets)
    if row.mask:
        try:
            resize_mask(source.image(row.mask, "L"), placement)
        except Rejection as error:
            raise Rejection(f"mask: {error}") from error
    return placement


def _sample_ids(read: Sequence[_Read]) -> list[str]:
    """Ids from content, with an ordinal behind the first of equal ones, in the order of names."""
    times: Counter[str] = Counter()
    ids: dict[str, str] = {}
    for each in sorted(read, key=lambda each: each.row.file_name):
        begin = each.content[:ID_DIGITS]
        ids[each.row.file_name] = f"{begin}-{times[begin]}" if times[begin] else begin
        times[begin] += 1
    return [ids[each.row.file_name] for each in read]


def _splits(read: Sequence[_Read], config: ImagesConfig) -> dict[str, str]:
    """Split of every different content, empty where rows disagree.

    What no row assigns is drawn: the first of a keyed order are test, the next dev. Equal images
    stay together, so one is passed over where it would be more than is wanted.
    """
    named: dict[str, set[str]] = defaultdict(set)
    for each in read:
        named[each.content] |= {each.row.split} if each.row.split else set()
    splits = {content: "".join(names) for content, names in named.items() if len(names) == 1}
    splits |= {content: "" for content, names in named.items() if len(names) > 1}
    seed = config.seed if config.digits is None else config.digits.seed
    count = Counter(each.content for each in read)
    left = sorted(count.keys() - splits.keys(), key=lambda c: (keyed_seed(seed, "split", c), c))
    room = {"test": config.test_images, "dev": config.dev_images}
    for content in left:
        fits = [split for split, free in room.items() if count[content] <= free]
        splits[content] = fits[0] if fits else "train"
        if fits:
            room[fits[0]] -= count[content]
    return splits


def _number_labels(read: Sequence[_Read], config: ImagesConfig) -> dict[str, int]:
    """Ids of labels by name. If all are numbers, those are the ids; else names in order are."""
    labels = {str(each.row.label) for each in read}
    numbered = all(label.isascii() and label.isdecimal() for label in labels)
    if not numbered and config.classes is not None:
        names = sorted(label for label in labels if not label.isdecimal())[:3]
        raise UserError(
            f"prepare.classes={config.classes} goes with labels that are numbers, but the source "
            f"has {names}: leave it out, and names are numbered in their order"
        )
    if not numbered:
        return {label: index for index, label in enumerate(sorted(labels))}
    # A number that is too large is rejected by itself and counts for nothing here.
    largest = max((int(label) for label in labels if int(label) < MAX_CLASSES), default=-1)
    return {str(index): index for index in range(config.classes or largest + 1)}


def _accept(
    sample_id: str,
    read: _Read,
    split: str,
    numbers: dict[str, int],
    config: ImagesConfig,
    conditioning: Conditioning,
) -> AcceptedImage:
    if not split:
        raise Rejection("several splits: rows with the same image name different ones")
    row, placement = read.row, read.placement
    label = _number(row, numbers) if conditioning == "labels" else -1
    captions = draw_captions(row.captions, sample_id, config) if conditioning == "texts" else ()
    crops = (
        draw_crop(placement, sample_id, variation, config)
        for variation in range(config.image_variations)
    )
    return AcceptedImage(sample_id, row, split, placement, label, captions, tuple(crops))


def _number(row: ImageRow, numbers: dict[str, int]) -> int:
    """Id of a row's label, by its name or, as in 07, by its number; raises Rejection."""
    name = str(row.label)
    if name not in numbers and name.isascii() and name.isdecimal():
        name = str(int(name))
    if name not in numbers:
        raise Rejection(f"unknown label: {row.label!r}, but there are {len(numbers)}")
    return numbers[name]
