"""Run by the tests of the store in a process of its own, which forks before zarr starts a thread.

`crash STORE` kills a writer of shard 0 at every call that touches the disk, in turn;
`race STORE` lets four writers commit every shard at the same moment. Both print JSON lines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from store import PredictionStore
from store.synthetic import synthetic_arrays, write_synthetic_shard

DISK_CALLS = ("mkdir", "open", "write", "fsync", "rename")
RACERS = 4


def kill_at(step: int) -> None:
    """Replace every call that touches the disk: the one with this number kills the process."""
    calls = count()

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, deadly(getattr(os, name)))


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
    {"crash": crash, "race": race}[sys.argv[1]](Path(sys.argv[2]))
