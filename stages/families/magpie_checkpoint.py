"""Checkpoints of MagpieTTS: NeMo's .nemo and .ckpt in, a .nemo that stock NeMo restores out.

No model is built to read another one's weights, and none builds the audio codec: what it must know
of it are two numbers, which the dataset has.
"""

from __future__ import annotations

import pickle
import re
import typing
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch import Tensor, nn

from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families.magpie_settings import MODEL_MODULE, read_model_config
from stages.families.magpie_tokenizers import (
    names_files,
    nothing_downloaded,
)
from stages.families.nemo_archive import (
    REFUSALS,
    WEIGHTS,
    SafeConnector,
    quiet,
    read_weights,
)
from stages.families.weights import check_floating, check_tensors, kept_layers
from stages.model_config import MagpieTeacher
from stages.publish import publish_file

with quiet():
    from nemo.collections.tts.models import MagpieTTSModel
    from nemo.utils.exceptions import NeMoBaseException

MODEL_FILE = "model.nemo"
SPECIAL_TOKENS = 8
"""Ids that NeMo appends to the codes of every codebook."""

DECODER_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
FEED_FORWARD = re.compile(r"pos_ff\.experts\.\d+\.(.+)")


@dataclass(frozen=True)
class AudioCodecFacts:
    """What a model's configuration is completed with: the shape of the codes that it speaks."""

    codebooks: int
    codes_per_codebook: int

    @classmethod
    def of(cls, facts: DatasetFacts) -> AudioCodecFacts:
        """Return those of a dataset."""
        return cls(facts.codebooks, facts.codes_per_codebook)


class AbsentCodec(nn.Module):
    """Takes the place of the audio codec in a model that encodes and decodes no audio."""

    def __init__(self, facts: AudioCodecFacts) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = facts.codebooks, facts.codes_per_codebook
        self.sample_rate = self.output_sample_rate = self.samples_per_frame = 0
        self.discriminator = None

    def freeze(self) -> None:
        """Do nothing: it has no weights."""


@contextmanager
def absent_codec(facts: AudioCodecFacts) -> Iterator[None]:
    """Let NeMo's models be built without their audio codec, which they restore from a file."""

    class Absent:
        @staticmethod
        def restore_from(*_: object, return_config: bool = False, **__: object) -> Any:
            return DictConfig({}) if return_config else AbsentCodec(facts)

        from_pretrained = restore_from

    with patch(f"{MODEL_MODULE}.AudioCodecModel", Absent):
        yield


class _Unweighted(SafeConnector):
    """Restores the configuration and the files of an archive, and leaves the weights fresh."""

    @staticmethod
    def _filtered_tar_info(tar_path: str, filter_fn: Any = None) -> Any:
        del filter_fn
        return SafeConnector._filtered_tar_info(
            tar_path, filter_fn=lambda name: not name.endswith(WEIGHTS)
        )

    @staticmethod
    def _load_state_dict_from_disk(*_: object, **__: object) -> dict[str, Tensor]:
        return {}

    def load_instance_with_state_dict(self, *_: object) -> None:
        """Leave the instance as it is."""


# Reading


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the weights of a .nemo, of NeMo's .ckpt, or of a folder that `train` wrote.

    Nothing is unpickled but tensors and settings. Raises UserError when it cannot be read.
    """
    if path.is_dir():
        path = path / MODEL_FILE
    if path.suffix == ".nemo":
        return read_weights(path)
    try:
        with torch.serialization.safe_globals(SETTINGS), quiet():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors and settings, and reading it would run "
            f"code of whoever made the file ({error}). Save the model as .nemo with NeMo"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}): get it again") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f"{path} is refused: its weights are no dictionary of tensors by name; give a "
            "checkpoint of NeMo's training"
        )
    tensors = {n: x for n, x in weights.items() if isinstance(x, Tensor) and not _foreign(n)}
    if not tensors:
        raise UserError(f"{path} holds no weights: give a checkpoint of NeMo's training")
    return tensors


SETTINGS: list[Any] = [
    DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, typing.Any, defaultdict,
    dict, list, int,
]  # fmt: skip
"""What a training of NeMo's writes into a .ckpt beside tensors."""


