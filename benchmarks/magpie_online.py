"""What distilling MagpieTTS offline is worth, against NeMo 3.0.0's own online distillation.

Both have the same teacher, batches and lengths of rollouts, in one thread of the same process and
in turns. `train_step`: NeMo regenerates the rollouts of every step and then trains on them; stage
two reads them from a store, with NeMo's loss. `rollout`: what one generated frame costs NeMo's
rollout with its cache, and stage one until the shard is durable. Memory is measured at the
published shape, each way in a process of its own. Last, what the targets of a second of audio take,
and how far the distribution that they restore is from the teacher's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import report
from omegaconf import OmegaConf

from stages.config import DatasetFacts, RolloutConfig, TrainConfig
from stages.distributed import Place
from stages.families.magpie import Magpie
from stages.families.magpie_tiny import build_codec, build_model, model_config
from stages.families.nemo_archive import archive_fingerprint, quiet
from stages.interruption import StopRequest
from stages.losses import kl_divergence
from stages.model_config import MagpieConfig, MagpieTeacher
from stages.optimization import TrainingState
from stages.rollout import rollout
from stages.rollout_plan import create_store
from stages.targets import DenseTarget, Forbidden, SparseTarget, load_heads, restore
from stages.train import TargetLearner
from store import PredictionStore

with quiet():
    from nemo.collections.tts.models import magpietts_cfg_distillation as nemo

CFG_SCALE = 2.5
CONTEXT_FRAMES = 107
"""Five seconds, as the published models have."""
TEXT = "the quick brown fox jumps over the lazy dog, and then it rests a while"
TOP_K = {"kind": "top_k", "k": 64, "moments": True}
SMALL_CODEC = {"codebooks": 4, "levels": (4, 4, 4)}
NANO_CODEC = {"codebooks": 8, "levels": (8, 7, 6, 6)}


@dataclass(frozen=True)
class Shape:
    """A model to measure: what is made, and how many sequences go together."""

    codec: Mapping[str, Any]
    model: Mapping[str, Any]
    batch: int
    long_batch: int
    """Of rollouts of more than 300 frames: NeMo keeps the logits of the whole history of every
    step, which are 37 GB for four of 430 frames and 8 codebooks."""


SHAPES = {
    "tiny": Shape(SMALL_CODEC, {"positions": 1024}, 4, 4),
    "mid": Shape(
        NANO_CODEC,
        {"width": 128, "layers": 4, "encoder_layers": 2, "feed_forward": 512, "positions": 1024},
        4,
        1,
    ),
    "published": Shape(
        NANO_CODEC,
        {
            "width": 768, "layers": 12, "encoder_layers": 6, "heads": 12, "feed_forward": 3072,
            "cross_width": 128, "local_width": 256, "positions": 2048,
        },
        2,
        1,
    ),
}  # fmt: skip


class Bench:
    """One shape: its files, NeMo's models and ours."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.shape, self.folder = name, SHAPES[name], folder / name
        self.codec, self.teacher = self.folder / "codec.nemo", self.folder / "teacher.nemo"
        if not self.teacher.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            build_codec(self.codec, **self.shape.codec)
            build_model(self.teacher, self.codec, **self.shape.model)

    @property
    def codebooks(self) -> int:
        """Codebooks of the audio codec."""
        return int(self.shape.codec["codebooks"])

    @cached_property
    def facts(self) -> DatasetFacts:
        """What a prepared dataset would say."""
        return DatasetFacts(
            alphabet="",
            speakers=("a",),
            codebooks=self.codebooks,
            codes_per_codebook=int(np.prod(self.shape.codec["levels"])),
            frame_rate_hz=22050 / 1024,
            audio_codec=archive_fingerprint(self.codec),
            context_frames=CONTEXT_FRAMES,
        )

    def samples(self, count: int) -> list[dict[str, Any]]:
        """As many samples as there are rollouts."""
        random = np.random.default_rng(0)
        size = self.facts.codes_per_codebook
        return [
            {
                "sample_id": f"{number:03d}",
                "text": TEXT[: 40 + number % 20],
                "speaker": "a",
                "codes": np.zeros(8 * self.codebooks, np.uint16),
                "context_codes": random.integers(0, size, CONTEXT_FRAMES * self.codebooks),
            }
            for number in range(count)
        ]

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

    def rollouts(self, frames: int) -> int:
        """How many rollouts of so many frames are generated together."""
        return self.shape.long_batch if frames > 300 else self.shape.batch

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

    @cached_property
    def family(self) -> Magpie:
        """The teacher of stage one."""
        settings = MagpieTeacher(family="magpie", path=self.teacher)
        return Magpie.pretrained(settings, self.facts, device="cpu", dtype=torch.float32)

    def store(self, name: str, frames: int, target: Mapping[str, Any] = TOP_K, **more: Any) -> Path:
        """Do stage one into a fresh store, all rollouts of `frames` frames."""
        path, count = self.folder / name, self.rollouts(frames)
        config = RolloutConfig.model_validate(
            {
                "guidance": {"scale": CFG_SCALE},
                "sampler": {
                    "temperature": 0.7,
                    "top_k": min(80, self.facts.codes_per_codebook),
                    "min_timesteps": frames,
                    "max_timesteps": frames,
                    "max_timesteps_weight": 1.0,
                },
                "target": dict(target),
                "batch_size": count,
                "rollouts_per_shard": count,
                **more,
            }
        )
        samples = self.samples(count)
        store = create_store(
            path, config, self.family, samples, facts=self.facts, dataset_fingerprint="", seed=0
        )
        by_id = {sample["sample_id"]: sample for sample in samples}
        done = rollout(
            self.family, store, by_id, store.missing(), batch_size=count,
            stop=StopRequest(),
        )  # fmt: skip
        assert done
        return path

    def offline_rollout(self, frames: int) -> Callable[[], None]:
        """Stage one until its shard is durable."""
        stores = iter(range(1000))
        return lambda: self.store(f"rollout_{frames}_{next(stores)}", frames) and None

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
        device = torch.device("cpu")
        learner = TargetLearner(student, store, config, 0, Place(0, 1, device))
        state = TrainingState(student.module, config.optimizer, device)

        def step() -> None:
            batches = learner.batches(state.position)
            weight = sum(batch.weight for batch in batches)
            for batch in batches:
                (learner.objective(state.step, batch).total / weight).backward()
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
    bench = Bench("published", folder)
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


