"""Every benchmark ends with the one line of JSON that machines read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {"guided_decoding": ["--batch-size", "2", "--timesteps", "3", "--repeats", "1"]}
"""Arguments that make each benchmark short; a new one must be named here."""


def test_every_benchmark_is_tried():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_last_line_names_benchmark_ratios_machine_and_command(name):
    script = ROOT / "benchmarks" / f"{name}.py"
    command = [sys.executable, "-W", "error", str(script), "--json", *SMALL[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == name
    assert set(last) == {"benchmark", "ratios", "machine", "command"}
    assert all(ratio > 0 for ratio in last["ratios"].values())
