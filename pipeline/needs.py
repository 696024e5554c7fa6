"""What a configuration needs of a machine: packages, devices, programs, files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster_config import ClusterConfig
from pipeline.config import Run
from pipeline.folders import RunFolders
from stages.causal_lm_config import CausalLMConfig
from stages.config import EvaluateConfig, OptimizerConfig, RolloutConfig
from stages.diffusion.image_config import DigitsConfig, PipelineEncoderConfig
from stages.diffusion.model_config import DenoiserConfig
from stages.diffusion.record_config import RecordConfig
from stages.diffusion.train_config import ImageEvaluateConfig
from stages.errors import UserError
from stages.prepare_config import (
    LoadAudioCodecConfig,
    NemoAudioCodecConfig,
    SnacAudioCodecConfig,
    VoiceConfig,
)
from stages.saved_model import saved_model
from store.object_url import ObjectUrl
from store.schema import Record


@dataclass(frozen=True)
class Need:
    """One thing that a run needs, and the key of the configuration that asks for it."""

    ability: str
    """As `pipeline.probe` is asked for it, or `file PATH`."""
    key: str
    optional: bool = False
    """Whether the run goes on without it, and says so."""


def needs(config: Run) -> list[Need]:
    """Return what a run needs, each once, by the first key that asks for it."""
    found: dict[str, Need] = {}
    for need in (*_of_record(config, "", "auto"), *_of_folders(config)):
        made_here = need.ability.startswith(f"file {RunFolders(config).root}/")
        if not made_here:
            found.setdefault(need.ability, need)
    return list(found.values())


def _of_record(record: Record, key: str, device: str) -> Iterator[Need]:
    """Yield what a record and those within it need; `device` is that of the section around."""
    device = _device(record, device)
    yield from _of_kind(record, key, device)
    for name in type(record).model_fields:
        value, inner = getattr(record, name), f"{key}.{name}".lstrip(".")
        if name == "teacher" and isinstance(value, Record) and getattr(record, "fit", None):
            device = _device(record.fit, device)  # type: ignore[attr-defined]
        if name not in ("runs", "cache"):
            yield from _of_value(value, inner, device)


def _of_value(value: Any, key: str, device: str) -> Iterator[Need]:
    match value:
        case ObjectUrl():
            yield Need(f"object-storage {value.url}", key)
        case Record():
            yield from _of_record(value, key, device)
        case Mapping():
            for name, each in value.items():
                yield from _of_value(each, f"{key}.{name}", device)
        case tuple() | list():
            for number, each in enumerate(value):
                yield from _of_value(each, f"{key}.{number}", device)
        case Path() if key != "store":  # which the run may make
            yield Need(f"file {value}", key)


def _device(record: Record, otherwise: str) -> str:
    own = getattr(record, "device", None)
    of_training = getattr(getattr(record, "optimizer", None), "device", None)
    return own or of_training or otherwise


def _of_kind(record: Record, key: str, device: str) -> Iterator[Need]:
    """Yield what the kind of a record needs, beside what stands within it."""
    asked = {
        "device": None if device == "auto" else getattr(record, "device", None),
        "family": getattr(record, "family", None),
        "quantization": _quantization(record) and f"{_quantization(record)} on {device}",
    }
    yield from (Need(f"{kind} {name}", f"{key}.{kind}") for kind, name in asked.items() if name)
    match record:
        case NemoAudioCodecConfig() | SnacAudioCodecConfig():
            yield Need(f"audio-codec {record.kind}", f"{key}.kind")
        case LoadAudioCodecConfig():
            yield from _of_codec_folder(record.path, f"{key}.path")
        case PipelineEncoderConfig():
            yield Need("image-encoder pipeline", f"{key}.kind")
            for part, each in record.quantization.items():
                yield Need(f"quantization {each} on {device}", f"{key}.quantization.{part}")
        case VoiceConfig():
            yield Need(f"voices {record.engine}", f"{key}.engine")
        case DigitsConfig():
            yield Need("images digits", key)
        case OptimizerConfig() if record.tensorboard:
            yield Need("tensorboard event-files", f"{key}.tensorboard")
        case EvaluateConfig() | ImageEvaluateConfig():
            for name in _judges(record):
                yield Need(f"judge {name}", key, optional=True)
        case ClusterConfig():
            yield Need("slurm", key, optional=True)


def _quantization(record: Record) -> str | None:
    """Return the method by which the linear layers of a model are held that a record describes."""
    match record:
        case RolloutConfig():
            return None if record.quantization is None else record.quantization.method
        case RecordConfig():
            return record.quantization
        case DenoiserConfig():
            return record.base_quantization
        case CausalLMConfig():
            return None if record.quantization == "bf16" else record.quantization
        case _:
            return None


def _judges(record: EvaluateConfig | ImageEvaluateConfig) -> tuple[str, ...]:
    if isinstance(record, EvaluateConfig):
        return record.judges
    return () if record.judge is None else (record.judge,)


def _of_folders(config: Run) -> Iterator[Need]:
    """Yield what models and datasets need that the configuration names by their folders alone."""
    checkpoint = config.teacher.checkpoint if config.teacher else None
    if checkpoint is not None:
        with suppress(UserError):  # of a folder that holds none, its absence is told
            yield Need(f"family {saved_model(checkpoint).config.family}", "teacher.checkpoint")
    if config.dataset is not None:
        yield from _of_codec_folder(config.dataset / "audio_codec", "dataset")


def _of_codec_folder(folder: Path, key: str) -> Iterator[Need]:
    kind = _header(folder / "audio_codec.json").get("kind")
    if kind not in (None, "residual_mel"):
        yield Need(f"audio-codec {kind}", key)


def _header(path: Path) -> dict[str, Any]:
    """Return what a folder says of itself; nothing where it is missing, which is told anyway."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
