"""Claims: which worker writes which shard, so that no two spend their time on the same one.

`tmp/claims/<shard>.<generation>` holds who works on a shard and a count that its owner raises every
few seconds. Whoever sees the same count for long enough, by looks that it times itself, creates the
next generation; files are created exclusively, so one of several wins. No clock is compared with
another's. What is stored never depends on claims: publishing a shard has one winner without them,
and a claim that is lost, or deleted with tmp/, costs work done twice.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from store.errors import StoreError, explain_os_errors
from store.layout import parse_shard, shard_name

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Seconds between two signs of life of a worker."""
UNCHANGED_LOOKS = 9
"""Looks, a heartbeat apart, at an unchanged claim before it is taken over: by default 90 s, longer
than NFS may show a folder as it was (acdirmax, 60 s)."""
LONGEST_CLAIM_BYTES = 1024


@dataclass
class _Watch:
    """What an observer has seen of another's claim."""

    claim: tuple[int, bytes]
    """Generation and content."""
    looked: float
    """Own monotonic clock at the last look that counts."""
    looks: int = 0
    """Looks at which it was unchanged, each a heartbeat after the one before."""


class Claims:
    """The claims of one worker on the shards of a store; `with` keeps them alive meanwhile.

    `folder` is the layout's `claims`, and `is_committed` asks the store's disk. On leaving the
    block what is still claimed becomes free for others.
    """

    def __init__(
        self,
        folder: Path,
        is_committed: Callable[[int], bool],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._folder, self._is_committed = folder, is_committed
        self.heartbeat_s = heartbeat_s
        self._owner = _own_mark()
        self._watched: dict[int, _Watch] = {}
        self._held: dict[int, int] = {}
        """Generation of each claim; guarded by the lock, as the heart beats in a thread."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._heart.join()
        self.release()
        # Of workers that were killed just after they had published.
        for shard, generation in self._all():
            if self._is_committed(shard):
                self._remove(shard, generation)
        with suppress(OSError):  # others still have claims, or have removed it first
            self._folder.rmdir()

    def take(self, shard: int) -> bool:
        """Claim a shard; False when it is committed, or claimed by a worker that may live.

        Call it again and again: a worker is taken for dead by what several calls have seen. Raises
        StoreError where the disk refuses.
        """
        with explain_os_errors(f"claim shard {shard_name(shard)} in {self._folder}"):
            latest = max((g for s, g in self._all() if s == shard), default=0)
            if latest and not self._is_abandoned(shard, latest):
                return False
            if not self._create(shard, latest + 1):
                return False
        self._watched.pop(shard, None)
        if latest:
            logger.info("shard %d was left by its worker: taken over", shard)
            self._remove(shard, latest)
        if self._is_committed(shard):  # since the caller looked, by the claim's last owner
            self._remove(shard, latest + 1)
            return False
        with self._lock:
            self._held[shard] = latest + 1
        return True

    def release(self) -> None:
        """Free everything that is claimed."""
        with self._lock:
            for shard, generation in self._held.items():
                self._remove(shard, generation)
            self._held.clear()

    def _is_abandoned(self, shard: int, generation: int) -> bool:
        content = self._read(shard, generation)
        if _has_ended(content):
            return True
        now, watch = time.monotonic(), self._watched.get(shard)
        if watch is None or watch.claim != (generation, content):
            self._watched[shard] = _Watch((generation, content), now)
            return False
        # Looks are counted rather than seconds: who was stopped itself, for whatever time, has
        # missed signs of life, and finds them at its next look.
        if now - watch.looked >= self.heartbeat_s:
            watch.looked, watch.looks = now, watch.looks + 1
        return watch.looks >= UNCHANGED_LOOKS

    def _beat_on(self) -> None:
        beat = 0
        while not self._ended.wait(self.heartbeat_s):
            beat += 1
            with self._lock:
                for shard, generation in list(self._held.items()):
                    self._beat(shard, generation, beat)

    def _beat(self, shard: int, generation: int, beat: int) -> None:
        try:
            if self._is_committed(shard):
                self._remove(shard, generation)
                del self._held[shard]
            else:
                # In place and of the same length: a reader sees one count or the other.
                _write(self._path(shard, generation), self._content(beat), 0)
        except FileNotFoundError:
            del self._held[shard]
            logger.info("the claim on shard %d was taken over; whoever is first stores it", shard)
        except (OSError, StoreError) as error:
            logger.warning("cannot renew the claim on shard %d: %s", shard, error)

    def _all(self) -> list[tuple[int, int]]:
        """Every claim that is there: (shard, generation)."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        parts = [name.partition(".") for name in names]
        numbers = [(parse_shard(shard), generation) for shard, _, generation in parts]
        return [(s, int(g)) for s, g in numbers if s is not None and g.isascii() and g.isdigit()]

    def _create(self, shard: int, generation: int) -> bool:
        """Create a claim; False when another worker has created it first."""
        path = self._path(shard, generation)
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(path, self._content(0), os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the last one to leave has removed the folder since
            return self._create(shard, generation)
        return True

    def _read(self, shard: int, generation: int) -> bytes:
        """Return the content of a claim; empty when it is gone, or was not yet written."""
        try:
            with self._path(shard, generation).open("rb") as file:
                return file.read(LONGEST_CLAIM_BYTES)
        except FileNotFoundError:
            return b""

    def _remove(self, shard: int, generation: int) -> None:
        with suppress(OSError):  # it is gone, or stays as garbage that others outwait
            self._path(shard, generation).unlink()

    def _content(self, beat: int) -> bytes:
        return json.dumps({"owner": self._owner, "beat": f"{beat:012d}"}).encode()

    def _path(self, shard: int, generation: int) -> Path:
        return self._folder / f"{shard_name(shard)}.{generation}"


def _write(path: Path, content: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o666)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def _own_mark() -> list[str]:
    """Return what names this process among all that ever ran: host, boot, namespace, pid, start.

    Only the host where the system does not tell (it is Linux that does).
    """
    mark = [socket.gethostname()]
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
        mark += [boot, namespace, str(os.getpid()), _state_and_start(os.getpid())[1]]
    return mark


def _has_ended(content: bytes) -> bool:
    """Whether the owner of a claim is a process of this machine that has ended.

    So a worker that was killed is followed at once where it is started again.
    """
    theirs, ours = _mark_in(content), _own_mark()
    if len(theirs) != 5 or theirs[:3] != ours[:3] or not theirs[3].isdigit():
        return False
    pid = int(theirs[3])
    try:
        os.kill(pid, 0)
        state, start = _state_and_start(pid)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return state == "Z" or start != theirs[4]


def _mark_in(content: bytes) -> list[str]:
    try:
        owner = json.loads(content)["owner"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    texts = isinstance(owner, list) and all(isinstance(part, str) for part in owner)
    return owner if texts else []


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return the state of a process and when it started, in ticks since boot; raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return fields[0], fields[19]
