"""What a guided language model's slots are worth: decoding, learning and storing, against rivals.

`rollout`: foretell's guided decoding against transformers' own `generate(guidance_scale=…)`, which
must give the same codes; greedy, in fp32. `train`: a student's optimizer step on stored targets
against cross entropy, and against the guide's step with teacher and student in memory, which
computes all ids (`lm_rivals`). `bytes`: what the targets of a second of audio take on disk. All are
of one thread for the model, timed in turns; peak memory is that of processes of their own.
Ratios without a shape in their name are of `mid`, and those of a step of a student that trains
adapters, as the guide's does; `whole` is one that trains all weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lm_rivals import HARD_SHARE, TEMPERATURE, Labelled, LabelledBatch, TwoModels, generate
from lm_shapes import CFG_SCALE, FRAME_RATE_HZ, Bench
from loss_overhead import CodeLearner, Steps, Way, without_target
from measure import Clock, interleaved, own_peak, report

from stages.config import OptimizerConfig, TrainConfig
from stages.data import StoreBatches
from stages.distributed import Place, computes_bf16
from stages.families.causal_lm_checkpoint import WEIGHTS_FILE, quiet
from stages.families.causal_lm_prompts import PromptReader, load_tokenizer
from stages.families.hugging_face import PeftLoraConfig, inject_adapter_in_model
from stages.optimization import Batch, TrainingState
from stages.sampling import RolloutPolicy
from stages.train import TargetLearner
from store import PredictionStore
from store.schema import Sampler

TIE = 1e-3
"""Logits that differ by less may change places by rounding."""
TOP_K = {"kind": "top_k", "k": 64, "temperatures": [1.0, TEMPERATURE]}
FULL_TOP_K = {"kind": "top_k", "k": 128, "temperatures": [1.0, TEMPERATURE]}
LOSS = {"kl": 1 - HARD_SHARE, "ce": HARD_SHARE, "temperature": TEMPERATURE}
"""The guide's loss, on what the store holds."""
MEASURED = ("ce", "stored", "two_models")
"""Ways whose memory is measured."""
ADAPTERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = ("rollout", "train", "bytes")
STUDENTS = ("whole", "lora")
MEMORY_STEPS = 2
BYTES_ROLLOUTS = 4
"""Of 127 frames and an end each they fill chunks to the last."""


