"""What learning from a store costs stage two: training steps and memory over plain cross entropy.

`ce` is an optimizer step with `cross_entropy` on the codes of the rollouts, which lie in memory.
Every other way is the same student's step on the same rollouts with the forward KL (for `sampled`
the soft cross entropy) on what a store holds, read by `StoreBatches`. The stores are real: a model
of the demo's shape with random weights scores the same recordings into each of them. Steps are
timed in turns in one process, of one thread for the model, and every turn takes the same batches;
peak memory is that of processes of their own, or of the allocator on CUDA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np
import torch
from guided_decoding import build
from measure import interleaved, own_peak, report
from torch.nn import functional

from stages.config import OptimizerConfig, RolloutConfig, TrainConfig
from stages.data import CodeBatch, StoreBatches
from stages.distributed import Place, choose_device, computes_bf16
from stages.family import Family
from stages.host_batches import TargetBatch
from stages.interruption import StopRequest
from stages.optimization import Batch, Objective, TrainingState
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.train import TargetLearner
from store import PredictionStore

KL: dict[str, float] = {"kl": 1.0}
WAYS: dict[str, tuple[dict[str, Any], str, dict[str, float]]] = {
    "top_k": ({"kind": "top_k", "k": 64}, "fast", KL),
    "top_k_compact": ({"kind": "top_k", "k": 64}, "compact", KL),
    "tail_samples": (
        {"kind": "top_k", "k": 64, "tail_samples": 8}, "fast", KL | {"tail_share": 0.1},
    ),
    "sampled": ({"kind": "sampled"}, "fast", {"kl": 0.0, "soft_ce": 1.0}),
    "hidden": ({"kind": "hidden"}, "fast", KL),
    "full": ({"kind": "full"}, "fast", KL),
}  # fmt: skip
"""Target, profile and loss by name; `top_k` gives the ratios without a name of their own."""
MEMORY_STEPS = 6


class Way(Protocol[Batch]):
    """What differs between the ways: which batches they read, and their loss."""

    def batches(self, position: int) -> Sequence[Batch]:
        """Return the micro-batches that begin at `position`."""

    def objective(self, step: int, batch: Batch) -> Objective:
        """Return the summed loss of a micro-batch."""


class CodeLearner:
    """Plain cross entropy on the codes of batches that lie in memory."""

    def __init__(self, family: Family, batches: Sequence[Sequence[CodeBatch]], size: int) -> None:
        self._family, self._batches, self._size = family, batches, size

    def batches(self, position: int) -> Sequence[CodeBatch]:
        """Return the micro-batches that begin at `position`."""
        return self._batches[position // self._size % len(self._batches)]

    def objective(self, step: int, batch: CodeBatch) -> Objective:
        """Return the summed cross entropy of a micro-batch."""
        logits = self._family.score(batch.samples, batch.codes, batch.lengths).logits
        labels = batch.codes.masked_fill(batch.element_weights == 0, -100)
        total = functional.cross_entropy(
            logits.flatten(0, 2), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return Objective(total, {"ce": total})


class Steps(Generic[Batch]):
    """Optimizer steps of one way, one call after another."""

    def __init__(self, way: Way[Batch], state: TrainingState, place: Place, bf16: bool) -> None:
        self._way, self._state, self._place, self._bf16 = way, state, place, bf16
        self._position = 0

    def __call__(self, count: int) -> None:
        """Take `count` steps and wait for the device."""
        for _ in range(count):
            batches = self._way.batches(self._position)
            weight = sum(batch.weight for batch in batches)
            for batch in batches:
                kind = self._place.device.type
                with torch.autocast(kind, torch.bfloat16, enabled=self._bf16):
                    objective = self._way.objective(0, batch)
                    torch.autograd.backward(objective.total / weight)
            self._state.update(1e-4)
            self._position += self._state.config.batch_size
        if self._place.device.type == "cuda":
            torch.cuda.synchronize()


def recordings(count: int, timesteps: int, codes: int) -> list[dict[str, Any]]:
    """Samples with texts and random codes of 60 to 140 % of `timesteps` frames."""
    random = np.random.default_rng(0)
    text = "please open the red door today"
    lengths = random.integers(int(0.6 * timesteps), int(1.4 * timesteps) + 1, count)
    return [
        {
            "sample_id": f"{number:04d}", "text": text, "speaker": "a",
            "codes": random.integers(0, codes, 8 * int(length)).tolist(),
        }
        for number, length in enumerate(lengths)
    ]  # fmt: skip


def write_store(path: Path, name: str, options: argparse.Namespace) -> None:
    """Score the recordings into a store of one way."""
    target, profile, _ = WAYS[name]
    family = build(options.layers)
    family.condition_dropout = 0.1  # its branches are as good as untrained ones can be
    config = RolloutConfig.model_validate(
        {
            "source": "dataset", "guidance": {"scale": 2.0}, "sampler": {"max_timesteps": 2048},
            "target": target, "profile": {"kind": profile},
            "rollouts_per_shard": options.batch_size, "batch_size": options.batch_size,
        }
    )  # fmt: skip
    samples = recordings(options.batch_size * options.batches, options.timesteps, 256)
    store = create_store(
        path,
        family,
        lay_out(config, family, samples, facts=family.facts, dataset_fingerprint="none", seed=0),
    )
    by_id = {sample["sample_id"]: sample for sample in samples}
    shards, stop = store.missing(), StopRequest()
    assert rollout(family, store, by_id, shards, batch_size=options.batch_size, stop=stop)


class Student:
    """The student, its optimizer, and the ways in which it can take steps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.place = Place(0, 1, choose_device(options.device))
        self._folder, self._options = folder, options
        self._family = build(options.layers)
        self._family.module.to(self.place.device).train()
        optimizer = OptimizerConfig(steps=1, batch_size=options.batch_size)
        self._state = TrainingState(self._family.module, optimizer, self.place, "", "")
        wanted = options.precision == "auto" and computes_bf16(self.place.device)
        self._bf16 = wanted or options.precision == "bf16"

    def steps(self, name: str) -> Callable[[int], None]:
        """Return the steps of a way of `WAYS`, or of `ce`."""
        if name == "ce":
            return self._steps(self._code_learner())
        return self._steps(self._target_learner(name))

    def _steps(self, way: Way[Batch]) -> Steps[Batch]:
        return Steps(way, self._state, self.place, self._bf16)

    def _config(self, loss: dict[str, float]) -> TrainConfig:
        return TrainConfig.model_validate(
            {"model": self._family.config, "loss": loss, "optimizer": self._state.config}
        )

    def _target_learner(self, name: str) -> TargetLearner:
        store = PredictionStore.open(self._folder / name)
        return TargetLearner(self._family, store, self._config(WAYS[name][2]), 0, self.place)

    def _code_learner(self) -> CodeLearner:
        store = PredictionStore.open(self._folder / self._options.ways[0])
        reader = StoreBatches(store, self._config(KL), 0, self.place)
        size = self._options.batch_size
        batches = [
            [without_target(reader.restored(batch)) for batch in reader.batches(size * number)]
            for number in range(self._options.batches)
        ]
        reader.close()
        return CodeLearner(self._family, batches, size)


