"""Workers that share the shards of a store: each takes the next one that nobody has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from stages.interruption import StopRequest
from store import PredictionStore
from store.claims import HEARTBEAT_S, Claims

SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""A worker that waits hears of a stop, and of the last shard, so much later."""


@dataclass(frozen=True)
class Share:
    """What part of a store's shards a process writes, as task I of N."""

    task: int = 0
    tasks: int = 1
    static: bool = False
    """Write the own part, number ≡ task modulo tasks, and nothing else; without claims."""
    heartbeat_s: float = HEARTBEAT_S
    """Seconds between two signs of life, the same for all that write a store."""

    def own(self, shards: Iterable[int]) -> list[int]:
        """Return those shards that are this process's own part."""
        return [shard for shard in shards if shard % self.tasks == self.task]

    def write(
        self, store: PredictionStore, work: Callable[[Iterable[int]], bool], stop: StopRequest
    ) -> bool:
        """Have `work` write what is missing of a store; False when `stop` was requested first.

        Unless the part is static, this returns True when all of the store is committed. In object
        storage, where workers have no claims, every part is static.
        """
        missing, folder = store.missing(), store.claims
        if self.static or folder is None:
            return work(self.own(missing))
        order = own_first(missing, self.task, self.tasks)
        with Claims(folder, store.is_committed, self.heartbeat_s) as claims:
            return in_turns(claims, order, store.is_committed, work, stop)


EVERYTHING = Share()
"""What a process writes that works alone."""


def own_first(shards: Sequence[int], task: int, tasks: int) -> list[int]:
    """Return shards in the order in which worker `task` of `tasks` takes them.

    Its own share (number ≡ task modulo tasks) comes first, from the front; then it helps others
    from the back, where they come last.
    """
    own = [shard for shard in shards if shard % tasks == task]
    return own + [shard for shard in reversed(shards) if shard % tasks != task]


def in_turns(
    claims: Claims,
    shards: Sequence[int],
    is_committed: Callable[[int], bool],
    work: Callable[[Iterable[int]], bool],
    stop: StopRequest,
) -> bool:
    """Have `work` write every shard that this worker can claim, until all shards are committed.

    `work` gets an iterator of claimed shards; when it returns True they are committed, and when it
    returns False it was stopped. Shards of other workers are waited for, and taken over when those
    give no more signs of life. Returns False when `stop` was requested first.
    """
    pause_s, left = SHORTEST_PAUSE_S, list(shards)
    while left := [shard for shard in left if not is_committed(shard)]:
        if stop.requested:
            return False
        free = (shard for shard in left if not is_committed(shard) and claims.take(shard))
        first = next(free, None)
        if first is None:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S, claims.heartbeat_s)
            continue
        finished = work(chain([first], free))
        claims.release()
        if not finished:
            return False
        pause_s = SHORTEST_PAUSE_S
    return True
