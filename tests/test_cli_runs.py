"""Whole runs through `python -m pipeline`, every stage in its own process, stopped anywhere.

One run of all stages, and what happens while processes begin and end, takes interpreters of its
own; elsewhere commands and workers are forks, which have imported everything already.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from store import PredictionStore, verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pipeline"]
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}
LONG = {
    "steps": 120, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2,
    "checkpoint_every": 10, "log_every": 10,
}  # fmt: skip


@dataclass
class Command:
    """A command that runs."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            assert self.process.poll() is None, f"it ended before it was ready: {self.said}"
            time.sleep(0.005)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path):
    """Start a command in the background."""

    def run(*arguments: str | Path) -> Command:
        output = tmp_path / "said"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)], stdout=sink, stderr=sink, env=ENVIRONMENT
            )
        return Command(process, output)

    return run


@pytest.fixture(scope="module")
def done_run(whole_run, tmp_path_factory):
    """A run of every stage, and what `foretell run` said while it did them."""
    run = whole_run(tmp_path_factory.mktemp("done"))
    command = [*COMMAND, "run", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return run, done


def test_run_does_every_stage_in_order_and_says_so(done_run):
    run, done = done_run
    said = [line for line in done.stderr.splitlines() if ": started" in line]
    assert said == [
        f"{stage}: started" for stage in ("prepare", "fit", "rollout", "train:student", "evaluate")
    ]
    assert done.stderr.splitlines()[-1] == f"{run.root}: all stages are done"
    assert done.stdout == "", "standard output is for reports that were asked for"


def test_status_of_a_finished_run_is_exit_code_0(done_run, foretell):
    run, _ = done_run
    done = foretell("status", run.path, "--json")
    stages = json.loads(done.stdout)["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(
        ("prepare", "fit", "rollout", "train:student", "evaluate"), "done"
    )
    assert stages["rollout"] == {"planned": 5, "done": 5, "missing": 0, "state": "done"}
    assert all(set(s) == {"planned", "done", "missing", "state"} for s in stages.values())


def test_a_second_run_does_nothing_and_says_so(done_run, foretell):
    run, _ = done_run
    files = {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file()}
    again = foretell("run", run.path)
    assert "started" not in again.stderr, "no stage may be started"
    assert again.stderr.count(": done\n") == 5
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file()} == files


