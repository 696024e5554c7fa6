"""What the benchmarks share: timing in turns, and the line of JSON that each of them ends with."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

Clock = Callable[[], float]


@dataclass(frozen=True)
class Turns:
    """How long one way took, and how long the reference took right before, turn by turn."""

    seconds: Sequence[float]
    reference: Sequence[float]

    @property
    def median_s(self) -> float:
        """Median seconds of one turn."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """Median over the turns of reference / this: above 1 where this is faster."""
        pairs = zip(self.reference, self.seconds, strict=True)
        return statistics.median(reference / seconds for reference, seconds in pairs)

    @property
    def slowdown(self) -> float:
        """Median over the turns of this / reference: 1.05 where this takes 5 % longer."""
        return 1 / self.speedup


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds that `work` takes, of wall clock or what else `clock` counts."""
    started = clock()
    work()
    return clock() - started


class OwnTime:
    """CPU seconds that the model's thread spent on every turn of a way."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Do the work once."""
        self.seconds.append(seconds(self._work, time.thread_time))

    @property
    def median_s(self) -> float:
        """Median of all turns but the first, which warms up."""
        return statistics.median(self.seconds[1:])


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    reference: str,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> dict[str, Turns]:
    """Time every way `repeats` times in turns, each right after a turn of the way `reference`.

    What else the machine does then falls on both sides of a ratio. The first turn of every way is
    run before, untimed, so that caches are warm. The reference's own turns are the pairs of its
    neighbouring turns, so that its `speedup` shows the noise around 1.
    """
    for work in ways.values():
        work()
    others = [name for name in ways if name != reference]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    anchors: list[float] = []
    for _ in range(repeats):
        for name in others:
            anchors.append(seconds(ways[reference], clock))
            pairs[name].append((anchors[-1], seconds(ways[name], clock)))
    anchors.append(seconds(ways[reference], clock))
    turns = {
        name: Turns([after for _, after in pair], [before for before, _ in pair])
        for name, pair in pairs.items()
    }
    return turns | {reference: Turns(anchors[1:], anchors[:-1])}


def own_peak() -> int:
    """Peak resident memory of this process in bytes.

    Not ru_maxrss: a process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def report(script: str, ratios: Mapping[str, float], packages: Sequence[str] = ()) -> None:
    """Print the last line of a benchmark: one JSON object for machines to read.

    `script` is the `__file__` of the benchmark, `ratios` its results by name (each a positive
    number, with its unit at the end of the name where it has one), `packages` those whose version
    matters.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    versions = [f"{name} {version(name)}" for name in packages]
    machine = [platform.machine(), f"{os.cpu_count()} cores", *versions]
    line = {
        "benchmark": Path(script).stem,
        "ratios": {name: float(f"{value:.4g}") for name, value in ratios.items()},
        "machine": ", ".join(machine),
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *arguments]),
    }
    print(json.dumps(line))
