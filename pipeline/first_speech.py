"""First configurations of speech models: the sections of each family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.first_answers import AUDIO_CODEC_OF, DEMO, FIT, Answers, Document, optimizer_section
from pipeline.teacher_files import stacked_frames
from stages.errors import UserError
from stages.model_config import CodecLMConfig
from stages.saved_model import saved_model


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
        "rollouts_per_shard": 256 if answers.gpu else 64,
        "batch_size": 32 if answers.gpu else 16,
        **answers.precision,
    }


def _evaluate(answers: Answers) -> Document:
    return {"samples": 100, "judges": ["whisper", "distillmos"]}


def codec_lm_sections(answers: Answers) -> Document:
    """Return the sections of a run of the family codec_lm."""
    gpu = answers.gpu
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
            "optimizer": optimizer_section(
                answers, 100_000 if gpu else 2400, 2e-4 if gpu else 2e-3, 64 if gpu else 16
            ),
        }
    else:
        # Codes of another codec would mean nothing to it; its run has it beside it.
        codec = answers.audio_codec or str(Path(answers.teacher).parent / "dataset" / "audio_codec")
        document["prepare"]["audio_codec"] = {"kind": "load", "path": codec}
        document["teacher"] = {"checkpoint": answers.teacher}
        model = _like(Path(answers.teacher), model)
    quiet = {"dropout": 0.0, "code_noise": 0.0, "timestep_noise": 0.0}
    document["rollout"] = _rollout(answers, min(860, model["max_timesteps"]))
    document["students"] = {
        "student": {
            "model": model | quiet,
            "init": {"kind": "teacher"},
            "optimizer": optimizer_section(
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
    return {"family": "codec_lm", "max_timesteps": config.max_timesteps} | settings


def magpie_sections(answers: Answers) -> Document:
    """Return the sections of a run of the family magpie."""
    codec = answers.audio_codec or AUDIO_CODEC_OF["magpie"]
    known = {"speakers": list(answers.speakers)} if answers.speakers else {}
    context = {} if answers.speakers else {"context_s": 5.0, "context_repeat": True}
    teacher = {"family": "magpie", "path": answers.teacher, "audio_codec": codec} | known
    stacked = stacked_frames(Path(answers.teacher))
    rollout = _rollout(answers, 430 // stacked, {"min_timesteps": 4 // stacked})
    rollout["target"]["moments"] = True  # which the recipe's NRMSE reads
    return {
        "prepare": _speech_data(answers)
        | {"audio_codec": {"kind": "nemo", "path": codec}, **context}
        | {"lower_case": False, "trim": None, "level_dbfs": None},
        "teacher": {"pretrained": teacher},
        "rollout": rollout,
        "students": {
            "student": {
                "model": {"family": "magpie", "nemo": answers.teacher} | known,
                "init": {"kind": "teacher"},
                "loss": {"recipe": "nemo"},
                "optimizer": optimizer_section(answers, 20_000, 2e-5, 64 if answers.gpu else 8)
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


def orpheus_sections(answers: Answers) -> Document:
    """Have the teacher fine-tuned first: as published it knows no dropped conditions."""
    base = {"family": "causal_lm", "path": answers.teacher, **ORPHEUS}
    held = {"quantization": "int4"} if answers.gpu else {}
    codec = answers.audio_codec or AUDIO_CODEC_OF["orpheus"]
    optimizer = optimizer_section(answers, 3000, 2e-4, 16) | {"micro_batch_size": 2}
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
