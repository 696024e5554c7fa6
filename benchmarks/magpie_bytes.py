"""What the targets of a second of MagpieTTS' speech take, and how far they are from the teacher.

The same rollouts of the mid shape are stored in every way. Beside the bytes stands the KL from the
teacher, in float32, to the distribution that a target restores; the tail of `top_k`, of which only
the mass is known, is spread evenly. Weights are random: how much a tail holds is theirs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from magpie_shapes import TOP_K, Bench
from measure import report

from stages.losses import kl_divergence
from stages.targets import DenseTarget, Forbidden, SparseTarget, load_heads, restore
from store import PredictionStore

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
        sizes = group_bytes(path)
        timestep_s = store.manifest.timestep_s
        assert timestep_s is not None  # its streams are audio
        seconds = bench.shape.batch * frames * timestep_s
        for number, group in enumerate(("backbone", "local")):
            streams = slice(number * bench.codebooks, (number + 1) * bench.codebooks)
            kl = float(losses[..., streams].mean())
            found[name, group] = Cost(sizes[group] / seconds / 1000, kl)
    return found


def group_bytes(path: Path) -> dict[str, float]:
    """Bytes on disk of each group's targets and codes; shared arrays by the streams' share."""
    sizes = {"backbone": 0.0, "local": 0.0}
    root = path / "shards"
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
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mid", choices=["tiny", "mid"])
    parser.add_argument(
        "--frames", type=int, default=128, help="4 rollouts of 128 fill a chunk to the last"
    )
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = costs(Bench(options.shape, Path(folder)), options.frames)
    if not options.json:
        print(f"{'target':<20}{'group':<12}{'kB/s of audio':>14}{'KL, nats':>12}")
        for (name, group), cost in found.items():
            print(f"{name:<20}{group:<12}{cost.kilobytes_per_s:>14.1f}{cost.kl:>12.2e}")
    ratios = {f"kilobytes_per_s_{n}_{g}": cost.kilobytes_per_s for (n, g), cost in found.items()}
    report(__file__, ratios, packages=["torch", "nemo_toolkit"])


if __name__ == "__main__":
    main()
