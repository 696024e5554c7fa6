"""Run by test_power_loss.py in a process of its own: `power_cut.py IMAGE FOLDER ROUNDS`.

Mounts IMAGE at FOLDER and, in every round, cuts the power of that file system while a process
writes shards there: the ioctl FS_IOC_SHUTDOWN drops all that was not synced. Then mounts it again,
verifies, and prints a JSON line.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from store import PredictionStore, StoreError, verify
from store.garbage import delete_garbage, find_garbage
from store.schema import Hidden
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
SHARDS = 12


def main(image: Path, folder: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    store = folder / "store"
    for number in range(rounds):
        mount(image, folder)
        try:
            if not number:
                make(store)  # and the power is cut as soon as it says that there is one
                writer, reported, longest_s = None, [], 0.0
            else:
                prepare(store)
                writer, source = write(store)
                time.sleep(chance.uniform(0, longest_s))
            cut_power(folder)
            if writer is not None:
                assert os.waitpid(writer, 0)[1] == 0
                reported = [int(line) for line in source.read().split()]
                source.close()
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        mount(image, folder)
        try:
            answer = in_a_fork(lambda shards=reported: look(store, shards))
            if not number:
                longest_s = 4 * in_a_fork(lambda: one_commit_s(store))
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        print(json.dumps(answer))  # noqa: T201


def mount(image: Path, folder: Path) -> None:
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)


def cut_power(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(descriptor)


def make(store: Path) -> None:
    synthetic_store(store, synthetic_manifest(Hidden()), 2 * SHARDS, 1, 2)


def prepare(store: Path) -> None:
    """Begin with a store that lacks shards, and without what earlier cuts left."""
    delete_garbage(store, find_garbage(store))
    if not PredictionStore.open(store).missing():
        for shard in (store / "shards").iterdir():
            shutil.rmtree(shard)
        os.sync()


def write(path: Path) -> tuple[int, object]:
    """Write all that is missing in a process that reports every shard once it is committed."""
    source, sink = os.pipe()
    child = os.fork()
    if child:
        os.close(sink)
        return child, os.fdopen(source)
    code = 1
    try:
        store = PredictionStore.open(path)
        for shard in store.missing():
            if write_synthetic_shard(store, shard, mean_timesteps=8):
                os.write(sink, f"{shard}\n".encode())
        code = 0
    except StoreError:
        code = 0  # without power nothing can be read or written
    finally:
        os._exit(code)


def look(path: Path, reported: list[int]) -> dict[str, object]:
    """What is there once the power is back."""
    found = verify(path)
    committed = PredictionStore.open(path).committed
    lost = [shard for shard in reported if shard not in committed]
    left = len(find_garbage(path))
    bad = [damage.reason for damage in found.bad]
    return {"reported": len(reported), "lost": lost, "bad": bad, "left": left}


def one_commit_s(path: Path) -> float:
    began = time.monotonic()
    write_synthetic_shard(PredictionStore.open(path), 0, mean_timesteps=8)
    return time.monotonic() - began


def in_a_fork(work: Callable[[], object]) -> object:
    """What some work returns, done in a process that leaves nothing open or mapped."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(sink, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source) as lines:
        answer = json.loads(lines.read())
    os.waitpid(child, 0)
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