def _foreign(name: str) -> bool:
    """Whether a tensor belongs to another model that was there while this one was trained."""
    others = ("_codec_model.", "_teacher_model.", "_reference_model.")
    return name.startswith((*others, "_speaker_verification_model."))


# Building


def build(config: DictConfig, facts: AudioCodecFacts, archive: Path | None) -> MagpieTTSModel:
    """Build a model with fresh weights; `archive` is the .nemo whose files its tokenizers need.

    Raises UserError when NeMo refuses the configuration.
    """
    try:
        with quiet(), absent_codec(facts), nothing_downloaded():
            if archive is None:
                return MagpieTTSModel(config)
            return MagpieTTSModel.restore_from(
                str(archive),
                override_config_path=config,
                map_location="cpu",
                save_restore_connector=_Unweighted(),
            )
    except (*REFUSALS, NeMoBaseException, OSError, RuntimeError) as error:
        advice = ""
        if archive is None and names_files(config):
            advice = (
                ". Its tokenizers read files: name the model's .nemo in nemo, which has them, or "
                "give their absolute paths"
            )
        raise UserError(f"NeMo builds no model from this configuration: {error}{advice}") from error


BAKED = (
    "baked_context_embedding.weight", "_baked_embedding_T", "_baked_embedding_D",
    "baked_context_embedding_len",
)  # fmt: skip
"""Tensors of baked contexts: [speakers, positions · width], both sizes, and every length."""


def bake(model: MagpieTTSModel, source: Path) -> None:
    """Give a fresh model the baked contexts of a .nemo, in place of its context encoder.

    Its configuration does not say that it has them. Raises UserError where they are missing, or
    of another width than the model.
    """
    weights = read_weights(source) if source.suffix == ".nemo" else {}
    if not weights.keys() >= set(BAKED):
        raise UserError(
            f"speakers names baked contexts, but {source} has none: leave it out, or give as nemo "
            "the .nemo of a model that has them"
        )
    table, positions, width, lengths = (weights[name] for name in BAKED)
    shape = (len(lengths), int(positions) * int(width))
    if tuple(table.shape) != shape or int(width) != model.cfg.embedding_dim:
        raise UserError(
            f"{source} has baked contexts of shape {tuple(table.shape)} and width {int(width)}, "
            f"which fit no model of {shape[0]} speakers and width {model.cfg.embedding_dim}: give "
            "the student the width of its teacher"
        )
    model.baked_context_embedding = nn.Embedding(*shape, _weight=table.float())
    model._baked_embedding_T, model._baked_embedding_D = positions, width
    model.baked_context_embedding_len = lengths


def load_teacher(settings: MagpieTeacher, facts: AudioCodecFacts) -> MagpieTTSModel:
    """Load a trained checkpoint without its audio codec, in fp32 on the CPU.

    Raises UserError when it cannot be read, or speaks other codes than `facts` has.
    """
    config = read_model_config(settings.nemo or settings.path)
    weights = read_checkpoint(settings.path)
    check_codes(settings.path, config, weights, facts)
    named = (path for path in (settings.path, settings.nemo) if path is not None)
    archive = next((path for path in named if path.suffix == ".nemo"), None)
    model = build(config, facts, archive)
    load_weights(model, weights, settings.path)
    return model


def check_codes(
    path: Path, config: DictConfig, weights: Mapping[str, Tensor], facts: AudioCodecFacts
) -> None:
    """Refuse a checkpoint whose codes are not the dataset's; raises UserError."""
    tables = [x for name, x in weights.items() if name.startswith("audio_embeddings.")]
    if not tables or tables[0].dim() != 2:
        raise UserError(f"{path} holds no audio embeddings, so it is no MagpieTTS checkpoint")
    codebooks = len(tables) // config.get("frame_stacking_factor", 1)
    codes = tables[0].shape[0] - SPECIAL_TOKENS
    if (codebooks, codes) != (facts.codebooks, facts.codes_per_codebook):
        raise UserError(
            f"the teacher {path} speaks {codebooks} codebooks of {codes} codes, but the dataset's "
            f"audio codec has {facts.codebooks} codebooks of {facts.codes_per_codebook}: prepare "
            "the dataset with the audio codec that the teacher was trained with"
        )


