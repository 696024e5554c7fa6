"""Starting the processes of a stage, passing signals on to them, and noting what they cost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.record import Usage
from stages.interruption import STOP_SIGNALS, StopRequest, held_back

FINISHED, FAILED, USAGE_ERROR, MORE_TO_DO = 0, 1, 2, 75
"""Exit codes of every command."""
GRACE_S = 20.0


def launch(
    arguments: Sequence[str], processes: int, stop: StopRequest
) -> tuple[int, float, list[Usage]]:
    """Run `python -m pipeline.worker ARGUMENTS` in data-parallel processes on this machine.

    Signals that ask for a stop are noted in `stop` and passed on, and the workers stop where
    nothing is lost. When one worker fails, the others are stopped. Returns the exit code, the
    seconds it took, and what each process needed.
    """
    started = time.monotonic()
    workers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="foretell-") as scratch, _passing_on(workers, stop):
        port = str(_free_port())
        # A signal waits until all workers are there, and a worker's until it can heed it.
        with held_back():
            workers += [
                _start(arguments, rank, processes, port, Path(scratch)) for rank in range(processes)
            ]
        code = _wait(arguments[0], workers)
        usages = [
            Usage.model_validate_json(path.read_bytes()) for path in sorted(Path(scratch).iterdir())
        ]
    return code, time.monotonic() - started, usages


def _start(
    arguments: Sequence[str], rank: int, processes: int, port: str, scratch: Path
) -> subprocess.Popen[bytes]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    place |= {"LOCAL_WORLD_SIZE": str(processes)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"FORETELL_USAGE": str(scratch / str(rank)), "FORETELL_PARENT": str(os.getpid())}
    # Idle OpenMP threads that spin would take the cores from the other processes.
    defaults = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.worker", *arguments],
        env={**defaults, **os.environ, **place},
        stdin=subprocess.DEVNULL,
        # Out of the terminal's group, so that Ctrl-C reaches a worker once, through `_passing_on`.
        process_group=0,
    )


@contextmanager
def _passing_on(workers: list[subprocess.Popen[bytes]], stop: StopRequest) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        stop.request(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(stage: str, workers: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all workers and return the exit code of the stage."""
    while any(worker.poll() is None for worker in workers) and not _failed(workers):
        time.sleep(0.05)
    _explain(stage, workers)
    by_themselves = [worker.returncode for worker in workers]
    _stop(workers)
    # What we ended says nothing; but of those that end together, one may know the cause.
    later = [max(worker.returncode, FINISHED) for worker in workers]
    return _common_code(
        [one if code is None else code for code, one in zip(by_themselves, later, strict=True)]
    )


def _failed(workers: list[subprocess.Popen[bytes]]) -> bool:
    return any(worker.returncode not in (None, FINISHED, MORE_TO_DO) for worker in workers)


def _explain(stage: str, workers: list[subprocess.Popen[bytes]]) -> None:
    """Tell of workers that were ended by a signal, which could not say so themselves."""
    for rank, worker in enumerate(workers):
        if worker.returncode is not None and worker.returncode < 0:
            name = signal.Signals(-worker.returncode).name
            others = ", so the others were stopped" if len(workers) > 1 else ""
            sys.stderr.write(
                f"{stage}: process {rank} of {len(workers)} (pid {worker.pid}) was ended by "
                f"{name}{others}. The system kills (SIGKILL) what takes the last memory. What was "
                "finished or checkpointed before is safe: run the same command again to go on\n"
            )


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ask the remaining workers to stop, and end those that do not."""
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _common_code(codes: Sequence[int]) -> int:
    """Return the exit code of a stage from those of its processes: the gravest of them."""
    if any(code < 0 for code in codes):
        return FAILED
    if USAGE_ERROR in codes:
        return USAGE_ERROR
    if set(codes) - {FINISHED, MORE_TO_DO}:
        return FAILED
    return MORE_TO_DO if MORE_TO_DO in codes else FINISHED


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
