"""The training log: one truth in two forms, none of whose steps is lost or told twice."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.identity import identity
from stages.config import OptimizerConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.optimization import Report, postfix
from stages.training_log import TrainingLog


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def points_of_lines(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the JSON lines say, by name: (step, value as float32), in order."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in lines_of(folder):
        step = int(record.pop("step"))
        for name, value in record.items():
            curves.setdefault(name, []).append((step, float(np.float32(value))))
    return curves


def points_of_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture
def tensorboard(require) -> None:
    require("tensorboard", "pip install 'foretell[tensorboard]'")


@pytest.mark.usefixtures("tensorboard")
def test_attempts_are_one_curve_in_both_forms(tmp_path):
    for attempt, begun in enumerate([0, 5, 4, 7]):  # the checkpoint of step 5 was damaged
        log = TrainingLog(tmp_path / "log.jsonl", begun)
        for step in range(begun + 1, begun + 5):
            log.write(step, total=step + attempt / 7, rate=0.1 * step)
            if step % 2 == 0:
                log.write(step, dev_ce=step / 3)
        assert points_of_events(tmp_path) == points_of_lines(tmp_path)
    assert [step for step, _ in points_of_events(tmp_path)["total"]] == list(range(1, 12))
    values = dict(points_of_events(tmp_path)["total"])
    assert values[6] == float(np.float32(6 + 2 / 7)), "of the third attempt, not of the second"


@pytest.mark.usefixtures("tensorboard")
def test_what_was_logged_before_tensorboard_was_installed_is_in_its_curves(tmp_path, monkeypatch):
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "tensorboard.compat.proto", None)
        log = TrainingLog(tmp_path / "log.jsonl", 0)
        for step in range(1, 6):
            log.write(step, total=1 / step)
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    TrainingLog(tmp_path / "log.jsonl", 3).write(4, total=9.0)
    assert points_of_events(tmp_path) == points_of_lines(tmp_path)
    assert [step for step, _ in points_of_events(tmp_path)["total"]] == [1, 2, 3, 4]


def test_a_person_is_told_where_the_log_is_and_what_curves_need(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "runs" / "mine" / "student" / "log.jsonl"
    TrainingLog(path, 0, tensorboard=False)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    TrainingLog(path, 0)
    bare, advised = (record.getMessage() for record in caplog.records)
    assert bare == f"training log: {path}"
    assert advised == (
        f"training log: {path}; for curves in TensorBoard: pip install 'foretell[tensorboard]'"
    )
    with pytest.raises(UserError, match=r"need the package tensorboard, .*foretell\[tensorboard"):
        TrainingLog(path, 0, tensorboard=True)


@pytest.mark.usefixtures("tensorboard")
def test_a_person_is_told_how_curves_are_looked_at_and_may_do_without(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "mine" / "student" / "log.jsonl"
    TrainingLog(path, 0, tensorboard=False)
    assert [found.name for found in path.parent.iterdir()] == ["log.jsonl"]
    TrainingLog(path, 0)
    said = caplog.records[-1].getMessage()
    assert said == f"training log: {path}; its curves: tensorboard --logdir {tmp_path / 'mine'}"


def test_how_it_is_logged_changes_nothing_that_a_stage_depends_on():
    plain = identity(OptimizerConfig(steps=3))
    assert identity(OptimizerConfig(steps=3, tensorboard=True, log_every=1)) == plain
    assert identity(OptimizerConfig(steps=4)) != plain


def test_a_narrow_terminal_keeps_the_total_and_the_wait_for_data():
    shown = postfix({"ce": 2.0, "kl": 0.012345678, "total": 1.5}, 0.034)
    assert shown == "total 1.5, data wait 3%, ce 2, kl 0.01235"


def test_of_several_processes_only_the_leading_one_logs(tmp_path):
    for rank in (1, 0):
        place = Place(rank, 2, torch.device("cpu"))
        Report(tmp_path / str(rank) / "log.jsonl", OptimizerConfig(steps=3), place, 0).close()
        assert (tmp_path / str(rank)).exists() == (rank == 0)
