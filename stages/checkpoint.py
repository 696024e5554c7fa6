"""Checkpoints of a training run: safetensors and a few integers, published atomically.

They are the same however many processes wrote them, and whatever these had shared out.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import UserError
from stages.publish import publish_folder
from store.errors import StoreError, SystemFailure
from store.schema import FORMAT_VERSION, FileSum, Record
from store.sealed import seal, unseal

TENSORS, STATE = "tensors.safetensors", "state.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training run continues from."""

    step: int
    """Optimizer steps done; keys the random state of the next."""
    position: int
    """Sequences consumed, in the run's infinite order: all that a loader needs."""
    identity: str
    """Hash of everything that the weights depend on besides the step, the seed among it."""
    store: str
    """Hash of the manifest of the store that it learns from; empty where it is a dataset."""
    tensors: Mapping[str, Tensor]
    """Weights, moments and averages by name."""


class _State(Record):
    """What state.json holds."""

    format_version: int = FORMAT_VERSION
    step: int
    position: int
    identity: str
    store: str
    tensors: FileSum
    """Of the file beside it."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Publish a checkpoint below `folder` and drop all but the newest `keep`."""
    path = _path(folder, checkpoint.step)
    if not path.exists():
        with publish_folder(path) as draft:
            save_file(dict(checkpoint.tensors), draft / TENSORS)
            state = _State(
                step=checkpoint.step,
                position=checkpoint.position,
                identity=checkpoint.identity,
                store=checkpoint.store,
                tensors=_sum(draft / TENSORS),
            )
            (draft / STATE).write_bytes(seal(state))
    for old in published(folder)[:-keep]:
        shutil.rmtree(old)


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint below `folder`; None when there is none yet."""
    step = newest_whole(folder)
    return None if step is None else load_checkpoint(folder, step)


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of a step, which must be whole."""
    path = _path(folder, step)
    state, _ = unseal(path / STATE, _State)
    tensors = load_file(path / TENSORS)
    return Checkpoint(state.step, state.position, state.identity, state.store, tensors)


def newest_whole(folder: Path) -> int | None:
    """Return the step of the newest checkpoint below `folder` that is what was written.

    Those after it are put aside with a warning, and so are drafts that nobody finished. Returns
    None when there is no checkpoint; raises `UserError` when there are, but none is whole. One
    process does this for all.
    """
    for draft in folder.glob(".step_*"):
        shutil.rmtree(draft)
    damaged: dict[Path, str] = {}
    for path in reversed(published(folder)):
        reason = _damage(path)
        if reason is None:
            _put_aside(damaged)
            return _step(path)
        damaged[path] = reason
    if damaged:
        found = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise UserError(
            f"none of the checkpoints in {folder} is whole ({found}): restore one from a copy, or "
            "move the folder away to begin anew"
        )
    return None


def _put_aside(damaged: Mapping[Path, str]) -> None:
    for path, reason in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning(
            "the checkpoint %s is damaged (%s): it is now %s, and training goes on from the one "
            "before", path, reason, aside.name,
        )  # fmt: skip


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is."""
    try:
        state, _ = unseal(path / STATE, _State)
        if state.step != _step(path):
            return f"{STATE} is of step {state.step}"
        if _sum(path / TENSORS) != state.tensors:
            return f"{TENSORS} has other bytes than were written"
    except SystemFailure:
        raise
    except StoreError as error:
        return str(error)
    except FileNotFoundError:
        return f"{TENSORS} is missing"
    return None


def _sum(path: Path) -> FileSum:
    """Size and hash of a file, of which not all need be in memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return FileSum(bytes=file.tell(), xxh3=digest.hexdigest())
