"""What a machine must have for a fault to be injected; where it has it not, a test is skipped."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def require_root() -> None:
    """Skip a test that only root can do."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")


def require_program(name: str, package: str) -> None:
    """Skip a test without a program; where CI is set, its package was forgotten: fail."""
    if shutil.which(name) is not None:
        return
    reason = f"{name} is missing: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_mount(folder: Path, *options: str) -> None:
    """Mount something at a folder, or skip with what `mount` says, as in a container."""
    require_root()
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not mount: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, of so many megabytes."""
    require_mount(folder, "-t", "tmpfs", "-o", f"size={megabytes}m", "none")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def little_memory(more_bytes: int = 2**28) -> Iterator[None]:
    """Let this process take so much more memory and no more: asking for it is a MemoryError."""
    text = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in text.splitlines())
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(lines["VmData"].split()[0]) * 1024 + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
