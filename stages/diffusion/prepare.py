"""Stage zero of images: a folder becomes a dataset of latents and encoded conditions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from stages.dataset_folder import SPLITS, refuse_other_settings
from stages.diffusion.conditions_pass import CaptionsPass, Rows, write_labels
from stages.diffusion.dataset import (
    DECODER,
    IMAGES_VERSION,
    REFERENCES,
    REJECTED,
    SAMPLES,
    ImageDataset,
    ImageHeader,
    fingerprint,
    read_header,
)
from stages.diffusion.denoiser import ImageEncoder
from stages.diffusion.facts import ConditionFacts, ImageFacts
from stages.diffusion.image_config import DigitsConfig, ImagesConfig, PipelineEncoderConfig
from stages.diffusion.image_source import Digits, ImageFolder, ImageSource
from stages.diffusion.images import Mode
from stages.diffusion.kept_batches import KeptBatches
from stages.diffusion.latents_pass import ImagesPass
from stages.diffusion.pixels import PixelsEncoder
from stages.diffusion.screened_images import (
    AcceptedImage,
    Conditioning,
    ScreenedImages,
    choose_conditioning,
    screen_images,
)
from stages.distributed import choose_device
from stages.encoded_parts import parts_folder, remove_parts
from stages.errors import UserError
from stages.family import load_image_encoder
from stages.publish import publish_folder
from stages.rejections import rejection_table
from store.errors import explain_os_errors
from store.schema import FileSum, TableFacts
from store.side_tables import TABLES
from store.sums import file_sum

logger = logging.getLogger(__name__)


def prepare_images(config: ImagesConfig, out: Path) -> ImageDataset:
    """Check, cut and encode the images of a source into the dataset folder `out`.

    Captions are encoded first and images after them, so that text encoders and autoencoder are
    never loaded together. A rejected row is listed in rejected.parquet and stops nothing. A dataset
    that the same settings made from the same table is opened as it is. The folder appears whole or
    not at all; what an interrupted run encoded is not encoded again.
    Raises UserError when the source cannot be used, when nothing is accepted, or when `out` was
    made otherwise; StoreError when the disk fails.
    """
    if out.exists():
        dataset = _reopen(config, out)
        remove_parts(out)
        return dataset
    with explain_os_errors(f"prepare {out}"):
        preparation = _Preparation(config, _open_source(config), parts_folder(out))
        with publish_folder(out) as draft:
            preparation.write(draft)
    dataset = ImageDataset.open(out)
    remove_parts(out)
    _tell(dataset)
    return dataset


def _tell(dataset: ImageDataset) -> None:
    """Log what was accepted, and a table of what was not."""
    header = dataset.header
    accepted, left_out = sum(header.samples.values()), sum(header.rejected.values())
    splits = ", ".join(f"{split} {header.samples[split]}" for split in SPLITS)
    logger.info(
        "%s: %d of %d images accepted: %s", dataset.path, accepted, accepted + left_out, splits
    )
    if left_out:
        rows = [{"sample_id": row["file"], "reason": row["reason"]} for row in dataset.rejected()]
        logger.info(
            "%d rejected, each with its reason in rejected.parquet:\n%s",
            left_out,
            rejection_table(rows),
        )


def _open_source(config: ImagesConfig) -> ImageSource:
    return Digits() if config.source is None else ImageFolder(config.source)


def _open_encoder(config: ImagesConfig) -> ImageEncoder | PixelsEncoder:
    asked = config.encoder
    if not isinstance(asked, PipelineEncoderConfig):
        return PixelsEncoder(asked.channels)
    return load_image_encoder().open(
        asked.path,
        config=asked.config,
        device=choose_device(asked.device),
        precision=asked.precision,
        quantization=asked.quantization,
    )


def _reopen(config: ImagesConfig, out: Path) -> ImageDataset:
    """Open a finished dataset; raises UserError when other settings or another source made it."""
    header = read_header(out)
    asked = _settings(config)
    # A setting that is younger than the dataset had its default there.
    defaults = ImagesConfig(digits=DigitsConfig(), buckets=config.buckets)
    made = _settings(defaults) | header.config
    different = [key for key in asked if made[key] != asked[key]]
    if config.source is not None and config.source.exists():
        different += ["source"] * (header.source_sha256 != ImageFolder(config.source).digest)
    encoder = config.encoder
    if isinstance(encoder, PipelineEncoderConfig) and encoder.path.exists():
        opened = _open_encoder(config)
        different += ["encoder.path"] * (opened.fingerprint() != header.facts.encoder)
    refuse_other_settings(out, different)
    return ImageDataset.open(out)


def _settings(config: ImagesConfig) -> dict[str, JsonValue]:
    """The settings that decide a dataset's content."""
    exclude: Any = {
        "source": True,
        "batch_size": True,
        "encoder": {"path", "config", "device"},
    }
    return config.model_dump(mode="json", exclude=exclude)