def load_weights(model: MagpieTTSModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy all weights into a model; raises UserError that lists every name that does not fit."""
    ours = state_of(model)
    expected = {name: tuple(x.shape) for name, x in ours.items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    if "baked_context_embedding.weight" in weights:
        # NeMo makes the table when it loads it, and leaves the context encoder out.
        baked = {name: found[name] for name in found if "baked_" in name}
        expected = {n: s for n, s in expected.items() if not n.startswith("context_encoder.")}
        found = {n: s for n, s in found.items() if not n.startswith("context_encoder.")}
        expected |= baked
    check_tensors(path, expected, found)
    check_floating(
        path, {"baked_context_embedding.weight": model.final_proj.weight} | ours, weights
    )
    try:
        with quiet():
            model.load_state_dict(dict(weights))
    except (*REFUSALS, IndexError, RuntimeError) as error:
        raise UserError(f"{path} does not fit the model: {error}") from error


def state_of(model: MagpieTTSModel) -> dict[str, Tensor]:
    """All weights by their names, the audio codec's left out: references, no copies."""
    with quiet():
        state: dict[str, Tensor] = model.state_dict()
    return state


# Inheriting


def inherit(model: MagpieTTSModel, path: Path, layers: Sequence[int] | None) -> None:
    """Copy the weights of a (deeper) checkpoint into a model, decoder layers renumbered.

    Where the model has experts and the checkpoint none, every expert starts as the dense
    feed-forward and the router stays fresh (sparse upcycling, Komatsuzaki et al., 2212.05055).
    Raises UserError if the layers, a name or a shape do not fit.
    """
    theirs = {n: x for n, x in read_checkpoint(path).items() if not n.endswith("causal_mask")}
    ours = {n: x for n, x in state_of(model).items() if not n.endswith("causal_mask")}
    kept = kept_layers(path, layers, _depth(theirs), _depth(ours))
    upcycled = not any(".experts." in name for name in theirs)
    sources = {name: _source(name, kept, upcycled) for name in ours}
    wanted = {name: source for name, source in sources.items() if source is not None}
    used = set(wanted.values())
    unused = {n: n for n in theirs if n not in used and not _layer_left_out(n, kept)}
    found = {n: theirs[s] for n, s in (wanted | unused).items() if s in theirs}
    check_tensors(
        path,
        {name: tuple(ours[name].shape) for name in wanted},
        {name: tuple(x.shape) for name, x in found.items()},
    )
    check_floating(path, ours, found)
    with torch.no_grad():
        for name in wanted:
            ours[name].copy_(found[name])


def _depth(names: Mapping[str, Tensor]) -> int:
    matches = (DECODER_LAYER.fullmatch(name) for name in names)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _source(name: str, kept: Sequence[int], upcycled: bool) -> str | None:
    """Name of the tensor that `name` is copied from; None where it stays fresh."""
    match = DECODER_LAYER.fullmatch(name)
    if match is None:
        return name
    inner = match[2]
    if upcycled and inner.startswith("pos_ff.router."):
        return None
    expert = FEED_FORWARD.fullmatch(inner)
    if upcycled and expert is not None:
        inner = f"pos_ff.{expert[1]}"
    return f"decoder.layers.{kept[int(match[1])]}.{inner}"


def _layer_left_out(name: str, kept: Sequence[int]) -> bool:
    match = DECODER_LAYER.fullmatch(name)
    return match is not None and int(match[1]) not in kept


# Writing


def save(model: MagpieTTSModel, path: Path) -> None:
    """Write a .nemo that stock NeMo restores; it appears whole or not at all."""
    with publish_file(path) as draft, quiet():
        model.save_to(str(draft))