class Rollouts:
    """The same greedy codes, decoded by foretell and by transformers."""

    def __init__(self, bench: Bench, count: int, frames: int) -> None:
        self._family = bench.family()
        self._family.module.eval()
        self._samples, self._frames = bench.samples(count, frames), frames
        reader = PromptReader(
            self._family.config, load_tokenizer(self._family.config.path), bench.folder
        )
        self._prompts = [reader.conditional(sample) for sample in self._samples]
        self._negative = [reader.unconditional(sample) for sample in self._samples]
        self.longest = [frames] * count
        """Frames of each row where all have the most."""
        self.ends = [self._family.timesteps(sample) - 1 for sample in self._samples]
        """The same where rows end at different times: 60 to 100 % of the most."""
        self.found: dict[str, Any] = {}
        """Codes by the way in which they were decoded last."""

    @torch.inference_mode()
    def ours(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, F, S] of rows of so many frames, and by how much each was the likeliest."""
        family = self._family
        policy = RolloutPolicy(
            Sampler(top_k=1, reference_multiple=1.0, max_timesteps=self._frames),
            [(sample["sample_id"], 0) for sample in self._samples],
            seed=0, streams=family.streams, forbidden=family.forbidden, end_id=family.end_id,
            reference_timesteps=lengths,
        )  # fmt: skip
        codes = torch.zeros(len(lengths), self._frames, family.layout.slots, dtype=torch.int64)
        margins = torch.zeros(codes.shape)
        for step in family.rollout(self._samples, policy, CFG_SCALE):
            best = step.logits.topk(2).values
            codes[step.rows, step.timestep] = step.codes
            margins[step.rows, step.timestep] = best[..., 0] - best[..., 1]
        return codes, margins

    def find(self, name: str) -> None:
        """Decode in one way and keep what was found."""
        lengths = {"ended": self.ends, "fixed": self.longest}
        found = self.transformers() if name == "transformers" else self.ours(lengths[name])
        self.found[name] = found

    def transformers(self) -> torch.Tensor:
        """Codes [B, F, S] of transformers, whose rows stay until the longest has ended."""
        layout, model = self._family.layout, self._family.module.model
        tokens = self._frames * layout.slots
        ids = generate(model, self._prompts, self._negative, CFG_SCALE, tokens)
        return layout.from_vocabulary(ids).view(len(ids), self._frames, layout.slots)

    def ties(self) -> int:
        """Rows that part where two ids are as good as equally likely; any other is an error."""
        theirs, ties = self.found["transformers"].flatten(1), 0
        for name, lengths in (("fixed", self.longest), ("ended", self.ends)):
            codes, margins = (part.flatten(1) for part in self.found[name])
            for row, length in enumerate(lengths):
                differs = (codes[row] != theirs[row])[: length * self._family.layout.slots]
                if differs.any():
                    assert margins[row, int(differs.nonzero()[0])] < TIE, f"row {row} differs"
                    ties += 1
        return ties


def time_rollouts(bench: Bench, frames: int, options: argparse.Namespace) -> dict[str, float]:
    """Time both ways of decoding in turns, print a table, and return the ratios."""
    rollouts = Rollouts(bench, options.rollouts, frames)
    ways = {name: partial(rollouts.find, name) for name in ("transformers", "ended", "fixed")}
    turns = interleaved(ways, "transformers", options.repeats, clock(options))
    ties = rollouts.ties()
    slots = len(bench.shape.layout["slots"])
    codes = {"ended": sum(rollouts.ends) * slots, "fixed": sum(rollouts.longest) * slots}
    theirs = turns["transformers"].median_s
    if not options.json:
        print(f"\n{bench.name}: {options.rollouts} rollouts of {frames} frames, {ties} ties")
        print(f"{'':<12}{'transformers':>14}{'foretell':>10}  codes/s")
        for name, count in codes.items():
            ours = count / turns[name].median_s
            print(f"{name:<12}{count / theirs:>14.1f}{ours:>10.1f}{turns[name].speedup:>8.2f} ×")
    return {
        "rollout_vs_transformers": turns["ended"].speedup,
        "rollout_vs_transformers_fixed": turns["fixed"].speedup,
    }


class Student:
    """A student, its optimizer, and the ways in which it can take steps."""

    def __init__(self, bench: Bench, store: Path, options: argparse.Namespace, lora: bool) -> None:
        self._bench, self._store, self._options = bench, store, options
        self._family = bench.family()
        self._place = Place(0, 1, torch.device("cpu"))
        self._bf16 = options.precision == "bf16" or (
            options.precision == "auto" and computes_bf16(self._place.device)
        )
        if lora:
            adapters = PeftLoraConfig(r=16, lora_alpha=32, target_modules=list(ADAPTERS))
            inject_adapter_in_model(adapters, self._family.module.model)
        self._family.module.train()
        optimizer = OptimizerConfig(steps=1, batch_size=options.batch_size)
        self._state = TrainingState(self._family.module, optimizer, self._place, "", "")

    def steps(self, name: str) -> Callable[[int], None]:
        """Return the steps of a way: `ce`, `stored`, `two_models` or `two_guided`."""
        match name:
            case "ce":
                return self._steps(self._code_learner())
            case "stored":
                store = PredictionStore.open(self._store)
                learner = TargetLearner(self._family, store, self._config, 0, self._place)
                return self._steps(learner)
        scale = CFG_SCALE if name == "two_guided" else None
        model = self._family.module.model
        return self._steps(TwoModels(model, self._teacher, self._labelled(), scale))

    def _steps(self, way: Way[Batch]) -> Steps[Batch]:
        return Steps(way, self._state, self._place, self._bf16)

    @cached_property
    def _teacher(self) -> Any:
        """The rival's second model, of the student's size."""
        return self._bench.family().module.model.eval().requires_grad_(False)

    @property
    def _config(self) -> TrainConfig:
        return TrainConfig.model_validate(
            {"model": self._family.config, "loss": LOSS, "optimizer": self._state.config}
        )

    def _code_learner(self) -> CodeLearner:
        store = PredictionStore.open(self._store)
        reader = StoreBatches(store, self._config, 0, self._place)
        batch = [without_target(reader.restored(part)) for part in reader.batches(0)]
        reader.close()
        return CodeLearner(self._family, [batch], self._options.batch_size)

    def _labelled(self) -> LabelledBatch:
        family, layout = self._family, self._family.layout
        samples = self._bench.samples(self._options.batch_size, self._options.train_frames)
        reader = PromptReader(family.config, load_tokenizer(family.config.path), self._bench.folder)
        streams = [layout.from_timesteps(family.reference_codes(sample)) for sample in samples]
        audio = [layout.to_vocabulary(stream) for stream in streams]
        return LabelledBatch(
            Labelled.of([reader.conditional(sample) for sample in samples], audio),
            Labelled.of([reader.unconditional(sample) for sample in samples], audio),
        )


def time_steps(bench: Bench, options: argparse.Namespace, lora: bool) -> dict[str, float]:
    """Time all steps in turns, print a table, and return the ratios without memory's."""
    student = Student(bench, bench.folder / "train", options, lora)
    names = ("ce", "stored", "two_models", "two_guided")
    ways = {name: partial(student.steps(name), 1) for name in names}
    learned = {name: ways[name] for name in ("ce", "stored")}
    over_ce = interleaved(learned, "ce", 2 * options.repeats, clock(options))
    rivals = {name: ways[name] for name in ("stored", "two_models", "two_guided")}
    over_stored = interleaved(rivals, "stored", options.repeats, clock(options))
    turns = over_stored | over_ce
    if not options.json:
        print(f"\n{bench.name}: steps of a student, {'LoRA' if lora else 'all weights'}")
        for name in names:
            over = turns[name].median_s / turns["stored"].median_s
            print(f"{name:<12}{turns[name].median_s:>8.2f} s{over:>8.2f} × stored")
    return {
        "step_over_ce": over_ce["stored"].slowdown,
        "step_vs_two_models": over_stored["two_models"].slowdown,
        "step_vs_two_guided_models": over_stored["two_guided"].slowdown,
    }