def own_peak() -> int:
    """Peak resident memory of this process in bytes.

    The counter of getrusage begins at the peak of whoever started the process.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = next(x.split()[1] for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(kilobytes) * 1024


# Bytes

TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "top_k_64": (TOP_K, "fast"),
    "top_k_64_compact": (TOP_K, "compact"),
    "hidden_fp16": ({"kind": "hidden"}, "fast"),
    "hidden_compact": ({"kind": "hidden"}, "compact"),
    "full_fp16": ({"kind": "full"}, "fast"),
}


@dataclass(frozen=True)
class Cost:
    """What a target takes and loses, for one group of streams."""

    kilobytes_per_s: float
    kl: float
    """Mean nats per prediction from the teacher to what the target restores, a tail being flat."""


def costs(bench: Bench, frames: int) -> dict[tuple[str, str], Cost]:
    """Bytes and losses of every target, by its name and the group of streams."""
    exact = PredictionStore.open(bench.store("exact", frames, {"kind": "full", "dtype": "float32"}))
    found = {}
    for name, (target, profile) in TARGETS.items():
        path = bench.store(name, frames, target, profile={"kind": profile})
        store = PredictionStore.open(path)
        losses = divergences(exact, store)
        sizes = group_bytes(store, bench.codebooks)
        seconds = bench.shape.batch * frames * store.manifest.timestep_s
        for number, group in enumerate(("backbone", "local")):
            streams = slice(number * bench.codebooks, (number + 1) * bench.codebooks)
            kl = float(losses[..., streams].mean())
            found[name, group] = Cost(sizes[group] / seconds / 1000, kl)
    return found


def group_bytes(store: PredictionStore, codebooks: int) -> dict[str, float]:
    """Bytes on disk of each group's targets and codes; shared arrays by the streams' share."""
    sizes = {"backbone": 0.0, "local": 0.0}
    root = store.path / "shards"
    for file in root.rglob("*"):
        if not file.is_file():
            continue
        array = next((p for p in file.relative_to(root).parts if "." in p or p == "codes"), "")
        group = array.rpartition(".")[-1]
        if group in sizes:
            sizes[group] += file.stat().st_size
        elif array.startswith(("top_k", "full", "codes")):
            for each in sizes:
                sizes[each] += file.stat().st_size / 2
    return sizes


def divergences(exact: PredictionStore, store: PredictionStore) -> torch.Tensor:
    """KL [rollouts, T, C] of every prediction of the exact store."""
    heads = load_heads(store.heads, "cpu") if store.manifest.heads else None
    forbidden = Forbidden.of(store.manifest, "cpu")
    every, keys = [], exact.keys()
    for key in keys:
        teacher = torch.from_numpy(np.array(exact[key].arrays["full.logits"]))
        kind = store.manifest.target.kind
        arrays = {
            name.removeprefix(f"{kind}."): torch.from_numpy(np.array(values))[None]
            for name, values in store[key].arrays.items()
            if name.startswith(f"{kind}.")
        }
        rows = torch.arange(len(teacher))
        found = restore(arrays, store.manifest, heads, "cpu").rows(rows)
        if isinstance(found, SparseTarget):
            logits = flat_tail(found, teacher.shape, forbidden)
        else:
            assert isinstance(found, DenseTarget)
            logits = found.logits
        every.append(kl_divergence(logits, DenseTarget(teacher)))
    return torch.stack(every)


def flat_tail(target: SparseTarget, shape: Sequence[int], forbidden: Forbidden) -> torch.Tensor:
    """Logits [T, C, V] that the kept ids and the mass of the tail give, spread evenly."""
    logprobs = target.logprobs(1.0)
    ones = torch.ones(tuple(shape))
    outside = forbidden.allowed(ones) - target.ids.shape[-1]
    tail = logprobs[..., -1:] - outside.log()
    spread = tail.expand(tuple(shape)).scatter(-1, target.ids, logprobs[..., :-1])
    return forbidden.filled(spread)


def main() -> None:
    """Measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1, help="turns of each pair")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "mid"], choices=["tiny", "mid"])
    parser.add_argument("--train-frames", nargs="+", type=int, default=[65, 200])
    parser.add_argument("--rollout-frames", nargs="+", type=int, default=[215, 430])
    parser.add_argument(
        "--cost-frames", type=int, default=128, help="4 rollouts of 128 fill a chunk to the last"
    )
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
        bench, suffix = Bench(name, folder), "" if name == "mid" else f"_{name}"
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
    show(f"{'target':<20}{'group':<12}{'kB/s of audio':>14}{'KL, nats':>12}")
    bench = Bench(options.shapes[-1], folder)
    for (name, group), cost in costs(bench, options.cost_frames).items():
        show(f"{name:<20}{group:<12}{cost.kilobytes_per_s:>14.1f}{cost.kl:>12.2e}")
        ratios[f"kilobytes_per_s_{name}_{group}"] = cost.kilobytes_per_s
    report(__file__, ratios, packages=["torch", "nemo_toolkit"])


if __name__ == "__main__":
    main()
