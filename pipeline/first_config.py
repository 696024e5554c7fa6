"""A first configuration of a run, from five answers: a whole one that can be changed at will."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from pipeline.commented_yaml import commented_yaml
from pipeline.config import KINDS, Run
from pipeline.first_answers import (
    FAMILY_OF,
    MACHINE_OF,
    Answers,
    Document,
    FirstFamily,
    check_data,
    check_teacher,
)
from pipeline.first_images import diffusion_sections, is_told_guidance
from pipeline.first_speech import codec_lm_sections, magpie_sections, orpheus_sections
from pipeline.needs import needs
from pipeline.run_config import NAME
from stages.errors import UserError

WRITTEN: dict[str, Callable[[Answers], Document]] = {
    "codec_lm": codec_lm_sections,
    "magpie": magpie_sections,
    "orpheus": orpheus_sections,
    "diffusion": diffusion_sections,
}
assert set(WRITTEN) == set(get_args(FirstFamily))

STEPS_ALONE = (
    "This teacher is told its guidance and takes one pass as it is: its student learns fewer steps."
)


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
        *([STEPS_ALONE] if is_told_guidance(answers) else []),
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
