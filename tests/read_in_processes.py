"""Run by the tests of the store: `STORE METHOD` reads a store here and in processes of METHOD.

Two are handed the store after this process has read everything, two before it reads anything. Each
prints the hash of all that it read; the first line is this process's own.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.queues import SimpleQueue

import xxhash

from store import PredictionStore


def digest(store: PredictionStore) -> str:
    """Hash of every rollout by key, then of every shard."""
    hashed = xxhash.xxh3_64()
    rollouts = [store[key] for key in store]
    rollouts += [rollout for shard in store.committed for rollout in store.shard(shard)]
    for rollout in rollouts:
        for name, array in rollout.arrays.items():
            hashed.update(f"{name}{rollout.sample_id}{rollout.variation}{array.shape}".encode())
            hashed.update(array.tobytes())
    return hashed.hexdigest()


def report(store: PredictionStore, results: SimpleQueue[str]) -> None:
    results.put(digest(store))


def main() -> None:
    path, method = sys.argv[1:]
    context = multiprocessing.get_context(method)
    results: SimpleQueue[str] = context.SimpleQueue()
    store, own = PredictionStore.open(path), ""
    for _ in range(2):
        workers = [context.Process(target=report, args=(store, results)) for _ in range(2)]
        for worker in workers:
            worker.start()
        own = own or digest(store)
        print(own)  # noqa: T201
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
            print(results.get())  # noqa: T201


if __name__ == "__main__":
    main()
