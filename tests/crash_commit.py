"""Run by the tests of the store in a process of its own, which forks before zarr starts a thread.

`crash STORE` kills a writer of shard 0 at every call that touches the disk, in turn;
`race STORE` lets four writers commit every shard at the same moment;
`kill STORE WHOLE ROUNDS` kills a writer at random moments and compares with a complete store;
`create STORE` kills who makes a store at every such call;
`repair STORE` kills who takes a damaged shard 0 out at every such call. All print JSON lines.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from store import PredictionStore
from store.repair import repair as take_out
from store.schema import Hidden
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)

LEAST_PIPE = 4096
TELLS = LEAST_PIPE // 4
"""Bytes that stand for a call in a pipe, which so holds four."""
DISK_CALLS = ("mkdir", "open", "write", "fsync", "rename", "link")
RACERS = 4


def before_disk_calls(do: Callable[[int], object]) -> None:
    """Replace every call that touches the disk: `do` is told its number before it is done."""
    calls = count()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            do(next(calls))
            return call(*args, **kwargs)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, watched(getattr(os, name)))


def kill_at(step: int) -> None:
    """Let the disk call with this number kill the process."""
    before_disk_calls(lambda number: number == step and os.kill(os.getpid(), signal.SIGKILL))


def crash(path: Path) -> None:
    store = PredictionStore.open(path)
    for step in count():
        child = os.fork()
        if child == 0:
            kill_at(step)
            write_synthetic_shard(store, 0, mean_timesteps=8)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        committed = store.is_committed(0)
        if committed:
            shutil.copytree(path / "shards/00000", path.parent / f"after-{step}")
            shutil.rmtree(path / "shards/00000")
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"step": step, "killed": killed, "committed": committed}))  # noqa: T201
        if not killed:
            return


def kill(path: Path, whole: Path, rounds: int) -> None:
    """Kill a writer when it has come to a random disk call of its next shards, or a few behind.

    Compares every shard that is there then, and empties the store when it is complete.
    """
    chance = random.Random(rounds)
    expected = {shard.name: tree(shard) for shard in (whole / "shards").iterdir()}
    calls_of_shard = disk_calls(path)
    for _ in range(rounds):
        child, told = writer_that_tells(path)
        enough = chance.randrange(3 * calls_of_shard)
        while enough > 0 and (heard := os.read(told, TELLS)):
            enough -= len(heard) // TELLS
        os.kill(child, signal.SIGKILL)
        os.close(told)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = {shard.name: tree(shard) for shard in (path / "shards").iterdir()}
        sound = all(content == expected[name] for name, content in found.items())
        left = len(os.listdir(path / "tmp"))
        complete = len(found) == len(expected)
        known = len(PredictionStore.open(path).committed) == len(found)
        answer = {"killed": killed, "sound": sound and known, "left": left, "complete": complete}
        print(json.dumps(answer))  # noqa: T201
        for garbage in (path / "tmp").iterdir():
            shutil.rmtree(garbage)
        for shard in (path / "shards").iterdir() if complete else ():
            shutil.rmtree(shard)


def writer_that_tells(path: Path) -> tuple[int, int]:
    """Start a process that writes what is missing, and says so before each disk call.

    It gets no further ahead of who listens than the pipe holds, however slow the machine is.
    """
    store = PredictionStore.open(path)
    told, tell = os.pipe()
    fcntl.fcntl(tell, fcntl.F_SETPIPE_SZ, LEAST_PIPE)
    child = os.fork()
    if child == 0:
        write, words = os.write, bytes(TELLS)
        before_disk_calls(lambda _number: write(tell, words))
        for shard in store.missing():
            write_synthetic_shard(store, shard, mean_timesteps=8)
        os._exit(0)
    os.close(tell)
    return child, told


def disk_calls(path: Path) -> int:
    """How many disk calls a shard takes."""
    child, told = writer_that_tells(path)
    heard = 0
    while not any((path / "shards").iterdir()):
        heard += len(os.read(told, TELLS)) // TELLS
    os.kill(child, signal.SIGKILL)
    os.close(told)
    os.waitpid(child, 0)
    return heard


def create(path: Path) -> None:
    """Prints whether a store was there after the kill, and that one could be made then."""
    manifest = synthetic_manifest(Hidden())
    for step in count():
        child = os.fork()
        if child == 0:
            kill_at(step)
            synthetic_store(path, manifest, 4, 1, 2)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        there = (path / "manifest.json").exists()
        opened = there and PredictionStore.open(path).planned_shards == 2
        synthetic_store(path, manifest, 4, 1, 2)
        shutil.rmtree(path / "tmp")
        answer = {"step": step, "killed": killed, "there": there, "opened": opened}
        print(json.dumps(answer))  # noqa: T201
        shutil.move(path, path.parent / f"after-{step}")
        if not killed:
            return


def repair(path: Path) -> None:
    """Prints where the damaged shard was found after the kill."""
    damaged = path / "shards/00000"
    for step in count():
        child = os.fork()
        if child == 0:
            kill_at(step)
            take_out(path, [0])
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        moved = [name for name in os.listdir(path / "tmp") if name.startswith("damaged-00000-")]
        answer = {"killed": killed, "there": damaged.exists(), "moved": len(moved)}
        print(json.dumps(answer))  # noqa: T201
        for name in moved:
            os.rename(path / "tmp" / name, damaged)
        if not killed:
            return


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def race(path: Path) -> None:
    store = PredictionStore.open(path)
    for shard in store.missing():
        ready, start = os.pipe(), os.pipe()
        children = [os.fork() for _ in range(RACERS) if os.getpid() == PARENT]
        if 0 in children:
            os.close(start[1])
            compete(store, shard, ready[1], start[0])
        for _ in range(RACERS):
            os.read(ready[0], 1)
        for end in start:
            os.close(end)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"shard": shard, "codes": sorted(codes)}))  # noqa: T201


def compete(store: PredictionStore, shard: int, ready: int, start: int) -> None:
    """Append everything, wait until the other writers did too, then commit; exits 0 if it won."""
    with store.writer(shard) as writer:
        for key in store.plan[shard]:
            arrays = synthetic_arrays(store.manifest, key, 5)
            writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=0)
        os.write(ready, b".")
        os.read(start, 1)
        os._exit(0 if writer.commit() else 3)


if __name__ == "__main__":
    PARENT = os.getpid()
    command, store, *more = sys.argv[1:]
    match command:
        case "crash":
            crash(Path(store))
        case "race":
            race(Path(store))
        case "kill":
            kill(Path(store), Path(more[0]), int(more[1]))
        case "create":
            create(Path(store))
        case "repair":
            repair(Path(store))