def without_target(batch: TargetBatch) -> CodeBatch:
    """Keep what cross entropy needs, in memory of its own."""
    lengths = batch.lengths.clone()
    return CodeBatch(batch.samples, batch.epochs, batch.codes, lengths, batch.element_weights)


def peak_bytes(name: str, folder: Path, options: argparse.Namespace) -> int:
    """Most memory that training in one way takes; call it in a process of its own."""
    student = Student(folder, options)
    steps = student.steps(name)
    if student.place.device.type != "cuda":
        steps(MEMORY_STEPS)
        return own_peak()
    torch.cuda.reset_peak_memory_stats()
    steps(MEMORY_STEPS)
    return torch.cuda.max_memory_allocated()


def measured_apart(name: str, folder: Path) -> int:
    """Run this script again as a process that measures the memory of one way."""
    arguments = [*sys.argv[1:], "--memory-of", name, "--stores", str(folder)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def time_ways(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Time all ways in turns, print a table, and return the ratios."""
    student = Student(folder, options)
    ways: dict[str, Callable[[], None]] = {}
    for name in ("ce", *options.ways):
        ways[name] = partial(student.steps(name), options.batches)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    turns = interleaved(ways, "ce", options.repeats, clock)
    if not options.json:
        for name, turn in turns.items():
            millis = 1000 * turn.median_s / options.batches
            print(f"{name:<16}{millis:>10.1f} ms/step{turn.slowdown:>8.3f} × ce")
    return {name: turns[name].slowdown for name in options.ways}


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="in each store; a turn takes all")
    parser.add_argument("--timesteps", type=int, default=100, help="of a rollout, on average")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu counts what all threads of the process compute, whatever else the machine does",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the last line only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--stores", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_bytes(options.memory_of, options.stores, options))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in options.ways:
            write_store(folder / name, name, options)
        slowdowns = time_ways(folder, options)
        peaks = {name: measured_apart(name, folder) for name in ("ce", *options.ways)}
    if not options.json:
        for name, peak in peaks.items():
            print(f"{name:<16}{peak / 2**20:>10.1f} MiB{peak / peaks['ce']:>13.3f} × ce")
    ratios = {}
    for name in options.ways:
        end = "" if name == "top_k" else f"_{name}"
        ratios[f"step_over_ce{end}"] = slowdowns[name]
        ratios[f"memory_over_ce{end}"] = peaks[name] / peaks["ce"]
    report(__file__, ratios, packages=["torch"])


if __name__ == "__main__":
    main()
