"""A first configuration of a run, from five answers: a whole one that can be changed at will."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.commented_yaml import commented_yaml
from pipeline.config import KINDS, Run
from pipeline.needs import needs
from pipeline.run_config import NAME
from stages.errors import UserError
from stages.model_config import CodecLMConfig
from stages.saved_model import saved_model
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


def offered_teacher(family: str, data: str) -> str:
    """Return the answer about the teacher that goes with those before."""
    return FIT if family == "diffusion" and data == DEMO else TEACHER_OF[family]


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
    """Path of the audio codec of a magpie or orpheus; null takes a common name."""


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


def check_guidance(text: str) -> float:
    """Return a guidance scale; raises `UserError` for what is none, or teaches nothing."""
    try:
        scale = Guidance(scale=float(text)).scale
    except ValueError:
        raise UserError(f"guidance {text!r} is not a number of at least 0") from None
    if scale == 1:
        raise UserError("guidance 1 is no guidance: give more, such as 2.5")
    return scale


def first_config(path: Path, answers: Answers) -> tuple[str, Run]:
    """Return the text of a configuration that is to be written to `path`, and what it says.

    The run is named after the file. Raises `UserError` where that gives no name, or for answers
    that do not go together.
    """
    if not NAME.fullmatch(path.stem):
        raise UserError(
            f"{path} would name the run {path.stem!r}: use up to 64 letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit"
        )
    check_data(answers.data)
    check_teacher(answers.family, answers.data, answers.teacher)
    document: Document = {"name": path.stem, "seed": 0} | WRITTEN[answers.family](answers)
    if answers.family == "diffusion":
        document = {"kind": "diffusion"} | document
    if answers.machine == "slurm":
        document["cluster"] = {
            "gpus": 1, "cpus": 8, "memory": "64G", "time": "04:00:00", "tasks": 4,
        }  # fmt: skip
    config = KINDS[document.get("kind", "speech")].model_validate(document)
    return _head(path, answers) + commented_yaml(document, config), config


def _head(path: Path, answers: Answers) -> str:
    lines = (
        f"{answers.family}: {FAMILY_OF[answers.family]}.",
        f"Written by `foretell init` for {MACHINE_OF[answers.machine]}.",
        "Every setting that is not here has a default. To override one for once:",
        f"foretell run {path.name} --set rollout.batch_size=8",
    )
    return "".join(f"# {line}\n" for line in lines)


def missing_files(config: Run) -> list[str]:
    """Return what a configuration names and is not there, each with the key that names it."""
    named = [need for need in needs(config) if need.ability.startswith("file ")]
    paths = [(Path(need.ability.partition(" ")[2]), need.key) for need in named]
    return [f"{path} ({key})" for path, key in paths if not path.exists()]


def _gpu(answers: Answers) -> bool:
    return answers.machine != "cpu"


def _precision(answers: Answers) -> Document:
    return {"precision": "bf16"} if _gpu(answers) else {}


def _speech_data(answers: Answers) -> Document:
    if answers.data == DEMO:
        return {"voices": {"sentences": 1300, "processes": 2}}
    return {"source": answers.data, "dev_texts": 50, "test_texts": 100}


def _sampler(timesteps: int) -> Document:
    return {
        "temperature": 0.7, "top_k": 80, "min_timesteps": 4, "max_timesteps": timesteps,
        "reference_multiple": 1.5, "truncated_weight": 0.1,
    }  # fmt: skip


def _rollout(
    answers: Answers, timesteps: int, sampler: Mapping[str, Any] | None = None
) -> Document:
    return {
        "variations": 1,
        "guidance": {"scale": answers.guidance},
        "sampler": _sampler(timesteps) | dict(sampler or {}),
        "target": {"kind": "top_k", "k": 64},
        "rollouts_per_shard": 256 if _gpu(answers) else 64,
        "batch_size": 32 if _gpu(answers) else 16,
        **_precision(answers),
    }


def _optimizer(answers: Answers, steps: int, rate: float, batch_size: int) -> Document:
    return {
        "steps": steps, "batch_size": batch_size, "learning_rate": rate,
        "warmup_steps": max(steps // 40, 1), **_precision(answers),
        "checkpoint_every": max(steps // 20, 1),
    }  # fmt: skip


def _evaluate(answers: Answers) -> Document:
    return {"samples": 100, "judges": ["whisper", "distillmos"]}


def _codec_lm(answers: Answers) -> Document:
    gpu = _gpu(answers)
    small = {"d_model": 192, "heads": 4, "text_layers": 2, "decoder_layers": 4, "feed_forward": 768}
    large = {
        "d_model": 768, "heads": 12, "text_layers": 6, "decoder_layers": 12, "feed_forward": 3072,
    }  # fmt: skip
    model: Document = {"family": "codec_lm"} | (large if gpu else small) | {"max_timesteps": 2048}
    document: Document = {"prepare": _speech_data(answers)}
    if answers.teacher == FIT:
        noise = {"code_noise": 0.1, "timestep_noise": 0.25}
        document["teacher"] = {"model": model | noise}
        document["fit"] = {
            "condition_dropout": 0.1,
            "alignment_weight": 1.0,
            "optimizer": _optimizer(
                answers, 100_000 if gpu else 2400, 2e-4 if gpu else 2e-3, 64 if gpu else 16
            ),
        }
    else:
        document["teacher"] = {"checkpoint": answers.teacher}
        model = _like(Path(answers.teacher), model)
    quiet = {"dropout": 0.0, "code_noise": 0.0, "timestep_noise": 0.0}
    document["rollout"] = _rollout(answers, 860)
    document["students"] = {
        "student": {
            "model": model | quiet,
            "init": {"kind": "teacher"},
            "optimizer": _optimizer(
                answers, 30_000 if gpu else 900, 5e-5 if gpu else 5e-4, 64 if gpu else 16
            ),
        }
    }
    return document | {"evaluate": _evaluate(answers)}


def _like(teacher: Path, otherwise: Document) -> Document:
    """Return the architecture of a finished teacher, where it is there already."""
    try:
        config = saved_model(teacher).config
    except UserError:
        return otherwise
    if not isinstance(config, CodecLMConfig):
        raise UserError(f"teacher {teacher} holds a model of the family {config.family!r}")
    settings: Document = config.model_dump(mode="json", exclude_defaults=True)
    return {"family": "codec_lm"} | settings


def _magpie(answers: Answers) -> Document:
    codec = answers.audio_codec or AUDIO_CODEC_OF["magpie"]
    teacher = {"family": "magpie", "path": answers.teacher, "audio_codec": codec}
    rollout = _rollout(answers, 430)
    rollout["target"]["moments"] = True  # which the recipe's NRMSE reads
    return {
        "prepare": _speech_data(answers)
        | {"audio_codec": {"kind": "nemo", "path": codec}, "context_s": 5.0}
        | {"lower_case": False, "context_repeat": True, "trim": None, "level_dbfs": None},
        "teacher": {"pretrained": teacher},
        "rollout": rollout,
        "students": {
            "student": {
                "model": {"family": "magpie", "nemo": answers.teacher},
                "init": {"kind": "teacher"},
                "loss": {"recipe": "nemo"},
                "optimizer": _optimizer(answers, 20_000, 2e-5, 64 if _gpu(answers) else 8)
                | {"clip_norm": 2.5},
            }
        },
        "evaluate": _evaluate(answers),
    }


ORPHEUS: Document = {
    "layout": {
        "slots": [[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [2, 2], [2, 3]],
        "codes_per_slot": 4096,
        "audio_base_id": 128266,
        "end_id": 128258,
    },
    "special": {
        "begin_of_text": {"id": 128000, "token": "<|begin_of_text|>"},
        "end_of_text": {"id": 128009, "token": "<|eot_id|>"},
        "start_of_speech": {"id": 128257, "token": "<custom_token_1>"},
        "start_of_human": {"id": 128259, "token": "<custom_token_3>"},
        "end_of_human": {"id": 128260, "token": "<custom_token_4>"},
        "start_of_ai": {"id": 128261, "token": "<custom_token_5>"},
    },
    "prompt": "<start_of_human><begin_of_text>{speaker}: {text}<end_of_text><end_of_human>"
    "<start_of_ai><start_of_speech>",
}
"""Ids and prompt of Orpheus-3B as it is published; of its relatives they differ."""


def _orpheus(answers: Answers) -> Document:
    """Have the teacher fine-tuned first: as published it knows no dropped conditions."""
    base = {"family": "causal_lm", "path": answers.teacher, **ORPHEUS}
    held = {"quantization": "int4"} if _gpu(answers) else {}
    codec = answers.audio_codec or AUDIO_CODEC_OF["orpheus"]
    optimizer = _optimizer(answers, 3000, 2e-4, 16) | {"micro_batch_size": 2}
    student: Document = {
        "model": base | held | {"lora": {"rank": 32, "alpha": 64, "dropout": 0.05}},
        "init": {"kind": "teacher"},
        "loss": {"recipe": "guide", "alpha": 0.0, "temperature": 2.0},
        "optimizer": optimizer,
    }
    sampler = {"temperature": 0.6, "top_k": None, "top_p": 0.9, "min_timesteps": 6}
    rollout = _rollout(answers, 180, sampler)
    rollout["target"]["temperatures"] = [1.0, 2.0]
    return {
        "prepare": _speech_data(answers)
        | {"audio_codec": {"kind": "snac", "path": codec}, "lower_case": False}
        | {"max_duration_s": 14.0, "trim": None, "level_dbfs": None},
        "teacher": {"model": base | held | {"lora": {"rank": 64, "alpha": 128, "dropout": 0.05}}},
        "fit": {"condition_dropout": 0.1, "optimizer": optimizer},
        "rollout": rollout,
        "students": {"student": student},
        "evaluate": _evaluate(answers),
    }


def _diffusion(answers: Answers) -> Document:
    return _digits(answers) if answers.data == DEMO else _images(answers)


def _digits(answers: Answers) -> Document:
    network = {
        "network": "UNet2DModel",
        "settings": {
            "sample_size": 8, "in_channels": 1, "out_channels": 1,
            "block_out_channels": [16, 32], "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 8,
        },
        "schedule": {"prediction": "v_prediction"},
    }  # fmt: skip
    optimizer = {
        "steps": 3000, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 100,
        "weight_decay": 0.0, "betas": [0.9, 0.99], "ema_decay": 0.995, "checkpoint_every": 1000,
    }  # fmt: skip
    shorter = {"steps": 700, "learning_rate": 5e-4, "warmup_steps": 50, "ema_decay": 0.99}
    return {
        "prepare": {
            "digits": {}, "encoder": {"kind": "pixels", "channels": 1},
            "buckets": {"sizes": [[8, 8]]}, "image_variations": 2, "test_images": 540,
        },
        "teacher": {"model": network},
        "fit": {"condition_dropout": 0.1, "optimizer": optimizer},
        "rollout": {
            "guidance": {"scale": answers.guidance}, "rows": {"kind": "forward", "slots": 8},
            "rollouts_per_shard": 512, "batch_size": 256,
        },
        "students": {
            "student": {
                "model": network, "init": {"kind": "teacher"},
                "loss": {"guidance_scale": answers.guidance}, "optimizer": optimizer | shorter,
            }
        },
        "evaluate": {"split": "test", "samples": 1000, "steps": [25, 4], "judge": "digits",
                     "batch_size": 250},
    }  # fmt: skip


def _images(answers: Answers) -> Document:
    gpu = _gpu(answers)
    size = _native_size(Path(answers.teacher))
    held = {"base_precision": "bf16"} if gpu else {}
    return {
        "prepare": {
            "source": answers.data,
            "encoder": {"kind": "pipeline", "path": answers.teacher, **_precision(answers)},
            "buckets": {"sizes": [[size, size]]},
            "image_variations": 2, "crop": "random", "flip": 0.5,
            "dev_images": 8, "test_images": 32,
        },
        "teacher": {"pretrained": {"path": answers.teacher}},
        "rollout": {
            "guidance": {"scale": answers.guidance}, "rows": {"kind": "forward", "slots": 8},
            "rollouts_per_shard": 64, "batch_size": 4, **_precision(answers),
        },
        "students": {
            "student": {
                "model": {"pipeline": answers.teacher, "adapter": {"rank": 64, "alpha": 64},
                          "gradient_checkpointing": True, **held},
                "init": {"kind": "pipeline"},
                "loss": {"guidance_scale": answers.guidance, "weighting": "min_snr"},
                "optimizer": _optimizer(answers, 8000, 1e-4, 4) | {"micro_batch_size": 1},
            }
        },
        "evaluate": {"split": "test", "samples": 32, "steps": [30], "batch_size": 2},
    }  # fmt: skip


def _native_size(pipeline: Path) -> int:
    """Return the width of a pipeline's images in pixels, by its network's; 1024 where unknown."""
    for part in ("unet", "transformer"):
        try:
            latents = json.loads((pipeline / part / "config.json").read_bytes())["sample_size"]
            blocks = json.loads((pipeline / "vae" / "config.json").read_bytes())
            return int(latents) << len(blocks["block_out_channels"]) - 1
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 1024


WRITTEN: dict[str, Callable[[Answers], Document]] = {
    "codec_lm": _codec_lm,
    "magpie": _magpie,
    "orpheus": _orpheus,
    "diffusion": _diffusion,
}
assert set(WRITTEN) == set(get_args(FirstFamily))
