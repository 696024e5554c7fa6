"""What a teacher's files say of it that settings depend on; what is common where there are none.

No model is loaded, and nothing is needed that reads one.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from pipeline.config import LARGEST_FILE_BYTES

UNREADABLE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, StopIteration)
"""What is raised of an archive that is none, or lacks what is looked for."""
BAKED = b"baked_context_embedding.weight"
LARGEST_PICKLE_BYTES = 2**24
"""Of the names, shapes and places of tensors."""


@dataclass(frozen=True)
class PipelineFiles:
    """What a pipeline of diffusers says of itself, and of SDXL's size where it says none."""

    size: int = 1024
    """Width and height of its images, in pixels."""
    multiple: int = 64
    """Pixels of which a width must be a multiple."""
    zeros: bool = False
    """Whether zeros stand for no text, and not the encoded empty text."""
    told_guidance: bool = False
    """Whether it is told a guidance number, and so has no second pass without the condition."""


def pipeline_files(pipeline: Path) -> PipelineFiles:
    """Return what the files of a pipeline's folder say."""
    index = _json(pipeline / "model_index.json")
    unet, transformer = (_json(pipeline / part / "config.json") for part in ("unet", "transformer"))
    network = unet or transformer
    blocks = _json(pipeline / "vae" / "config.json").get("block_out_channels")
    known = PipelineFiles(
        zeros=index.get("force_zeros_for_empty_prompt") is True,
        told_guidance=network.get("guidance_embeds") is True,
    )
    if not network or not isinstance(blocks, list):
        return known
    pixels = 1 << len(blocks) - 1
    halvings = unet.get("block_out_channels")
    latents = 1 << len(halvings) - 1 if isinstance(halvings, list) else 2
    width = network.get("sample_size")
    size = width * pixels if isinstance(width, int) else known.size
    multiple = max(pixels * latents, size // 16)
    return PipelineFiles(size, multiple, known.zeros, known.told_guidance)


def stacked_frames(checkpoint: Path) -> int:
    """Return the codec frames that a step of a MagpieTTS predicts, as its .nemo has them."""
    try:
        with tarfile.open(checkpoint) as archive:
            member = next(m for m in archive if Path(m.name).name == "model_config.yaml")
            file = archive.extractfile(member)
            if file is None or member.size > LARGEST_FILE_BYTES:
                return 1
            frames = yaml.safe_load(file.read())["frame_stacking_factor"]
    except (*UNREADABLE, yaml.YAMLError, ValueError, KeyError, TypeError):
        return 1
    return frames if frames in (1, 2, 4) else 1


def has_baked_contexts(checkpoint: Path) -> bool:
    """Return whether a MagpieTTS knows its speakers, whom its settings then have to name.

    Its configuration does not say so: the name of the tensor is looked for, and nothing unpickled.
    """
    try:
        # "r:", for a gzipped archive would have to be read up to the weights.
        with tarfile.open(checkpoint, "r:") as archive:
            member = next(m for m in archive if Path(m.name).name == "model_weights.ckpt")
            return BAKED in _pickle_of(archive.extractfile(member))
    except UNREADABLE:
        return False


def _pickle_of(weights: IO[bytes] | None) -> bytes:
    """Return the pickled part of weights that torch saved: names, shapes and places of tensors."""
    if weights is None:
        raise EOFError
    with zipfile.ZipFile(weights) as parts:
        name = next(n for n in parts.namelist() if Path(n).name == "data.pkl")
        with parts.open(name) as pickled:
            return pickled.read(LARGEST_PICKLE_BYTES)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
