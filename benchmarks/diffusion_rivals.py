"""What others keep of the rows that a store of a diffusion model holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusion_shapes import SLOTS, Images, UnitNoise, learning, taught
from torch import Tensor

from store import PredictionStore


@dataclass(frozen=True)
class Row:
    """What the others keep."""

    trajectory: int
    x_t: Tensor
    guided: Tensor
    t: float
    caption: Tensor


def recorded_rows(dataset: Images, store: PredictionStore) -> Iterator[Row]:
    """Rows of a store as its student sees them."""
    denoiser = UnitNoise(dataset.facts)
    config = learning(denoiser, SLOTS)
    for number, rows in enumerate(taught(denoiser, store, config, len(dataset.rows))):
        for place in range(len(rows.target)):
            yield Row(
                trajectory=number,
                x_t=rows.question.x[place],
                guided=rows.target[place],
                t=float(rows.question.t[place]),
                caption=rows.question.conditions["prompt_embeds"][place],
            )


def on_disk(folder: Path) -> int:
    """Bytes that the file system gave to all files of a folder, holes left out."""
    files = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(min(each.st_size, 512 * each.st_blocks) for each in files)


def write_pt(folder: Path, rows: Sequence[Row]) -> None:
    """A pickle per row of the guided prediction in fp32, as OneTrainer's attempt: nothing else."""
    for number, row in enumerate(rows):
        torch.save(row.guided.clone(), folder / f"{number}.pt")


def write_agd(folder: Path, rows: Sequence[Row]) -> None:
    """AGD's: a raw fp16 file of states and guided predictions and a caption per trajectory."""
    for number in range(rows[-1].trajectory + 1):
        ours = [row for row in rows if row.trajectory == number]
        values = torch.stack([torch.stack([row.x_t, row.guided]) for row in ours])
        (folder / f"{number}.npy").write_bytes(values.half().numpy().tobytes())
        torch.save(ours[0].caption.clone(), folder / f"{number}_conditioning.pt")


def write_lmdb(folder: Path, rows: Sequence[Row]) -> None:
    """DMD2's: a record per row of state, guided prediction and caption in fp16."""
    import lmdb

    size = sum(4 * (row.x_t.numel() + row.caption.numel()) for row in rows) + (1 << 26)
    with lmdb.open(str(folder), map_size=2 * size) as env, env.begin(write=True) as transaction:
        for number, row in enumerate(rows):
            for name in ("x_t", "guided", "caption"):
                content = getattr(row, name).half().numpy().tobytes()
                transaction.put(f"{name}_{number}".encode(), content)
