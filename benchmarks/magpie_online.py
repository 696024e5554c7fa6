"""What distilling MagpieTTS offline is worth, against NeMo 3.0.0's own online distillation.

Both have the same teacher, batches and lengths of rollouts, in one thread of the same process and
in turns. `train_step`: NeMo regenerates the rollouts of every step and then trains on them; stage
two reads them from a store, with `recipe: nemo`. `rollout`: what one generated frame costs NeMo's
rollout with its cache, and stage one until the shard is durable. Memory is measured at the
published shape, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from magpie_shapes import CFG_SCALE, CONTEXT_FRAMES, Bench
from measure import own_peak, report
from omegaconf import OmegaConf

from stages.config import TrainConfig
from stages.distributed import Place
from stages.families.magpie import Magpie
from stages.families.magpie_tiny import model_config
from stages.families.nemo_archive import quiet
from stages.model_config import MagpieConfig
from stages.optimization import TrainingState
from stages.train import TargetLearner
from store import PredictionStore

with quiet():
    from nemo.collections.tts.models import magpietts_cfg_distillation as nemo


class Rivals(Bench):
    """NeMo's online distillation and ours, of one shape."""

    # NeMo

    def nemo_config(self, **more: Any) -> Any:
        """The model's configuration with the settings of NeMo's online distillation."""
        return OmegaConf.create(
            model_config(self.codec, **self.shape.model)
            | {
                "teacher_model_path": str(self.teacher),
                "rollout_topk": min(80, self.facts.codes_per_codebook),
                "distill_local_transformer": True,
                "lt_distillation_start_step": 0,
                "lt_distillation_ramp_len": 0,
                **more,
            }
        )

    @cached_property
    def online(self) -> Any:
        """NeMo's student with its teacher, which never ends a rollout by itself."""
        with quiet():
            student = nemo.OnlineCFGDistillation(self.nemo_config())
            student._load_teacher_model()
        teacher = student._teacher_model
        teacher.eval()
        end = torch.arange(teacher.final_proj.out_features) % teacher.num_all_tokens_per_codebook
        with torch.no_grad():
            teacher.final_proj.bias[end == teacher.audio_eos_id] = -1e4
        return student

    def nemo_batch(self, frames: int, count: int) -> dict[str, torch.Tensor]:
        """A batch whose rollouts NeMo truncates after exactly `frames` frames."""
        reference = round((frames - 1) / 1.25)
        if round(1.25 * reference) + 1 != frames:
            raise ValueError(f"no reference length truncates after {frames} frames")
        samples = self.samples(count)
        model = self.online
        texts = [model.tokenizer.encode(s["text"], "english_chars") for s in samples]
        rows = [torch.tensor([*text, model.eos_id]) for text in texts]
        contexts = [s["context_codes"].reshape(-1, self.codebooks).T for s in samples]
        return {
            "text": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "text_lens": torch.tensor([len(row) for row in rows]),
            "audio_codes": torch.zeros(count, self.codebooks, reference, dtype=torch.int64),
            "audio_codes_lens": torch.full((count,), reference),
            "context_audio_codes": torch.from_numpy(np.stack(contexts)).long(),
            "context_audio_codes_lens": torch.full((count,), CONTEXT_FRAMES),
        }

    def online_step(self, frames: int) -> Callable[[], None]:
        """One optimizer step of NeMo's online distillation."""
        student = self.online
        learned = [p for n, p in student.named_parameters() if not n.startswith("_")]
        optimizer = torch.optim.AdamW(learned, lr=2e-4)

        def step() -> None:
            with quiet():
                loss = student._process_batch_distillation(
                    self.nemo_batch(frames, self.shape.batch)
                )["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 2.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def online_rollout(self, frames: int) -> Callable[[], None]:
        """NeMo's rollout with its cache, the local transformer's included."""
        teacher = self.online._teacher_model

        def generate() -> None:
            with quiet():
                out = nemo._infer_batch_teacher(
                    model=teacher, batch=self.nemo_batch(6, self.rollouts(frames)), use_lt=True,
                    max_decoder_steps=frames, topk=min(80, self.facts.codes_per_codebook),
                    cfg_scale=CFG_SCALE, use_kv_cache=True,
                )  # fmt: skip
            assert out.codes.shape[-1] == frames

        return generate

    # Ours

    def warm_up(self) -> None:
        """Do everything once, shortly, so that no turn builds models or chooses kernels."""
        self.online_step(6)()
        self.online_rollout(6)()
        with self.offline_step(self.store("warm_up", 6)) as step:
            step()

    def offline_rollout(self, frames: int) -> Callable[[], None]:
        """Stage one until its shard is durable."""
        stores = count()

        def write() -> None:
            self.store(f"rollout_{frames}_{next(stores)}", frames)

        return write

    def student(self) -> Magpie:
        """The student of stage two, in training."""
        config = MagpieConfig(family="magpie", nemo=self.teacher)
        family = Magpie.build(config, self.facts.model_dump(mode="json"), seed=1)
        family.module.train()
        return family

    @contextmanager
    def offline_step(self, path: Path) -> Iterator[Callable[[], None]]:
        """One optimizer step of stage two, reading included."""
        store, student = PredictionStore.open(path), self.student()
        config = TrainConfig.model_validate(
            {
                "model": {"family": "magpie", "nemo": str(self.teacher)},
                "loss": {"recipe": "nemo", "local_start_step": 0, "local_ramp_steps": 0},
                "optimizer": {"steps": 1000, "batch_size": self.shape.batch, "clip_norm": 2.5},
            }
        )
        place = Place(0, 1, torch.device("cpu"))
        learner = TargetLearner(student, store, config, 0, place)
        state = TrainingState(student.module, config.optimizer, place, "", "")

        def step() -> None:
            batches = learner.batches(state.position)
            weight = sum(batch.weight for batch in batches)
            for batch in batches:
                torch.autograd.backward(learner.objective(state.step, batch).total / weight)
            state.update(2e-4)

        with closing(learner):
            yield step


def speedup(online: Callable[[], None], offline: Callable[[], None], repeats: int) -> Speedup:
    """Time both in turns."""
    pairs = []
    for _ in range(repeats):
        pair = []
        for work in (online, offline):
            started = time.perf_counter()
            work()
            pair.append(time.perf_counter() - started)
        pairs.append(pair)
    online_s, offline_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Speedup(online_s, offline_s, statistics.median(a / b for a, b in pairs))


@dataclass(frozen=True)
class Speedup:
    """Median seconds of NeMo's way and of ours, and the median of their ratios."""

    online_s: float
    offline_s: float
    ratio: float


# Memory


def peak_rss(way: str, folder: Path) -> int:
    """Peak resident memory in bytes of one way at the published shape, in its own process."""
    command = [sys.executable, __file__, "--memory-of", way, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(way: str, folder: Path) -> None:
    """Do one way once and print the peak."""
    bench = Rivals("published", folder)
    match way:
        case "online":
            bench.online_step(17)()
        case "rollout":
            bench.store("memory", 17)
        case "train":
            with bench.offline_step(folder / "published" / "memory") as step:
                step()
        case _:
            raise ValueError(f"there is no way {way!r}")
    print(json.dumps(own_peak()))


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1, help="turns of each pair")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "mid"], choices=["tiny", "mid"])
    parser.add_argument("--train-frames", nargs="+", type=int, default=[65, 200])
    parser.add_argument("--rollout-frames", nargs="+", type=int, default=[215, 430])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip-memory", action="store_true", help="leave the published shape out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        measure_memory(options.memory_of, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(options, Path(temporary))


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    """Measure speed, memory and bytes."""
    show: Callable[[str], object] = (lambda _: None) if options.json else print
    ratios: dict[str, float] = {}
    show(f"{'':<30}{'NeMo':>12}{'foretell':>12}")
    for name in options.shapes:
        bench, suffix = Rivals(name, folder), "" if name == "mid" else f"_{name}"
        bench.warm_up()
        for frames in options.train_frames:
            store = bench.store(f"train_{frames}", frames)
            with bench.offline_step(store) as offline:
                found = speedup(bench.online_step(frames), offline, options.repeats)
            line = f"{name}: a step of {frames} frames"
            show(f"{line:<30}{found.online_s:>10.3f} s{found.offline_s:>10.3f} s")
            ratios[f"train_step_speedup_{frames}{suffix}"] = found.ratio
        for frames in options.rollout_frames:
            ways = bench.online_rollout(frames), bench.offline_rollout(frames)
            found = speedup(*ways, options.repeats)
            line = f"{name}: a rollout of {frames} frames"
            show(f"{line:<30}{found.online_s:>10.3f} s{found.offline_s:>10.3f} s")
            ratios[f"rollout_speedup_{frames}{suffix}"] = found.ratio
    if not options.skip_memory:
        peaks = {way: peak_rss(way, folder) for way in ("online", "rollout", "train")}
        show("peak memory, published shape: " + ", ".join(
            f"{way} {peak / 2**20:.0f} MiB" for way, peak in peaks.items()
        ))  # fmt: skip
        ratios["rss_online_over_offline"] = peaks["online"] / peaks["train"]
        ratios["rss_online_over_rollout"] = peaks["online"] / peaks["rollout"]
    report(__file__, ratios, packages=["torch", "nemo_toolkit"])


if __name__ == "__main__":
    main()
