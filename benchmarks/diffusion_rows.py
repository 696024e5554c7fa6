"""What stored rows of a diffusion model cost and give: exactness, recording, learning and bytes.

`guided`: error of the guided value at scale 7.5 that stage two makes of stored parts. `record`:
stage one into a store over the bare denoiser on as many rows. `train`: an optimizer step on stored
rows over one of plain diffusion training by the same student, and against one with the teacher's
two passes in the loop. `bytes`: of a row on disk, captions and latents included, beside what others
keep of the same row. The denoiser is a small U-Net of SDXL's form, on latents of 4×64×64 with
captions of 77×768 (`--widths`; 1.6 M parameters, half a second of one core for a training step of
4 rows); predictions whose bits count are unit noise that differs by 0.2 from the unconditional one.
The model computes in one thread; threads that read and write have another core where the machine
has one, so beside the wall clock the CPU time of the model's own thread is compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_rivals import on_disk, recorded_rows, write_agd, write_lmdb, write_pt
from diffusion_shapes import (
    CHANNELS,
    DELTA,
    FEATURES,
    PLACE,
    ROLLOUTS_PER_SHARD,
    SCALE,
    SCHEDULE,
    SLOTS,
    TOKENS,
    Images,
    UnitNoise,
    fill,
    images,
    learning,
    planned,
    taught,
    unet,
)
from measure import Clock, OwnTime, interleaved, report
from torch import Tensor, nn

from stages.diffusion.distil import RowLearner
from stages.diffusion.facts import Recording
from stages.diffusion.parts import Asked, ask
from stages.diffusion.schedule import Schedule
from stages.guidance import guide
from stages.optimization import TrainingState
from store import PredictionStore
from store.convert import convert
from store.schema import Compact

PARTS = ("guided", "record", "train", "bytes")
# ---- exactness


def guided_error(folder: Path, count: int, side: int) -> float:
    """Relative root mean square error of the targets of stage two, at scale 7.5.

    The rows go through both stages and the disk; truth is mixed in float64 of what was predicted.
    """
    dataset = images(folder / "noise_dataset", count, side)
    denoiser = UnitNoise(dataset.facts)
    store = planned(folder / "noise_store", denoiser, dataset, 8)
    fill(denoiser, dataset, store, 8)
    store = PredictionStore.open(folder / "noise_store")
    squares = total = 0.0
    for rows in taught(denoiser, store, learning(denoiser, SLOTS), count):
        cond = rows.question.x.double()
        truth = cond - DELTA * cond.flip(-1) + SCALE * DELTA * cond.flip(-1)
        squares += float(((rows.target.double() - truth) ** 2).sum())
        total += float((truth**2).sum())
    return float(np.sqrt(squares / total))


def other_errors(count: int, side: int) -> dict[str, float]:
    """The same error of other ways to round: both branches, the mixture, or parts in bfloat16."""
    random = torch.Generator().manual_seed(0)
    cond, other = torch.randn(2, count, CHANNELS, side, side, generator=random)
    delta = DELTA * other
    uncond = cond - delta
    truth = cond.double() + (SCALE - 1) * delta.double()

    def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).float()

    half, short = torch.float16, torch.bfloat16
    mixed = {
        "branches": guide(rounded(cond, half), rounded(uncond, half), SCALE),
        "mixture": rounded(truth, half),
        "bfloat16_parts": rounded(cond, short) + (SCALE - 1) * rounded(delta, short),
    }
    size = truth.square().mean().sqrt()
    return {
        f"guided_value_rms_error_{name}": float((values - truth).square().mean().sqrt() / size)
        for name, values in mixed.items()
    }


# ---- recording


@torch.inference_mode()
def bare(denoiser: Any, asked: Asked, batches: int) -> None:
    """Predict as many batches with and without captions, and keep nothing."""
    for _ in range(batches):
        ask(denoiser, asked, "unconditional")


def asked_rows(dataset: Images, batch_size: int) -> Asked:
    """A batch that is on the device already."""
    shape = dataset.facts.buckets[0]
    captions = torch.randn(batch_size, TOKENS, FEATURES).half()
    return Asked(
        x=torch.randn(batch_size, *shape),
        t=torch.full((batch_size,), 500.0, dtype=torch.float64),
        conditions={"prompt_embeds": captions},
        unconditional={"prompt_embeds": torch.zeros_like(captions)},
        scale=torch.full((batch_size,), SCALE),
    )


def compare_recording(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Time stage one against the bare denoiser, on the same number of rows."""
    dataset = images(folder / "dataset", options.samples, options.side)
    denoiser = unet(dataset.facts, options.widths, 0)
    denoiser.module.eval()
    stores = iter(
        [
            planned(folder / f"store{number}", denoiser, dataset, options.batch_size)
            for number in range(options.repeats + 1)
        ]
    )
    size = options.batch_size
    batches = -(-options.samples * SLOTS // size)
    ways = {
        "denoiser": OwnTime(partial(bare, denoiser, asked_rows(dataset, size), batches)),
        "record": OwnTime(lambda: fill(denoiser, dataset, next(stores), size)),
    }
    turns = interleaved(ways, "denoiser", options.repeats, clock(options))
    if not options.json:
        for name, turn in turns.items():
            print(
                f"{name:<12}{turn.median_s:>9.2f} s{turn.slowdown:>8.3f} × the bare denoiser"
                f"{ways[name].median_s / ways['denoiser'].median_s:>8.3f} × in its own thread"
            )
    return {
        "capture_over_denoiser": turns["record"].slowdown,
        "own_thread_over_denoiser": ways["record"].median_s / ways["denoiser"].median_s,
    }


# ---- learning


class Student:
    """A student at work in three ways; all take the same optimizer step on as many rows."""

    def __init__(
        self, dataset: Images, store: PredictionStore, options: argparse.Namespace
    ) -> None:
        self._dataset, self._options = dataset, options
        self._denoiser = unet(dataset.facts, options.widths, 1)
        self._denoiser.module.train()
        config = learning(self._denoiser, options.batch_size)
        self._state = TrainingState(self._denoiser.module, config.optimizer, PLACE, "", "")
        recording = Recording.of(store.manifest)
        self.learner = RowLearner(self._denoiser, store, recording, config, 0, PLACE)
        self._schedule = Schedule(self._denoiser.schedule)
        self._batch = asked_rows(dataset, options.batch_size)

    @cached_property
    def _teacher(self) -> Any:
        teacher = unet(self._dataset.facts, self._options.widths, 0)
        teacher.module.eval().requires_grad_(False)
        return teacher

    def stored(self) -> None:
        """Learn from stored rows: read, rebuilt, mixed at the scale, and weighed."""
        batches = self.learner.batches(self._state.position)
        weight = sum(batch.weight for batch in batches)
        for batch in batches:
            torch.autograd.backward(self.learner.objective(0, batch).total / weight)
        self._state.update(1e-4)

    def plain(self) -> None:
        """Learn the noise that was added to latents at hand."""
        noise, x_t, t = self._noised()
        prediction = self._denoiser.predict(x_t, t, self._batch.conditions)
        torch.autograd.backward(nn.functional.mse_loss(prediction, noise))
        self._state.update(1e-4)

    def two_models(self) -> None:
        """Learn what a teacher in memory predicts with and without captions."""
        _, x_t, t = self._noised()
        with torch.no_grad():
            asked = Asked(
                x_t, t, self._batch.conditions, self._batch.unconditional, self._batch.scale
            )
            cond, uncond = ask(self._teacher, asked, "unconditional")
            assert uncond is not None
            target = guide(cond, uncond, SCALE)
        prediction = self._denoiser.predict(x_t, t, self._batch.conditions)
        torch.autograd.backward(nn.functional.mse_loss(prediction, target))
        self._state.update(1e-4)

    def _noised(self) -> tuple[Tensor, Tensor, Tensor]:
        latents = self._batch.x
        t = torch.randint(0, SCHEDULE.train_timesteps, (len(latents),)).double()
        alpha, sigma = (
            torch.from_numpy(values).float().reshape(-1, 1, 1, 1)
            for values in self._schedule.at(t.numpy())
        )
        noise = torch.randn_like(latents)
        return noise, alpha * latents + sigma * noise, t


def compare_steps(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Time optimizer steps of the three ways in turns."""
    dataset = images(folder / "train_dataset", options.samples, options.side)
    denoiser = UnitNoise(dataset.facts)
    store = planned(folder / "train_store", denoiser, dataset, 8)
    fill(denoiser, dataset, store, 8)
    student = Student(dataset, PredictionStore.open(folder / "train_store"), options)
    ways = {
        name: OwnTime(partial(several, getattr(student, name), options.steps))
        for name in ("plain", "stored", "two_models")
    }
    turns = interleaved(ways, "plain", options.repeats, clock(options))
    student.learner.close()
    own = {name: way.median_s / ways["plain"].median_s for name, way in ways.items()}
    if not options.json:
        for name, turn in turns.items():
            print(
                f"{name:<12}{turn.median_s / options.steps:>9.3f} s a step{turn.slowdown:>8.3f} × "
                f"plain training{own[name]:>8.3f} × in its own thread"
            )
    return {
        "step_over_plain": turns["stored"].slowdown,
        "own_thread_step_over_plain": own["stored"],
        "step_vs_two_models": turns["two_models"].slowdown / turns["stored"].slowdown,
        "own_thread_step_vs_two_models": own["two_models"] / own["stored"],
    }


def several(step: Callable[[], None], count: int) -> None:
    """Take as many steps."""
    for _ in range(count):
        step()


# ---- bytes


def bytes_per_row(folder: Path, count: int, side: int, peers: str) -> dict[str, float]:
    """Bytes on disk per row of a store, and of what others keep of the same rows."""
    dataset = images(folder / "bytes_dataset", count, side)
    denoiser = UnitNoise(dataset.facts)
    store = planned(folder / "bytes_store", denoiser, dataset, 8)
    fill(denoiser, dataset, store, 8)
    rows = count * SLOTS
    found = {
        "bytes_per_row": on_disk(folder / "bytes_store") / rows,
        "bytes_per_row_parts": on_disk(folder / "bytes_store" / "shards") / rows,
    }
    convert(folder / "bytes_store", folder / "compact_store", Compact())
    found["bytes_per_row_parts_compact"] = on_disk(folder / "compact_store" / "shards") / rows
    engines = {"pt": write_pt, "agd": write_agd, "lmdb": write_lmdb}
    if peers == "none" or (peers == "installed" and find_spec("lmdb") is None):
        del engines["lmdb"]
    recorded = list(recorded_rows(dataset, PredictionStore.open(folder / "bytes_store")))
    for name, write in engines.items():
        target = folder / name
        target.mkdir()
        write(target, recorded)
        found[f"bytes_per_row_{name}"] = on_disk(target) / rows
    return found


def require_peers(which: str) -> None:
    """Exit with code 2 where the peers are wanted but one is missing."""
    if which == "all" and find_spec("lmdb") is None:
        print(
            "not installed: lmdb. Install it with `pip install lmdb`, or choose --peers installed",
            file=sys.stderr,
        )
        sys.exit(2)


def clock(options: argparse.Namespace) -> Clock:
    """What seconds are counted by."""
    return time.process_time if options.clock == "cpu" else time.perf_counter


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--side", type=int, default=64, help="of a latent")
    parser.add_argument(
        "--samples", type=int, default=ROLLOUTS_PER_SHARD, help=f"of {SLOTS} rows each"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bytes-samples", type=int, default=64)
    parser.add_argument("--peers", choices=["all", "installed", "none"], default="all")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu counts what all threads of the process compute, whatever else the machine does",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    require_peers(options.peers if "bytes" in options.parts else "none")
    torch.set_num_threads(1)

    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "guided" in options.parts:
            error = guided_error(folder, options.samples, options.side)
            ratios["guided_value_rms_error"] = error
            ratios |= other_errors(options.samples, options.side)
        if "record" in options.parts:
            ratios |= compare_recording(folder, options)
        if "train" in options.parts:
            ratios |= compare_steps(folder, options)
        if "bytes" in options.parts:
            ratios |= bytes_per_row(folder, options.bytes_samples, options.side, options.peers)
    if not options.json:
        for name, value in ratios.items():
            print(f"{name:<32}{value:>12.5g}")
    report(__file__, ratios, packages=["torch", "diffusers"])


if __name__ == "__main__":
    main()
