"""Asks this machine whether something can run: `python -m pipeline.probe 'family magpie' ...`.

In a process of its own, for packages are imported in earnest: they take seconds and memory, may
write to the terminal, and some that are broken end the process. Every question is put to the
function that refuses in a stage, so that the answer is the stage's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch

from pipeline.slurm import require_slurm
from stages.diffusion.image_source import require_scikit_learn
from stages.diffusion.judge import missing_reason as digits_judge_missing
from stages.distributed import choose_device, computes_bf16
from stages.errors import UserError
from stages.event_file import missing_reason as event_files_missing
from stages.family import (
    load_audio_codec_class,
    load_denoiser,
    load_family,
    load_image_encoder,
)
from stages.judges import missing_package
from stages.prepare_config import VoiceConfig
from stages.quantization import require_backend
from stages.silence import silenced
from stages.voices import check_engine
from store import StoreError
from store.object_client import ObjectClient
from store.object_url import ObjectUrl

MACHINE = "machine"
"""Asks for the devices, and for torch itself."""
FP8_SINCE = (8, 9)
"""Compute capability from which on NVIDIA's devices multiply in fp8."""


def reason(ability: str) -> str | None:
    """Say why an ability such as `family magpie` is not to be had here; None where it is.

    Raises `UserError` for one that nobody knows; what is wrong within a package passes through.
    """
    kind, _, name = ability.partition(" ")
    if kind not in ASKED:
        raise UserError(f"{ability!r} begins with none of {', '.join(ASKED)}")
    try:
        with silenced(), redirect_stdout(sys.stderr):
            told = ASKED[kind](name)
    except (UserError, StoreError, ImportError) as error:
        return str(error)
    return told if isinstance(told, str) else None


def _quantize(name: str) -> None:
    """Ask for a method on a device: `int8 on cuda`."""
    method, _, device = name.partition(" on ")
    require_backend(method, choose_device(device))  # type: ignore[arg-type]


def _family(name: str) -> object:
    return load_denoiser() if name == "diffusion" else load_family(name)  # type: ignore[arg-type]


def _judge(name: str) -> str | None:
    return digits_judge_missing() if name == "digits" else missing_package(name)  # type: ignore[arg-type]


def _speak(engine: str) -> None:
    check_engine(VoiceConfig.model_validate({"speaker": "any", "engine": engine} | VOICES[engine]))


ASKED: dict[str, Callable[[str], object]] = {
    "audio-codec": load_audio_codec_class,
    "device": choose_device,
    "family": _family,
    "image-encoder": lambda _: load_image_encoder(),
    "images": lambda _: require_scikit_learn(),
    "judge": _judge,
    "object-storage": lambda url: ObjectClient(ObjectUrl(url=url)).require_configured(),
    "quantization": _quantize,
    "slurm": lambda _: require_slurm(),
    "tensorboard": lambda _: event_files_missing(),
    "voices": _speak,
}
"""Kind of ability → what a stage would call for it: it refuses, or returns a reason."""

VOICES: dict[str, dict[str, str]] = {"hibari": {"voice": "heart"}, "flite": {"voice": "rms"}}
"""A voice of every engine."""


def machine() -> dict[str, Any]:
    """Return the version of torch and the devices that it sees, with what they compute."""
    cpu = {"name": "cpu", "memory_bytes": _memory_bytes(), "fp8": False}
    devices = [cpu | {"bf16": computes_bf16(torch.device("cpu"))}]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index} {found.name}",
                "memory_bytes": found.total_memory,
                "bf16": computes_bf16(torch.device("cuda", index)),
                "fp8": (found.major, found.minor) >= FP8_SINCE,
            }
        )
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(asked: Sequence[str]) -> None:
    """Answer every question with a line of JSON, as soon as it is known."""
    for ability in asked:
        if ability == MACHINE:
            answer: dict[str, Any] = {"ability": ability, "machine": machine()}
        else:
            answer = {"ability": ability, "reason": reason(ability)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
