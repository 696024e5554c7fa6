"""Noticing at once that another process of a stage has ended, whatever this one waits for.

A process that waits for others in a collective waits for minutes before the backend gives up, and
then says which call failed, not who is missing. So each process holds a connection to the leading
one, on which nothing is sent. The system closes it when a process ends, however suddenly, and
keep-alive probes find a machine that is gone. A process that is merely slow is never mistaken.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from stages.errors import PeerLost

KEY = "peers"
"""What stands on the board: port, token, process id and host of the leader."""
WELCOME, FAREWELL, LOST = b"+", b".", b"!"
"""What is sent: that a process is known, that an end is meant, and who has ended otherwise."""
NOTICE_S = 5.0
"""Longest time between a call that fails for want of a process and the news that it ended."""
LEAVE_S = 10.0
"""What is left to a process after that news, to end by itself."""
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A machine that does not answer for 30 s is gone."""
MEETING_S = 60.0
"""Longest time until the leading process answers another."""
LONGEST_LINE = 512


class Board(Protocol):
    """Where processes leave each other notes: a `Store` of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Leave a note."""

    def get(self, key: str) -> bytes:
        """Wait for a note and return it."""


class Peers:
    """A watch over the other processes; `watched` begins and ends it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._news, self._left = threading.Event(), threading.Event()
        self._lost = ""

    def has_lost(self) -> bool:
        """Whether a process has ended, of which the news may take a moment."""
        return self._news.wait(NOTICE_S)

    def message(self) -> str:
        """What to tell a person once a process is lost."""
        return (
            f"process {self._rank} of {self._world_size} ends, because {self._lost} has ended and "
            "the others cannot go on without it. Its own message, or that of what started it, says "
            "why; a kill (signal 9, exit code -9) is often for want of memory. The checkpoints are "
            "whole: run the same command again to go on from the newest"
        )

    def _lose(self, who: str) -> None:
        """Take the news, and end the process should it not end by itself: it may wait for ever."""
        self._lost = who
        self._news.set()
        if not self._left.wait(LEAVE_S):
            sys.stderr.write(f"{self.message()}\n")
            sys.stderr.flush()
            os._exit(1)


@contextmanager
def watched(rank: int, world_size: int, board: Board) -> Iterator[None]:
    """Watch over the other processes inside the block.

    Raises `PeerLost` instead of the error of a call that failed because one of them has ended. A
    process that leaves by an error is lost to the others; one that leaves without is not.
    """
    watch = _Leader(world_size, board) if rank == 0 else _Follower(rank, world_size, board)
    try:
        try:
            yield
        except RuntimeError as error:  # also those of torch.distributed
            if watch.has_lost():
                raise PeerLost(watch.message()) from error
            raise
        watch.bid_farewell()
    finally:
        watch.close()


class _Leader(Peers):
    """Process 0, to which all others are connected."""

    def __init__(self, world_size: int, board: Board) -> None:
        super().__init__(0, world_size)
        self._server = _server()
        self._followers: dict[socket.socket, str] = {}
        """Who is at the other end, empty before they have said so."""
        self._end, self._ended = socket.socketpair()
        self._token = secrets.token_hex(16)
        port = self._server.getsockname()[1]
        board.set(KEY, f"{port} {self._token} {_who(0)}")
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    ready = key.fileobj
                    assert isinstance(ready, socket.socket)
                    if ready is self._ended:
                        return
                    if ready is self._server:
                        follower = self._server.accept()[0]
                        _probe(follower)
                        self._followers[follower] = ""
                        selector.register(follower, selectors.EVENT_READ)
                    elif not self._hears(ready):
                        selector.unregister(ready)
                        ready.close()

    def _hears(self, follower: socket.socket) -> bool:
        """Hear a follower: its name first, later nothing but its end; whether it is still there."""
        said, who = _receive(follower), self._followers[follower]
        if not who:
            token, _, name = said.decode(errors="replace").partition(" ")
            if token == self._token:
                self._followers[follower] = name
                _send(follower, WELCOME)
                return True
            del self._followers[follower]  # a stranger
            return False
        del self._followers[follower]
        if said != FAREWELL:
            for other in self._followers:
                _send(other, LOST + who.encode())
            self._lose(who)
        return False

    def bid_farewell(self) -> None:
        """Tell the others that the end is meant."""
        for follower in list(self._followers):
            _send(follower, FAREWELL)

    def close(self) -> None:
        """End the watch."""
        self._left.set()
        self._end.close()
        self._thread.join()
        for connection in (*self._followers, self._server, self._ended):
            connection.close()


class _Follower(Peers):
    """Any other process, connected to the leading one."""

    def __init__(self, rank: int, world_size: int, board: Board) -> None:
        super().__init__(rank, world_size)
        port, token, self._leader = board.get(KEY).decode().split(" ", 2)
        host = "127.0.0.1" if _on_one_machine() else os.environ["MASTER_ADDR"]
        try:
            self._connection = socket.create_connection((host, int(port)), MEETING_S)
            self._connection.sendall(f"{token} {_who(rank)}".encode())
            known = self._connection.recv(len(WELCOME)) == WELCOME
        except OSError:
            known = False
        if not known:
            self._lost = self._leader
            raise PeerLost(self.message())
        self._connection.settimeout(None)
        _probe(self._connection)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        said = _receive(self._connection)
        if said != FAREWELL and not self._left.is_set():
            self._lose(said[1:].decode() if said.startswith(LOST) else self._leader)

    def bid_farewell(self) -> None:
        """Tell the leading process that the end is meant."""
        _send(self._connection, FAREWELL)

    def close(self) -> None:
        """End the watch."""
        self._left.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()


def _who(rank: int) -> str:
    return f"process {rank} (pid {os.getpid()} on {socket.gethostname()})"


def _on_one_machine() -> bool:
    world_size = os.environ.get("WORLD_SIZE")
    return os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size


def _server() -> socket.socket:
    """Listen, to other machines only if there are any."""
    if _on_one_machine():
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _probe(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive(connection: socket.socket) -> bytes:
    """Return what came, or nothing at the end of a connection, however it ended."""
    try:
        return connection.recv(LONGEST_LINE)
    except OSError:
        return b""


def _send(connection: socket.socket, content: bytes) -> None:
    with suppress(OSError):  # its end is noticed by who reads
        connection.sendall(content)
