"""Checkpoints of a training run: safetensors and a few integers, published atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.publish import publish_folder

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training run continues from."""

    step: int
    """Optimizer steps done."""
    position: int
    """Sequences consumed, in the run's infinite order."""
    identity: str
    """Hash of everything that the weights depend on besides the step."""
    tensors: Mapping[str, Tensor]
    """Weights, moments and averages by name."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint below `folder` and drop all but the newest two."""
    name = f"step_{checkpoint.step:08d}"
    if not (folder / name).exists():
        with publish_folder(folder / name) as draft:
            save_file(dict(checkpoint.tensors), draft / "tensors.safetensors")
            state = {
                "step": checkpoint.step,
                "position": checkpoint.position,
                "identity": checkpoint.identity,
            }
            (draft / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in published(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint below `folder`; None when there is none yet."""
    folders = published(folder)
    if not folders:
        return None
    state = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(**state, tensors=load_file(folders[-1] / "tensors.safetensors"))


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))