def measure_memory(bench: Bench, options: argparse.Namespace, lora: bool) -> dict[str, float]:
    """Measure peak memory of processes of their own, print it, and return the ratios."""
    peaks, teacher = {}, (bench.folder / "base" / WEIGHTS_FILE).stat().st_size
    for name in MEASURED:
        student = ["--students", "lora" if lora else "whole"]
        more = ["--memory-of", name, "--folder", str(bench.folder.parent), *student]
        command = [sys.executable, __file__, *sys.argv[1:], *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout)
    if not options.json:
        shown = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
        print(f"peak memory: {shown}; the second model's weights {teacher / 2**20:.0f} MiB")
    return {
        "memory_over_ce": peaks["stored"] / peaks["ce"],
        "memory_vs_two_models": peaks["two_models"] / peaks["stored"],
    }


def print_peak(name: str, options: argparse.Namespace) -> None:
    """Take steps of one way, and print the peak memory of this process."""
    bench = Bench("mid", options.folder)
    lora = options.students == ["lora"]
    Student(bench, bench.folder / "train", options, lora).steps(name)(MEMORY_STEPS)
    print(own_peak())


def measure_bytes(bench: Bench, options: argparse.Namespace) -> dict[str, float]:
    """Store the same rollouts in every way, print kB per second of audio, and return the ratios."""
    samples = bench.samples(BYTES_ROLLOUTS, options.bytes_frames, least=1.0)
    targets = {"slots": TOP_K, "full": FULL_TOP_K}
    sizes = {
        (vocabulary, profile): kilobytes_per_s(
            bench.store(f"{vocabulary}_{profile}", samples, target, profile, vocabulary=vocabulary)
        )
        for vocabulary, target in targets.items()
        for profile in ("fast", "compact")
    }
    shape = bench.shape
    dense = {"slots": shape.codes_per_slot + 1, "full": shape.vocabulary}
    if not options.json:
        print(f"\n{'kB per second of audio':<32}{'fast':>10}{'compact':>10}{'all, fp16':>12}")
        for vocabulary, target in targets.items():
            of_profile = [sizes[vocabulary, profile] for profile in ("fast", "compact")]
            label = f"{vocabulary} ({dense[vocabulary]:,} ids), k = {target['k']}"
            every = len(shape.layout["slots"]) * FRAME_RATE_HZ * dense[vocabulary] * 2 / 1000
            print(f"{label:<32}{of_profile[0]:>10.1f}{of_profile[1]:>10.1f}{every:>12,.0f}")
    ratios = {
        f"slot_bytes_over_full_bytes_{profile}": sizes["slots", profile] / sizes["full", profile]
        for profile in ("fast", "compact")
    }
    return {
        "slot_bytes_over_full_bytes": ratios.pop("slot_bytes_over_full_bytes_fast"), **ratios,
        "slot_kilobytes_per_s": sizes["slots", "fast"],
        "slot_kilobytes_per_s_compact": sizes["slots", "compact"],
    }  # fmt: skip


