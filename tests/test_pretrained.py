"""A teacher that was trained elsewhere takes the place of a fitted one in every stage."""

from __future__ import annotations

import json
from typing import Any, Self

import pytest
import torch

from pipeline import assembly, teachers
from stages.config import DatasetFacts
from stages.dataset import Dataset
from stages.families.codec_lm import CodecLM
from stages.family import load_family
from store import PredictionStore

pytestmark = pytest.mark.slow

ASKED: list[tuple[str, DatasetFacts, str, torch.dtype]] = []


class Elsewhere(CodecLM):
    """A family whose checkpoints come from elsewhere: here they are folders of codec_lm."""

    @classmethod
    def pretrained(
        cls, config: Any, facts: DatasetFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        ASKED.append((str(config.path), facts, device, dtype))
        return cls.load(config.path, device=device, dtype=dtype)


@pytest.fixture
def pretrained_run(tiny_run, run_of, tmp_path, monkeypatch):
    """A run whose teacher is the one of `tiny_run`, as if another program had trained it."""
    path = tmp_path / "teacher.nemo"
    path.symlink_to(tiny_run.root / "teacher", target_is_directory=True)
    for module in (assembly, teachers):
        monkeypatch.setattr(
            module, "load_family", lambda n: Elsewhere if n == "magpie" else load_family(n)
        )
    ASKED.clear()
    teacher = {"pretrained": {"family": "magpie", "path": str(path)}}
    return lambda **sections: run_of("own", teacher=teacher, fit=None, **sections)


def test_stage_one_and_evaluation_load_it_by_its_record_and_the_dataset_s_facts(
    pretrained_run, tiny_run
):
    section = tiny_run.document["rollout"] | {"precision": "bf16", "device": "cpu"}
    run = pretrained_run(
        rollout=section, students=None, evaluate=tiny_run.document["evaluate"] | {"device": "cpu"}
    )
    run.do("rollout", "evaluate")
    facts = Dataset.open(tiny_run.root / "dataset").facts
    path = str(run.path.parent / "teacher.nemo")
    # Rollout and reference in the rollout's precision, then the teacher with and without guidance.
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert [(path, facts, "cpu", dtype) for dtype in dtypes] == ASKED
    assert not (run.root / "teacher").exists()
    report = json.loads((run.root / "report" / "report.json").read_text())
    counted = Elsewhere.load(tiny_run.root / "teacher", device="cpu", dtype=torch.float32)
    counted = counted.architecture()
    for system in ("teacher_guided", "teacher_unguided"):
        assert report[system]["parameters"]["value"] == counted.parameters
        assert report[system]["flops_per_timestep"]["value"] == counted.flops_per_timestep
    assert report["codec_copy"]["parameters"] is None
    stored = PredictionStore.open(run.root / "store").manifest.fingerprints.teacher
    teacher = CodecLM.load(tiny_run.root / "teacher", device="cpu", dtype=torch.bfloat16)
    assert stored == teacher.fingerprint()


def test_a_student_inherits_from_its_file(pretrained_run, tiny_run):
    student = tiny_run.document["students"]["student"] | {
        "init": {"kind": "teacher", "layers": [1]}
    }
    student["optimizer"] = student["optimizer"] | {"steps": 1, "learning_rate": 1e-12}
    run = pretrained_run(store=str(tiny_run.root / "store"), students={"student": student},
                         rollout=None)  # fmt: skip
    run.do("train:student")
    assert ASKED == [], "stage two loads no teacher"
    ours, theirs = (
        CodecLM.load(path, device="cpu", dtype=torch.float32).module.state_dict()
        for path in (run.root / "student", tiny_run.root / "teacher")
    )
    torch.testing.assert_close(
        ours["decoder.0.feed_forward.up.weight"], theirs["decoder.1.feed_forward.up.weight"]
    )
