"""First configurations of image models: of digits, trained here, or of a pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path

from pipeline.first_answers import DEMO, Answers, Document, optimizer_section
from pipeline.teacher_files import pipeline_files

ASPECTS = (1.0, 9 / 7, 19 / 13, 7 / 4)
"""Width over height of the sizes that SDXL was trained at, and the other way round."""


def diffusion_sections(answers: Answers) -> Document:
    """Return the sections of a run of digits, or of the images and pipeline that were answered."""
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
    found = pipeline_files(Path(answers.teacher))
    held = {"base_precision": "bf16"} if answers.gpu else {}
    taught = _of_steps if is_told_guidance(answers) else _guided
    teacher, rollout, loss, steps = taught(answers)
    unconditional = {"unconditional": {"kind": "zeros"}} if found.zeros else {}
    return {
        "prepare": {
            "source": answers.data,
            "encoder": {"kind": "pipeline", "path": answers.teacher, **answers.precision},
            "buckets": {"sizes": _sizes(found.size, found.multiple)},
            "image_variations": 2, "crop": "random", "flip": 0.5, **unconditional,
            "dev_images": 8, "test_images": 32,
        },
        "teacher": {"pretrained": {"path": answers.teacher} | teacher},
        "rollout": {
            **rollout, "rollouts_per_shard": 64, "batch_size": 4, **answers.precision,
        },
        "students": {
            "student": {
                "model": {"pipeline": answers.teacher, "adapter": {"rank": 64, "alpha": 64},
                          "gradient_checkpointing": True, **held},
                "init": {"kind": "pipeline"},
                "loss": loss,
                "optimizer": optimizer_section(answers, 8000, 1e-4, 4) | {"micro_batch_size": 1},
            }
        },
        "evaluate": {"split": "test", "samples": 32, "steps": steps, "batch_size": 2},
    }  # fmt: skip


def is_told_guidance(answers: Answers) -> bool:
    """Return whether the teacher is an image model that takes its guidance as a number."""
    return answers.family == "diffusion" and pipeline_files(Path(answers.teacher)).told_guidance


def _guided(answers: Answers) -> tuple[Document, Document, Document, list[int]]:
    """What is recorded of a teacher that guidance takes two passes, and what a student learns."""
    rollout = {"guidance": {"scale": answers.guidance}, "rows": {"kind": "forward", "slots": 8}}
    loss = {"guidance_scale": answers.guidance, "weighting": "min_snr"}
    return {}, rollout, loss, [30]


def _of_steps(answers: Answers) -> tuple[Document, Document, Document, list[int]]:
    """The same of one that is told its guidance: its student saves steps, having no pass to save.

    It learns the straight line from the noise to the image that the teacher ends at (reflow).
    """
    rollout = {
        "guidance": {"scale": 1.0}, "rows": {"kind": "trajectory", "steps": 28, "keep": [0]},
        "target": {"kind": "dense", "branches": "guided"},
    }  # fmt: skip
    return {"embedded_guidance": answers.guidance}, rollout, {"teaches": "pairs"}, [4, 28]


def _sizes(size: int, multiple: int) -> list[list[int]]:
    """Return widths and heights of as many pixels as a square of `size`: for 1024 those of SDXL."""
    sizes = []
    for ratio in ASPECTS:
        wide, high = (
            round(size * root / multiple) * multiple for root in (ratio**0.5, ratio**-0.5)
        )
        sizes += [[wide, high], [high, wide]]
    return [list(pair) for pair in dict.fromkeys(map(tuple, sizes))]