def kilobytes_per_s(path: Path) -> float:
    """Bytes on disk of targets and codes, in kB per second of audio."""
    store = PredictionStore.open(path)
    size = sum(file.stat().st_size for file in (path / "shards").rglob("*") if file.is_file())
    timesteps = sum(len(store[key].codes) for key in store)
    timestep_s = store.manifest.timestep_s
    assert timestep_s is not None  # its streams are audio
    return size / (timesteps * timestep_s) / 1000


def clock(options: argparse.Namespace) -> Clock:
    """What seconds are counted by."""
    return time.process_time if options.clock == "cpu" else time.perf_counter


def measure_all(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Measure the parts that are asked for."""
    ratios: dict[str, float] = {}
    tiny, mid = Bench("tiny", folder), Bench("mid", folder)
    if "rollout" in options.parts:
        ratios |= time_rollouts(mid, options.frames, options)
        # Of this shape the head over all ids is nearly everything.
        found = time_rollouts(tiny, options.tiny_frames, options)
        ratios |= {f"{name}_tiny": ratio for name, ratio in found.items()}
    if "train" in options.parts:
        mid.store("train", mid.samples(options.batch_size, options.train_frames), TOP_K, "fast")
        for student in options.students:
            lora = student == "lora"
            found = time_steps(mid, options, lora) | measure_memory(mid, options, lora)
            ratios |= {name if lora else f"{name}_whole": ratio for name, ratio in found.items()}
    if "bytes" in options.parts:
        ratios |= measure_bytes(tiny, options)
    return ratios


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=8, help="decoded together")
    parser.add_argument("--frames", type=int, default=30, help="of the longest rollout")
    parser.add_argument("--tiny-frames", type=int, default=6, help="the same of the shape tiny")
    parser.add_argument("--batch-size", type=int, default=4, help="of a training step")
    parser.add_argument("--train-frames", type=int, default=36, help="of its longest rollout")
    parser.add_argument("--bytes-frames", type=int, default=127, help="and an end each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"], default="fp32")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu counts what all threads of the process compute, whatever else the machine does",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the last line only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        if options.memory_of:
            print_peak(options.memory_of, options)
            return
        with tempfile.TemporaryDirectory() as temporary:
            ratios = measure_all(options, Path(temporary))
    report(__file__, ratios, packages=["torch", "transformers", "peft"])


if __name__ == "__main__":
    main()
