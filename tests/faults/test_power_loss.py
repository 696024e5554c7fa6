"""A shard that was reported committed is there, and sound, after the power was cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.machine import require_mount, require_program, require_root

pytestmark = pytest.mark.slow

ROUNDS = 15
MAKE = {"ext4": ("mkfs.ext4", "e2fsprogs", "-q", "-F"), "xfs": ("mkfs.xfs", "xfsprogs", "-q", "-f")}
IMAGE_BYTES = 2**29
"""Sparse: it takes what is written."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_what_was_reported_committed_survives_a_power_cut(tmp_path: Path, kind: str) -> None:
    program, package, *options = MAKE[kind]
    require_root()
    require_program(program, package)
    image, folder = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run([program, *options, str(image)], check=True)
    require_mount(folder, "-o", "loop", str(image))
    subprocess.run(["umount", str(folder)], check=True)

    script = str(Path(__file__).with_name("power_cut.py"))
    command = [sys.executable, "-W", "error", script, str(image), str(folder), str(ROUNDS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == ROUNDS
    assert [each["lost"] for each in rounds] == [[]] * ROUNDS
    assert [each["bad"] for each in rounds] == [[]] * ROUNDS
    assert sum(each["reported"] for each in rounds) > 0
