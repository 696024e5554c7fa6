"""Text tokenizers of MagpieTTS as a configuration names them: what of it may be built and read.

NeMo's own check of a tokenizer's class leaves out what it loads from a hub, with the code there.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from omegaconf import DictConfig, ListConfig, OmegaConf

from stages.errors import UserError
from stages.families.nemo_archive import quiet

with quiet():
    from transformers import ByT5Tokenizer

NAMESPACES = ("nemo.collections.common.tokenizers.text_to_speech.", "nemo.collections.tts.g2p.")
"""Where the classes of tokenizers are, and of what pronounces words for them."""

HUB = "AutoTokenizer"
"""NeMo's name of a tokenizer that it loads from a hub, running the code that is there."""
BYTES = re.compile(r"google/byt5-(small|base|large|xl|xxl)")
"""Tokenizers of the hub that are no more than the bytes of a text, and need no file."""

PACKED_FILES = ("phoneme_dict", "heteronyms")
"""Settings of a file that NeMo packs into an archive."""
OTHER_FILES = ("mapping_file", "tokenizer_path")
"""Settings of a file that NeMo opens and does not pack."""
DRAWN = "phoneme_probability"
"""The share of words that training pronounces, which is 1 here."""

SINGLE, SECTION = "text_tokenizer", "text_tokenizers"


class _ByteTokenizers:
    @staticmethod
    def from_pretrained(*_: object, **__: object) -> ByT5Tokenizer:
        return ByT5Tokenizer()


@contextmanager
def nothing_downloaded() -> Iterator[None]:
    """Let NeMo build the tokenizers that `check_tokenizers` lets pass, without a hub."""
    module = "nemo.collections.tts.data.text_to_speech_dataset_lhotse"
    with patch(f"{module}.AutoTokenizer", _ByteTokenizers):
        yield


def name_tokenizers(config: DictConfig) -> None:
    """Give the one tokenizer of an old configuration the name that NeMo gives it."""
    if SINGLE in config:
        config[SECTION] = {"english_phoneme": config.pop(SINGLE)}


def check_tokenizers(path: Path, config: DictConfig) -> None:
    """Refuse tokenizers that NeMo cannot build, or that run code of others; raises UserError."""
    section = config.get(SECTION)
    if not isinstance(section, DictConfig) or not section:
        raise UserError(
            f"{path} describes a MagpieTTS model with {SECTION}={section}, but it must name its "
            "tokenizers, each with its settings"
        )
    if config.get("legacy_text_conditioning"):
        raise UserError(
            f"{path} is a MagpieTTS model with legacy_text_conditioning, for which NeMo loads a "
            "tokenizer from a hub: use another checkpoint"
        )
    for name, tokenizer in section.items():
        if not isinstance(tokenizer, DictConfig) or "_target_" not in tokenizer:
            raise UserError(f"{path}: {SECTION}.{name} names no class in _target_: add it")
        if not _of_bytes(tokenizer):
            _check_classes(path, f"{SECTION}.{name}", tokenizer)


def _of_bytes(tokenizer: DictConfig) -> bool:
    model = str(tokenizer.get("pretrained_model"))
    return tokenizer.get("_target_") == HUB and BYTES.fullmatch(model) is not None


def _check_classes(path: Path, place: str, section: Any) -> None:
    """Refuse classes of other namespaces, and other words that hydra would act upon."""
    for key, value in _settings(section):
        special = key.startswith("_") and key.endswith("_")
        if special and not (key == "_target_" and _is_known_class(value)):
            raise UserError(
                f"{path}: {place} has {key}={value}, which is not built, for it could run code of "
                f"whoever made the file. Allowed are classes below {' and '.join(NAMESPACES)} and "
                f"{HUB} with pretrained_model google/byt5-small and its sizes: use another "
                "tokenizer or checkpoint"
            )


def _is_known_class(target: Any) -> bool:
    """Whether a name is that of a class of the namespaces, and of nothing that they import."""
    if not isinstance(target, str) or not target.startswith(NAMESPACES):
        return False
    try:
        with quiet():
            found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith(NAMESPACES)


def _settings(section: Any) -> Iterator[tuple[str, Any]]:
    """All keys of a section with their values, however deep."""
    if isinstance(section, Mapping | DictConfig):
        for key, value in section.items():
            yield str(key), value
            yield from _settings(value)
    elif isinstance(section, Sequence | ListConfig) and not isinstance(section, str):
        for value in section:
            yield from _settings(value)


def check_files(path: Path, config: DictConfig, names: Collection[str]) -> None:
    """Refuse an archive whose tokenizers read files that are not in it; raises UserError.

    They would be read on this machine, and saved with every student.
    """
    for key, value in _settings(config.get(SECTION)):
        if key not in (*PACKED_FILES, *OTHER_FILES) or not isinstance(value, str) or not value:
            continue
        packed = value.startswith("nemo:") and value.removeprefix("nemo:") in names
        if key in OTHER_FILES or not packed:
            raise UserError(
                f"the tokenizers of {path} read {key}={value}, which is no file of the archive: "
                "save the model with NeMo where the file is, which packs it"
            )


def names_files(config: DictConfig) -> bool:
    """Whether tokenizers read files."""
    files = (*PACKED_FILES, *OTHER_FILES)
    return any(key in files and isinstance(value, str) for key, value in _settings(config[SECTION]))


def described_tokenizers(config: DictConfig) -> Any:
    """Settings that ids depend on, without files: they are elsewhere on every machine."""
    return _without_files(OmegaConf.to_container(config[SECTION], resolve=True))


def _without_files(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_files(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    files = (*PACKED_FILES, *OTHER_FILES)
    return {
        str(key): _without_files(inner)
        for key, inner in value.items()
        if key != DRAWN and not (key in files and isinstance(inner, str))
    }
