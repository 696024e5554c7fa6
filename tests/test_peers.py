"""Processes that watch over each other: an end is noticed, whatever they wait for; and no more."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from stages import peers
from stages.errors import PeerLost, UserError
from stages.peers import watched

pytestmark = pytest.mark.slow


class Board:
    """Notes in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, key: str, value: str) -> None:
        draft = self.folder / f"{key}.draft"
        draft.write_text(value)
        draft.rename(self.folder / key)

    def get(self, key: str) -> bytes:
        while not (self.folder / key).exists():
            time.sleep(0.001)
        return (self.folder / key).read_bytes()


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Run functions of (rank, board) in processes of their own that watch over each other.

    A function says with what it ends: None, or an error. What a process writes goes to a file.
    """
    monkeypatch.setattr(peers, "LEAVE_S", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    board = Board(tmp_path)

    def start(*parts) -> list[int]:
        return [_begin(rank, part, len(parts), board) for rank, part in enumerate(parts)]

    return start


def _begin(rank: int, part, count: int, board: Board) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        with (board.folder / f"said.{rank}").open("w", buffering=1) as sys.stderr:
            try:
                with watched(rank, count, board):
                    board.set(f"here.{rank}", "")
                    part(board)
            except PeerLost as error:
                sys.stderr.write(f"{error}\n")
                os._exit(3)
            except UserError:
                os._exit(2)
            os._exit(0)
    finally:
        os._exit(9)


def codes_of(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def all_are_there(board: Board) -> None:
    for rank in range(3):
        board.get(f"here.{rank}")


def wait_for_ever(board: Board) -> None:
    """As in a collective of a backend that notices nothing."""
    signal.pause()


def fails(board: Board) -> None:
    """As a collective does that misses a process."""
    board.get("here.0")
    board.get("dead")
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("dies", [0, 2])
def test_the_death_of_any_process_ends_those_that_wait(fork, tmp_path, dies):
    pids = fork(wait_for_ever, wait_for_ever, wait_for_ever)
    all_are_there(Board(tmp_path))
    os.kill(pids[dies], signal.SIGKILL)
    assert codes_of(pids) == [-9 if rank == dies else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {dies}:
        said = (tmp_path / f"said.{rank}").read_text()
        host = socket.gethostname()
        expected = f"process {rank} of 3 ends, because process {dies} (pid {pids[dies]} on {host})"
        assert expected in said
        assert "run the same command again" in said


def test_a_call_that_fails_for_want_of_a_process_says_which(fork, tmp_path):
    pids = fork(wait_for_ever, fails)
    Board(tmp_path).get("here.1")
    os.kill(pids[0], signal.SIGKILL)
    Board(tmp_path).set("dead", "")
    assert codes_of(pids) == [-9, 3]
    assert f"because process 0 (pid {pids[0]} on" in (tmp_path / "said.1").read_text()


def refuses(board: Board) -> None:
    all_are_there(board)
    raise UserError("no")


def test_a_process_that_leaves_by_an_error_takes_the_others_along(fork, tmp_path):
    assert codes_of(fork(wait_for_ever, refuses, wait_for_ever)) == [1, 2, 1]
    assert "because process 1 (pid" in (tmp_path / "said.2").read_text()


def fails_by_itself(board: Board) -> None:
    with pytest.raises(RuntimeError, match="of its own"), watched(0, 1, board):
        raise RuntimeError("of its own")


def test_an_error_that_nobody_else_caused_stays_as_it_is(fork, monkeypatch):
    monkeypatch.setattr(peers, "NOTICE_S", 0.0)
    assert codes_of(fork(fails_by_itself)) == [0]


def ends(board: Board) -> None:
    all_are_there(board)


def ends_last(board: Board) -> None:
    board.get("others")
    time.sleep(2 * peers.LEAVE_S)


@pytest.mark.parametrize("last", [0, 1])
def test_a_process_that_is_done_is_not_missed(fork, tmp_path, last):
    parts = [ends_last if rank == last else ends for rank in range(3)]
    pids = fork(*parts)
    done = [pid for rank, pid in enumerate(pids) if rank != last]
    assert codes_of(done) == [0, 0]
    Board(tmp_path).set("others", "")
    assert codes_of([pids[last]]) == [0]


def is_called_by_a_stranger(board: Board) -> None:
    port = int(board.get(peers.KEY).split()[0])
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(said)
            if said:
                assert stranger.recv(1) == b""
    time.sleep(2 * peers.LEAVE_S)


def test_strangers_are_nothing_to_it(fork):
    assert codes_of(fork(is_called_by_a_stranger, ends_soon)) == [0, 0]


def ends_soon(board: Board) -> None:
    time.sleep(2 * peers.LEAVE_S)
