"""The answers that a first configuration is made of: which there are, and what is offered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.teacher_files import pipeline_files
from stages.errors import UserError
from store.schema import Guidance

Document = dict[str, Any]
FirstFamily = Literal["codec_lm", "magpie", "orpheus", "diffusion"]
Machine = Literal["cpu", "gpu", "slurm"]

DEMO = "demo"
"""In place of data: speech that a package speaks, or scikit-learn's digits."""
FIT = "fit"
"""In place of a teacher: one that is trained here, from nothing."""

FAMILY_OF = {
    "codec_lm": "a text-to-speech model that can be trained here",
    "magpie": "NVIDIA's MagpieTTS, a .nemo",
    "orpheus": "a language model that speaks SNAC codes, a folder of transformers",
    "diffusion": "an image model of diffusers, such as SD 1.5, SDXL, SD3 or Flux",
}
MACHINE_OF = {
    "cpu": "this machine's CPU cores",
    "gpu": "one CUDA device of this machine",
    "slurm": "jobs on a cluster with Slurm, one CUDA device each",
}
TEACHER_OF = {
    "codec_lm": FIT,
    "magpie": "checkpoints/magpie_tts.nemo",
    "orpheus": "checkpoints/orpheus-3b",
    "diffusion": "models/sdxl",
}
AUDIO_CODEC_OF = {
    "magpie": "checkpoints/nemo-nano-codec-22khz-1.89kbps-21.5fps.nemo",
    "orpheus": "checkpoints/snac_24khz",
}
GUIDANCE_OF = {"codec_lm": 2.5, "magpie": 2.5, "orpheus": 1.5, "diffusion": 7.0}
"""What is offered where nothing is answered."""
TOLD_GUIDANCE = 3.5
"""The number that FLUX.1-dev is told."""


def offered_teacher(family: str, data: str) -> str:
    """Return the answer about the teacher that goes with those before."""
    return FIT if family == "diffusion" and data == DEMO else TEACHER_OF[family]


def offered_guidance(family: str, teacher: str) -> float:
    """Return the answer about guidance that is common with a teacher."""
    told = family == "diffusion" and pipeline_files(Path(teacher)).told_guidance
    return TOLD_GUIDANCE if told else GUIDANCE_OF[family]


def offered_machine(teacher: str) -> Machine:
    """Return where a run is likely to be: what is trained here from nothing is small."""
    return "cpu" if teacher == FIT else "gpu"


def data_question(family: str) -> str:
    """Return how the data is asked for."""
    if family == "diffusion":
        return f"Data: a folder of images, or {DEMO} for scikit-learn's digits"
    return f"Data: a folder or table of recordings, or {DEMO} for speech from a package"


def teacher_question(family: str, data: str) -> str | None:
    """Return how the teacher is asked for; None where only one answer goes with the data."""
    if family == "diffusion":
        return None if data == DEMO else "Teacher: the folder of a pipeline"
    forms = {
        "codec_lm": f"{FIT} to train one here, or the folder of one that was",
        "magpie": "its .nemo",
        "orpheus": "the model's folder",
    }
    return f"Teacher: {forms[family]}"


@dataclass(frozen=True)
class Answers:
    """What a first configuration is made of."""

    family: FirstFamily
    data: str
    """Path of recordings or images, or `demo`."""
    teacher: str
    """Path of a trained teacher, or `fit`."""
    guidance: float
    machine: Machine
    audio_codec: str | None = None
    """Path of the audio codec of a trained teacher; null takes a common name, or for a codec_lm
    where its run has it."""
    speakers: tuple[str, ...] = ()
    """The data's name of each speaker that a magpie knows, in its order."""

    @property
    def gpu(self) -> bool:
        """Whether a device is there for it, on this machine or another."""
        return self.machine != "cpu"

    @property
    def precision(self) -> Document:
        """The key of a section in which a model computes, where it is not fp32."""
        return {"precision": "bf16"} if self.gpu else {}


def check_data(data: str) -> str:
    """Return an answer to where the data is; raises `UserError` for what can be none."""
    if not data.strip():
        raise UserError(f"the data is '', but must be a path, or {DEMO}")
    return data


def check_teacher(family: str, data: str, teacher: str) -> str:
    """Return an answer to where the teacher is; raises `UserError` for one that does not fit."""
    if not teacher.strip():
        raise UserError(f"the teacher is '', but must be a path, or {FIT}")
    if family == "diffusion" and (data == DEMO) != (teacher == FIT):
        raise UserError(
            f"teacher {teacher!r} with data {data!r}: of diffusion a teacher is fitted on the demo "
            "data and on nothing else; with your own images give the folder of a pipeline"
        )
    if family in ("magpie", "orpheus") and teacher == FIT:
        raise UserError(
            f"teacher {FIT!r}: {family} begins with a model that was trained elsewhere; give its "
            f"path, such as {TEACHER_OF[family]}"
        )
    if family == "magpie" and Path(teacher).suffix != ".nemo":
        raise UserError(f"teacher {teacher!r} is no .nemo, as which MagpieTTS is published")
    return teacher


def check_speakers(family: str, text: str) -> tuple[str, ...]:
    """Return names that stand between commas; raises `UserError` for what are none."""
    if family != "magpie":
        raise UserError(f"speakers {text!r}: a {family} takes those of the data; leave them out")
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"speakers {text!r} are no different names with commas between them")
    return names


def check_guidance(text: str) -> float:
    """Return a guidance scale; raises `UserError` for what is none, or teaches nothing."""
    try:
        scale = Guidance(scale=float(text)).scale
    except ValueError:
        raise UserError(f"guidance {text!r} is not a number of at least 0") from None
    if scale == 1:
        raise UserError("guidance 1 is no guidance: give more, such as 2.5")
    return scale


def optimizer_section(answers: Answers, steps: int, rate: float, batch_size: int) -> Document:
    """Return how a model is trained that nobody has tuned yet."""
    return {
        "steps": steps, "batch_size": batch_size, "learning_rate": rate,
        "warmup_steps": max(steps // 40, 1), **answers.precision,
        "checkpoint_every": max(steps // 20, 1),
    }  # fmt: skip