class _Preparation:
    """The making of one dataset folder."""

    def __init__(self, config: ImagesConfig, source: ImageSource, parts: Path) -> None:
        """Open the encoder, and decide from it and the source what conditions are."""
        self.config, self.source, self.encoder = config, source, _open_encoder(config)
        encoder = self.encoder
        texts = not isinstance(encoder, PixelsEncoder) and bool(encoder.conditions)
        self.conditioning = choose_conditioning(source, has_text_encoders=texts)
        grey = isinstance(encoder, PixelsEncoder) and encoder.latent_channels == 1
        self.mode: Mode = "L" if grey else "RGB"
        self.shapes = _latent_shapes(config, encoder)
        self.fingerprint = encoder.fingerprint()
        settings = config.encoder.model_dump_json(exclude={"path", "config", "device"})
        # To keep pixels would take longer than to read them again.
        folder = None if isinstance(encoder, PixelsEncoder) else parts
        self.kept = KeptBatches(folder, f"{self.fingerprint} {settings}")

    def write(self, draft: Path) -> None:
        """Fill the draft of the folder."""
        screened = screen_images(self.source, self.config, self.conditioning, self.mode)
        self._check_trainable(screened)
        rows, tables = self._write_tables(screened, draft)
        if not isinstance(self.encoder, PixelsEncoder):
            self.encoder.keep_decoder(draft / DECODER)
        samples = _samples(screened.images, rows)
        pq.write_table(samples, draft / "samples.parquet")
        rejected = [dict(zip(REJECTED.names, each, strict=True)) for each in screened.rejected]
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED), draft / "rejected.parquet")
        header = self._header(samples, screened, tables, draft)
        text = header.model_dump_json(indent=1) + "\n"
        (draft / "dataset.json").write_text(text, encoding="utf-8")

    def _write_tables(
        self, screened: ScreenedImages, draft: Path
    ) -> tuple[dict[str, Rows], dict[str, TableFacts]]:
        """Encode captions and then images; returns rows of samples in both tables, and the tables.

        Captions of images that are rejected on the way do not get into the table.
        """
        config, encoder, folder = self.config, self.encoder, draft / TABLES
        captions = None
        if self.conditioning == "texts" and not isinstance(encoder, PixelsEncoder):
            captions = CaptionsPass(config, encoder, self.kept)
            captions.encode(screened)
        images = ImagesPass(config, self.source, encoder, self.kept, self.mode, self.shapes)
        rows: dict[str, Rows] = {}
        tables: dict[str, TableFacts] = {}
        rows["latents"], tables["latents"] = images.write(
            screened, folder / "latents", draft / REFERENCES
        )
        self._check_trainable(screened)
        if captions is not None:
            written = captions.write(screened, folder / "conditions")
            rows["conditions"], tables["conditions"] = written
        elif self.conditioning == "labels":
            written = write_labels(screened, config.text_variations, folder / "conditions")
            rows["conditions"], tables["conditions"] = written
        else:
            rows["conditions"] = {
                i.sample_id: [-1] * config.text_variations for i in screened.images
            }
        return rows, tables

    def _check_trainable(self, screened: ScreenedImages) -> None:
        if any(image.split == "train" for image in screened.images):
            return
        counts = screened.kinds()
        kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.items()) or "none"
        name = "the digits" if self.config.source is None else self.config.source
        raise UserError(
            f"no image of {name} is left for the train split; rejected {kinds}; "
            f"{self._held_out(screened.images)}"
        )

    def _held_out(self, accepted: Sequence[AcceptedImage]) -> str:
        """Why none of the accepted images is for training."""
        if not accepted:
            return "0 accepted"
        named, config = sum(image.row.split is not None for image in accepted), self.config
        by = [f"by the splits that the table names for {named} of them"] if named else []
        if named < len(accepted):
            settings = {"test_images": config.test_images, "dev_images": config.dev_images}
            by += [f"by prepare.{name}={count}" for name, count in settings.items() if count]
        return f"{len(accepted)} accepted, all held out {' and '.join(by)}: leave some for training"

    def _header(
        self,
        rows: pa.Table,
        screened: ScreenedImages,
        tables: dict[str, TableFacts],
        draft: Path,
    ) -> ImageHeader:
        facts, files = self._facts(screened), _sums(draft, TABLES)
        counts = Counter(rows.column("split").to_pylist())
        return ImageHeader(
            version=IMAGES_VERSION,
            fingerprint=fingerprint(rows, facts, files),
            facts=facts,
            samples={split: counts[split] for split in SPLITS},
            rejected=screened.kinds(),
            tables=tables,
            files=files,
            decoder=_sums(draft, DECODER),
            source_sha256=self.source.digest,
            config=_settings(self.config),
        )

    def _facts(self, screened: ScreenedImages) -> ImageFacts:
        encoder, asked = self.encoder, self.config.unconditional
        conditions: Mapping[str, ConditionFacts] = {}
        if self.conditioning == "labels":
            conditions = {"class_labels": ConditionFacts(dtype="int64", shape=())}
        elif self.conditioning == "texts" and not isinstance(encoder, PixelsEncoder):
            conditions = encoder.conditions
        kinds: dict[Conditioning, Any] = {"texts": asked.kind, "labels": "label", "none": "none"}
        return ImageFacts(
            encoder=self.fingerprint,
            latent_channels=encoder.latent_channels,
            downsample=encoder.downsample,
            scaling=encoder.scaling,
            shift=encoder.shift,
            buckets=self.shapes,
            conditions=dict(conditions),
            unconditional=kinds[self.conditioning],
            unconditional_text=asked.text if self.conditioning == "texts" else None,
            classes=screened.classes,
        )


