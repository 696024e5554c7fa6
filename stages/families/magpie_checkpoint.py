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
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode
from torch import Tensor, nn
from yaml import YAMLError

from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families.magpie_tokenizers import (
    check_files,
    check_tokenizers,
    name_tokenizers,
    names_files,
    nothing_downloaded,
)
from stages.families.nemo_archive import (
    REFUSALS,
    WEIGHTS,
    SafeConnector,
    archive_names,
    check_class,
    quiet,
    read_config,
    read_weights,
)
from stages.families.weights import check_floating, check_tensors, kept_layers
from stages.model_config import MagpieConfig, MagpieTeacher
from stages.publish import publish_file

with quiet():
    from nemo.collections.tts.models import MagpieTTSModel
    from nemo.utils.exceptions import NeMoBaseException

MODULE = "nemo.collections.tts.models.magpietts"
MODEL_CLASSES = (
    f"{MODULE}.MagpieTTSModel",
    "nemo.collections.tts.models.magpietts_cfg_distillation.OnlineCFGDistillation",
    "nemo.collections.tts.models.magpietts_preference_optimization.MagpieTTSModelOnlinePO",
    "nemo.collections.tts.models.magpietts_preference_optimization.MagpieTTSModelOfflinePO",
)
"""What a .nemo may say it is: the model, or a way to train it, whose weights are the same."""
MODEL_FILE = "model.nemo"
SPECIAL_TOKENS = 8
"""Ids that NeMo appends to the codes of every codebook."""

DATA_KEYS = (
    "train_ds", "validation_ds", "test_ds", "text_context_remapping_json",
    "text_context_remapping_prob",
)  # fmt: skip
DISTILLATION_KEYS = (
    "teacher_model_path", "max_decoder_steps", "rollout_temperature", "rollout_topk",
    "use_kv_cache_during_rollout", "distillation_cfg_scale", "distillation_temperature", "alpha",
    "beta", "truncation_threshold", "truncation_weight", "moe_loss_weight",
    "distill_local_transformer", "lt_loss_weight", "lt_distillation_start_step",
    "lt_distillation_ramp_len", "init_from_nemo_model", "init_from_ptl_ckpt", "init_strict",
)  # fmt: skip
"""Settings of NeMo's online distillation, which are no part of a model."""
OPTIONAL_KEYS = (
    "use_moe", "decoder.use_moe", "decoder.num_experts", "decoder.top_k_experts",
    "decoder.router_jitter_noise", "decoder.routing_strategy", "router_load_balancing_loss_coeff",
    "router_z_loss_coeff", "frame_stacking_factor", "local_transformer_type",
    "local_transformer_n_layers", "local_transformer_n_heads", "local_transformer_hidden_dim",
    "codecmodel_path", "cfg_unconditional_prob",
)  # fmt: skip
"""Keys that NeMo has defaults for, so that a configuration may lack what `overrides` sets."""

PARTS = ("encoder", "context_encoder", "decoder")
SIZES = (
    "embedding_dim", "frame_stacking_factor", "local_transformer_n_layers",
    "local_transformer_n_heads", "local_transformer_hidden_dim", "decoder.xa_d_memory",
    "decoder.xa_n_heads", "decoder.xa_d_head", "decoder.num_experts", "decoder.top_k_experts",
    *(
        f"{part}.{size}"
        for part in PARTS
        for size in (
            "n_layers", "d_model", "d_ffn", "sa_n_heads", "kernel_size", "max_length_causal_mask"
        )
    ),
)  # fmt: skip
"""Settings that count something of which there must be one at least."""
SHARES = (
    "cfg_unconditional_prob",
    *(f"{part}.{rate}" for part in PARTS for rate in ("p_dropout", "p_dropout_out")),
)

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

    with patch(f"{MODULE}.AudioCodecModel", Absent):
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


def read_model_config(path: Path) -> DictConfig:
    """Read NeMo's configuration of a MagpieTTS model from a .nemo, or from a .yaml.

    What belongs to its training data and to online distillation is left out. Raises UserError when
    it cannot be read, is another model's, or would run code or read files of others.
    """
    if path.suffix == ".nemo":
        config = read_config(path)
        check_class(path, config, "a MagpieTTS model", *MODEL_CLASSES)
    else:
        config = _read_yaml(path)
    name_tokenizers(config)
    for key in (*DATA_KEYS, *DISTILLATION_KEYS, "target"):
        config.pop(key, None)
    config.train_ds = config.validation_ds = None
    # NeMo refuses a model without these, which only its own training reads.
    for key, value in {"prior_scaling_factor": None, "prior_end_step": 0}.items():
        config.setdefault(key, value)
    config.setdefault("prior_scaledown_start_step", 0)
    _check_supported(path, config)
    if path.suffix == ".nemo":
        check_files(path, config, archive_names(path))
    return config