def test_settings_that_only_change_the_speed_leave_a_run_done(done_run, foretell):
    run, _ = done_run
    foretell("status", run.path, "--set", "fit.optimizer.processes=2")


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("fit.condition_dropout=0.5", "fit"),
        ("rollout.guidance.scale=3.0", "rollout"),
        ("students.student.loss.ce=1.0", "train:student"),
        ("prepare.dev_texts=3", "prepare"),
    ],
)
def test_other_settings_for_a_finished_stage_are_refused_and_nothing_is_overwritten(
    done_run, override, stage, foretell
):
    run, _ = done_run
    files = {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    done = foretell("run", run.path, "--set", override, code=2)
    assert f"{stage} of run 'tiny' was finished with other settings" in done.stderr
    assert {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()} == files
    status = foretell("status", run.path, "--json", "--set", override, code=1)
    assert json.loads(status.stdout)["stages"][stage]["state"] == "stale"


def test_a_lost_shard_is_made_again_and_nothing_else(done_run, foretell):
    import shutil

    run, _ = done_run
    lost = run.root / "store" / "shards" / "00001"
    before = {p.relative_to(lost): p.read_bytes() for p in lost.rglob("*") if p.is_file()}
    shutil.rmtree(lost)
    status = foretell("status", run.path, "--json", code=1)
    assert json.loads(status.stdout)["stages"]["rollout"]["missing"] == 1
    again = foretell("run", run.path)
    assert again.stderr.count("started") == 1
    assert {p.relative_to(lost): p.read_bytes() for p in lost.rglob("*") if p.is_file()} == before


def steps_done(folder: Path) -> int:
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    return int(names[-1].removeprefix("step_")) if names else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_fit_leaves_a_state_that_goes_on_to_the_same_weights(
    run_of, tiny_run, number, start_program, foretell
):
    fit = tiny_run.document["fit"] | {"optimizer": LONG}
    run, whole = (run_of(n, fit=fit, students=None, rollout=None) for n in ("own", "whole"))
    command = start_program("foretell", "run", run.path)
    assert command.kill_when(lambda: steps_done(run.root / "teacher") >= 20, number) == 75
    said = command.stderr.read_text()
    assert f"nothing is lost. To go on: foretell run {run.path}" in said
    assert "Traceback" not in said
    stopped_at = steps_done(run.root / "teacher")
    assert 20 <= stopped_at < 120
    status = foretell("status", run.path, "--json", code=1)
    assert json.loads(status.stdout)["stages"]["fit"] == {
        "planned": 120, "done": stopped_at, "missing": 120 - stopped_at, "state": "partial",
    }  # fmt: skip
    foretell("run", run.path)
    whole.do("fit")
    ours, theirs = (load_file(r.root / "teacher" / "model.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = json.loads((run.root / "stages" / "fit.json").read_text())
    assert record["finished"]


def test_ctrl_c_in_rollout_leaves_whole_shards_and_goes_on(
    run_of, tiny_run, start_program, foretell
):
    section = tiny_run.document["rollout"] | {
        "variations": 8, "rollouts_per_shard": 4, "batch_size": 1
    }  # fmt: skip
    run = run_of("own", fitted=True, rollout=section, students=None)
    shards = run.root / "store" / "shards"
    command = start_program("foretell", "run", run.path)

    def two() -> bool:
        return shards.exists() and len(list(shards.iterdir())) >= 2

    assert command.kill_when(two, signal.SIGINT) == 75
    assert "nothing is lost. To go on: foretell run" in command.stderr.read_text()
    store = PredictionStore.open(run.root / "store")
    assert 2 <= len(store.committed) < store.planned_shards
    assert verify(store.path).ok
    assert list((store.path / "tmp").iterdir()) == []
    foretell("run", run.path)
    assert PredictionStore.open(run.root / "store").missing() == []


def test_ctrl_c_while_a_worker_still_starts_is_a_stop_like_any_other(run_of, start, foretell):
    run = run_of("own", students=None, rollout=None)
    command = start("run", run.path)
    command.wait_for(lambda: "fit: started" in command.said)
    time.sleep(0.3)
    assert command.stop(signal.SIGINT) == 75, command.said
    assert "Traceback" not in command.said
    foretell("run", run.path)


def test_ctrl_c_in_a_stage_that_then_finishes_does_not_begin_the_next(run_of, tiny_run, start):
    fit = tiny_run.document["fit"] | {"optimizer": LONG | {"steps": 20}}
    run = run_of("own", fit=fit, students=None)
    command = start("run", run.path)
    command.wait_for((run.root / "teacher" / "model.safetensors").exists)
    code = command.stop(signal.SIGINT)
    assert code == 75, command.said
    assert "rollout: started" not in command.said
    assert "To go on: foretell run" in command.said


def test_ctrl_c_in_prepare_leaves_no_half_dataset(whole_run, tmp_path, start):
    run = whole_run(tmp_path)
    command = start("run", run.path)
    command.wait_for(lambda: run.root.exists() and any(run.root.iterdir()))
    code = command.stop(signal.SIGINT)
    assert code == 75, command.said
    assert "Traceback" not in command.said
    assert not (run.root / "teacher").exists()
    finished = (run.root / "dataset").exists()
    assert finished == (run.root / "dataset" / "dataset.json").exists()


def test_no_worker_outlives_a_command_that_was_killed(run_of, tiny_run, start):
    fit = tiny_run.document["fit"] | {"optimizer": LONG | {"steps": 100_000}}
    run = run_of("own", fit=fit, students=None, rollout=None)
    command = start("run", run.path)
    command.wait_for(lambda: steps_done(run.root / "teacher") >= 20)
    workers = children(command.process.pid)
    assert len(workers) == 1
    assert command.stop(signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker was left behind"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_when_one_worker_fails_the_others_end_and_the_message_is_its(run_of, tiny_run, foretell):
    fit = tiny_run.document["fit"] | {
        "optimizer": LONG | {"processes": 2, "learning_rate": 1e18, "clip_norm": 1e30}
    }
    run = run_of("own", fit=fit, students=None, rollout=None)
    done = foretell("run", run.path, code=1)
    assert "is not finite" in done.stderr
    assert "learning rate" in done.stderr