def _latent_shapes(
    config: ImagesConfig, encoder: ImageEncoder | PixelsEncoder
) -> tuple[tuple[int, int, int], ...]:
    """[channels, height, width] of the latents of every bucket; raises UserError."""
    step = encoder.downsample
    odd = [list(size) for size in config.buckets.sizes if size[0] % step or size[1] % step]
    if odd:
        raise UserError(
            f"prepare.buckets.sizes holds {odd}, but the autoencoder needs multiples of {step}"
        )
    return tuple(
        (encoder.latent_channels, height // step, width // step)
        for width, height in config.buckets.sizes
    )


def _samples(images: Sequence[AcceptedImage], rows: Mapping[str, Rows]) -> pa.Table:
    """The samples table, in the source's order."""
    return pa.table(
        {
            "sample_id": [image.sample_id for image in images],
            "file": [image.row.file_name for image in images],
            "split": [image.split for image in images],
            "text": [next(iter(image.row.captions), None) for image in images],
            "label": [image.label for image in images],
            "target": [image.row.target for image in images],
            "weight": [image.row.weight for image in images],
            "bucket": [image.placement.bucket for image in images],
            **{name: [found[image.sample_id] for image in images] for name, found in rows.items()},
        },
        schema=SAMPLES,
    )


def _sums(draft: Path, folder: str) -> dict[str, FileSum]:
    """Size and hash of every file of a folder of the draft, by its path in the draft."""
    files = sorted(path for path in (draft / folder).rglob("*") if path.is_file())
    return {path.relative_to(draft).as_posix(): file_sum(path.read_bytes()) for path in files}
