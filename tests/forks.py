"""Programs as forks of a process that has imported what they need, and not as new interpreters.

How `python -m pipeline` and `python -m pipeline.worker` begin, test_cli_runs.py and test_slurm.py
show. A process that calls these functions should have no threads.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import pipeline.cli  # noqa: F401, imported once, for all forks
from pipeline import entry, launch, worker
from stages.interruption import STOP_SIGNALS


def ended(program: Callable[[], int | None]) -> int:
    """Run a program as an interpreter does, and return its exit code."""
    try:
        code = program() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def redirect(descriptor: int, path: str) -> None:
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), descriptor)


def foretell(arguments: Sequence[str]) -> int:
    """Be `foretell ARGUMENTS`, its workers being forks too."""
    sys.argv = ["foretell", *arguments]
    launch.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=ForkedWorker,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    return ended(entry.main)


def script(arguments: Sequence[str]) -> int:
    """Be `python FILE ARGUMENTS`, which runs itself and `python -m pipeline` as forks too."""
    sys.argv = [*arguments]
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    subprocess.run = _run  # type: ignore[assignment]
    return ended(lambda: runpy.run_path(arguments[0], run_name="__main__") and None)


_run_afresh = subprocess.run


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run` does with a program in Python."""
    if torch.cuda.is_initialized():  # which no fork survives
        return _run_afresh(command, **options)
    match [*command]:
        case [sys.executable, "-m", "pipeline", *arguments]:
            program = foretell
        case [sys.executable, *arguments] if arguments[:1] == sys.argv[:1]:
            program = script
        case _:
            return _run_afresh(command, **options)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        pid = os.fork()
        if pid == 0:
            os.chdir(options.get("cwd") or ".")
            os.environ.update(options.get("env") or {})
            if options.get("capture_output"):
                redirect(1, paths[0])
                redirect(2, paths[1])
            os._exit(program(arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = [Path(path).read_text() if os.path.exists(path) else None for path in paths]
    done = subprocess.CompletedProcess([*command], code, *said)
    if options.get("check"):
        done.check_returncode()
    return done


class ForkedWorker:
    """A worker that `launch` starts, with what it uses of `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdin: int, process_group: int
    ) -> None:
        self.returncode: int | None = None
        assert [*command[:3]] == [sys.executable, "-m", "pipeline.worker"]
        assert stdin == subprocess.DEVNULL
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            for number in STOP_SIGNALS:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
            os.environ.clear()
            os.environ.update(env)
            redirect(0, os.devnull)
            os._exit(ended(lambda: worker.main(command[3:])))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