def _read_yaml(path: Path) -> DictConfig:
    try:
        document = OmegaConf.load(path)
        section = document.model if "model" in document else document
        content = OmegaConf.to_container(section, resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as NeMo's configuration: {error}") from error
    if not isinstance(content, dict) or "decoder" not in content:
        raise UserError(
            f"{path} is not the configuration of a MagpieTTS model: it has no section decoder, "
            "nor a section model with one"
        )
    return OmegaConf.create(content)


def overridden(config: DictConfig, settings: MagpieConfig) -> DictConfig:
    """Return NeMo's configuration with the keys of `overrides` changed.

    Raises UserError for a key that neither the configuration nor NeMo knows.
    """
    changed = config.copy()
    try:
        for key, value in settings.overrides.items():
            missing = OmegaConf.select(config, key, default=OPTIONAL_KEYS) is OPTIONAL_KEYS
            if missing and key not in OPTIONAL_KEYS:
                raise UserError(
                    f"model.overrides names {key!r}, which {settings.nemo} does not have: correct "
                    "it, or add the key to that configuration"
                )
            OmegaConf.update(changed, key, value, force_add=True)
        OmegaConf.resolve(changed)
    except REFUSALS as error:
        raise UserError(
            f"model.overrides does not fit the configuration in {settings.nemo}: {error}"
        ) from error
    _check_supported(settings.nemo, changed)
    return changed


def _check_supported(path: Path, config: DictConfig) -> None:
    """Refuse models that this family does not decode as NeMo would."""
    _check_sections(path, config)
    check_tokenizers(path, config)
    decoder = config.decoder
    wanted = {
        "model_type": (config.get("model_type"), ("decoder_ce",)),
        "decoder.kernel_size": (decoder.get("kernel_size"), (1,)),
        "decoder.has_xattn": (decoder.get("has_xattn"), (True,)),
        "decoder.is_causal": (decoder.get("is_causal", True), (True,)),
        "frame_stacking_factor": (config.get("frame_stacking_factor", 1), (1, 2, 4)),
        "vector_quantizer": (config.get("vector_quantizer"), (None,)),
    }
    if config.get("frame_stacking_factor", 1) != 1:
        # NeMo then takes a context for as long as it was before its frames were stacked.
        reads_text = config.get("use_text_conditioning_encoder", False)
        wanted["use_text_conditioning_encoder with stacked frames"] = (reads_text, (False, None))
    for key, (found, known) in wanted.items():
        if found not in known:
            listed = " or ".join(str(value) for value in known)
            raise UserError(
                f"{path} is a MagpieTTS model with {key}={found}, but the family magpie takes "
                f"{key}={listed}: use another checkpoint"
            )
    _check_values(path, config)
    _check_widths(path, config)


def _check_sections(path: Path, config: DictConfig) -> None:
    """Refuse a configuration whose parts are no sections."""
    for part in PARTS:
        found = config.get(part)
        if not isinstance(found, DictConfig):
            raise UserError(
                f"{path} describes a MagpieTTS model with {part}={found}, but it must be a section "
                "with the settings of that part"
            )


def _check_values(path: Path, config: DictConfig) -> None:
    """Refuse numbers that make no model."""
    for key in (*SIZES, *SHARES):
        value = OmegaConf.select(config, key)
        size = key in SIZES
        number = isinstance(value, int if size else int | float) and not isinstance(value, bool)
        if value is None or (number and (value >= 1 if size else 0 <= value <= 1)):
            continue
        raise UserError(
            f"{path} describes a MagpieTTS model with {key}={value}, but it must be "
            f"{'a whole number from 1 on' if size else 'a number from 0 to 1'}: correct it in "
            "the configuration or in model.overrides"
        )


def _check_widths(path: Path, config: DictConfig) -> None:
    """Refuse parts that cannot read each other, which NeMo finds out when it runs them."""
    width = config.get("embedding_dim")
    keys = ("encoder.d_model", "context_encoder.d_model", "decoder.d_model", "decoder.xa_d_memory")
    others = {key: OmegaConf.select(config, key) for key in keys}
    wrong = [f"{key}={found}" for key, found in others.items() if found != width]
    if wrong:
        raise UserError(
            f"{path} describes a MagpieTTS model with embedding_dim={width}, but "
            f"{', '.join(wrong)}: all of them must be equal, for its parts read each other's states"
        )


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
