"""Rounds: a student that is trained teaches the next, in one configuration, in order, resumable."""

from __future__ import annotations

import json
import signal
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import load_config
from pipeline.folders import RunFolders
from pipeline.progress import stage_identity, stages_of
from stages.dataset import Dataset
from stages.errors import UserError
from stages.family import load_family
from store import PredictionStore, verify


@pytest.fixture
def chain(tiny_run, run_of):
    """Write the configuration of two rounds: `second` learns from what `student` has learnt."""

    def make(name: str = "chain", **sections: Any) -> Any:
        student = tiny_run.document["students"]["student"]
        second = student | {"round": "again", "init": {"kind": "teacher"}}
        given = {
            "rounds": {"again": {"teacher": "student"}},
            # Written in another order than that of the work.
            "students": {"second": second, "student": student},
        }
        return run_of(name, fitted=True, **given | sections)

    return make


# ---- configurations


def test_stages_come_in_the_order_of_what_they_depend_on(chain, tiny_run):
    config = chain(evaluate=tiny_run.document["evaluate"]).load()
    assert stages_of(config) == [
        "rollout", "train:student", "rollout:again", "train:second", "evaluate",
    ]  # fmt: skip
    third = tiny_run.document["students"]["student"] | {"round": "last"}
    more = (
        "rounds.last.teacher=second", "rounds.unused.teacher=student",
        f"students.third={json.dumps(third)}",
    )  # fmt: skip
    assert stages_of(chain().load(*more)) == [
        "rollout", "train:student", "rollout:again", "train:second",
        "rollout:last", "train:third", "rollout:unused",
    ]  # fmt: skip


def test_a_chain_may_begin_at_a_store_that_is_there(chain, tiny_run):
    own = tiny_run.document["rollout"] | {"guidance": {"scale": 1}}
    run = chain(
        store=str(tiny_run.root / "store"), rollout=None,
        rounds={"again": {"teacher": "student", "rollout": own}},
    )  # fmt: skip
    assert stages_of(run.load()) == ["train:student", "rollout:again", "train:second"]


def test_a_round_takes_the_settings_of_the_run_without_guidance_or_its_own(chain, tiny_run):
    config = chain().load()
    taken, run_own = config.rollout_of("again"), config.rollout
    assert (taken.guidance.scale, run_own.guidance.scale) == (1, 2)
    assert taken.model_copy(update={"guidance": run_own.guidance}) == run_own
    section = tiny_run.document["rollout"] | {"guidance": {"scale": 1}, "variations": 5}
    own = chain(rounds={"again": {"teacher": "student", "rollout": section}}).load()
    assert own.rollout_of("again").variations == 5
    assert own.rollout_of(None).variations == 2


def test_every_round_has_folders_of_its_own(chain):
    folders = RunFolders(chain().load())
    assert folders.store_of(None) == folders.store == folders.root / "store"
    assert folders.store_of("again") == folders.root / "store_again"
    assert folders.draws_of("again") == folders.root / "draws_again"


ITSELF = "students.student.round=again"
BAD = {
    "no such teacher": (["rounds.again.teacher=nobody"], "rounds.again.teacher is 'nobody', which"),
    "no such round": (["students.second.round=later"], "is 'later', which is no round: give one"),
    "itself": ([ITSELF], "student 'student' would learn from itself (student <- student)"),
    "in a circle": (
        [ITSELF, "rounds.again.teacher=third", "rounds.loop.teacher=student",
         "students.third={round: loop, model: {family: codec_lm}, optimizer: {steps: 1}}"],
        "student 'student' would learn from itself (student <- third <- student)",
    ),
    "a path": (["rounds={../up: {teacher: student}}"], "'../up' is not a round name"),
    "guided": (
        ["rounds.again.rollout={sampler: {}, guidance: {scale: 2}}"],
        "rounds.again rolls out with guidance.scale 2.0, but its teacher is a student",
    ),
    "both branches": (
        ["rollout.target={kind: hidden, branches: both}"],
        "rounds.again rolls out with target.branches: both",
    ),
    "settings from nowhere": (
        ["rollout=null", "store=s"], "rounds.again.rollout is null, and there is no section",
    ),
    "a loss that the round's store will not teach": (
        ["rounds.again.rollout={sampler: {}, guidance: {scale: 1}}",
         "rounds.again.rollout.target={kind: sampled, draws: 8}"],
        "students.second.loss.kl=1.0: it needs the teacher's probabilities",
    ),
    "an unknown key": (["rounds.again.tacher=x"], "rounds.again.tacher: unknown key; did you mean"),
    "a deep unknown key": (
        ["rounds.again.rollout={sampler: {temprature: 1}}"],
        "rounds.again.rollout.sampler.temprature: unknown key; did you mean 'temperature'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_chain_that_cannot_be_worked_off_is_refused_by_name(chain, case):
    overrides, words = BAD[case]
    with pytest.raises(UserError) as caught:
        chain().load(*overrides)
    assert words in str(caught.value)


LATER = {"rollout:again", "train:second"}
DEPENDS = {
    "students.student.optimizer.steps=7": {"train:student", *LATER},
    "rollout.variations=3": {"rollout", "train:student", *LATER},
    "rollout.guidance.scale=3": {"rollout", "train:student", *LATER},
    "students.second.optimizer.steps=7": {"train:second"},
    "students.second.round=null": {"train:second"},
    "students.student.loader.workers=1": set(),
    "rounds.again.rollout={sampler: {}, guidance: {scale: 1}}": LATER,
    "rounds.unused.teacher=student": set(),
}


@pytest.mark.parametrize("override", DEPENDS)
def test_a_change_makes_what_comes_later_stale_and_nothing_else(chain, override):
    plain, changed = chain().load(), chain().load(override)
    stages = stages_of(plain)
    stale = {s for s in stages if stage_identity(plain, s) != stage_identity(changed, s)}
    assert stale == DEPENDS[override]


def test_models_without_adapters_have_none_to_merge(chain):
    run = chain()
    run.do("rollout")
    with pytest.raises(UserError, match="family 'codec_lm' have no adapters to merge: use 'teach"):
        run.do("train:student", overrides=("students.student.init.kind=merged",))


# ---- runs


def test_the_student_is_the_teacher_of_its_round_and_the_next_begins_as_it(chain):
    full = "rollout.target={kind: full, dtype: float32}"
    run = chain()
    run.do("rollout", "train:student", "rollout:again", "train:second", overrides=(full,))
    config = run.load(full)
    folders = RunFolders(config)
    store = PredictionStore.open(folders.store_of("again"))
    assert verify(store.path).ok
    student = load_family("codec_lm").load(
        folders.student("student"), device="cpu", dtype=torch.float32
    )
    assert store.manifest.fingerprints.teacher == student.fingerprint()
    first = PredictionStore.open(folders.store)
    assert first.manifest.fingerprints.teacher != student.fingerprint()
    assert (first.manifest.guidance.scale, store.manifest.guidance.scale) == (2, 1)
    samples = {s["sample_id"]: s for s in Dataset.open(folders.dataset).samples("train")}
    for key in list(store)[:4]:
        codes = torch.from_numpy(store[key].codes.astype(np.int64))[None]
        lengths = torch.tensor([codes.shape[1]])
        with torch.no_grad():
            logits = student.score([samples[key[0]]], codes, lengths).logits[0]
        logits[..., list(student.forbidden)] = -torch.inf
        stored = torch.from_numpy(store[key].arrays["full.logits"].astype(np.float32))
        torch.testing.assert_close(stored.softmax(-1), logits.softmax(-1), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_next_student_reads_the_student_of_the_round_and_never_the_teacher(
    chain, start_worker, tmp_path
):
    run = chain()
    run.do("rollout", "train:student")
    read = {}
    for stage in ("rollout:again", "train:second"):
        seen = tmp_path / "seen.json"
        worker = start_worker(stage, run, observe=str(seen))
        assert worker.wait() == 0, worker.stderr.read_text()
        found = json.loads(seen.read_text())
        assert [network["decoder_layers"] for network in found["networks"]] == [1]
        read[stage] = list(found["files"])
    student = str(run.root / "student" / "model.safetensors")
    assert read == {"rollout:again": [student], "train:second": [student]}


def test_a_round_before_its_turn_says_what_is_missing(chain):
    run = chain()
    with pytest.raises(UserError, match="holds no finished model"):
        run.do("rollout:again")
    with pytest.raises(UserError, match=r"store_again is not there yet.*--round again"):
        run.do("train:second")


@pytest.mark.slow
def test_an_on_policy_round_draws_with_one_student_and_is_scored_by_another(
    chain, tiny_run, foretell
):
    section = tiny_run.document["rollout"] | {
        "guidance": {"scale": 1}, "source": "student", "student": str(tiny_run.root / "student"),
    }  # fmt: skip
    run = chain(rounds={"again": {"teacher": "student", "rollout": section}})
    run.do("rollout", "train:student")
    foretell("rollout", run.path, "--round", "again")
    store = PredictionStore.open(run.root / "store_again")
    prints = store.manifest.fingerprints
    family, drawer = (
        load_family("codec_lm").load(path / "student", device="cpu", dtype=torch.float32)
        for path in (run.root, tiny_run.root)
    )
    assert (prints.teacher, prints.student) == (family.fingerprint(), drawer.fingerprint())
    assert not (run.root / "draws").exists()
    stages = {path.name for path in (run.root / "stages").iterdir()}
    assert stages >= {"draw:again.json", "rollout:again.json"}


LONG = {
    "steps": 60, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2,
    "checkpoint_every": 5, "log_every": 10,
}  # fmt: skip


@pytest.mark.slow
def test_a_chain_that_was_killed_anywhere_ends_with_the_same_bytes(
    chain, tiny_run, start_worker, foretell
):
    student = tiny_run.document["students"]["student"]
    second = student | {"round": "again", "init": {"kind": "teacher"}, "optimizer": LONG}
    sections = {
        "rollout": tiny_run.document["rollout"] | {"rollouts_per_shard": 4, "batch_size": 1},
        "students": {"second": second, "student": student},
    }
    whole, killed = chain("whole", **sections), chain("killed", **sections)
    whole.do("rollout", "train:student", "rollout:again", "train:second")

    killed.do("rollout", "train:student")
    shards = killed.root / "store_again" / "shards"

    def committed() -> int:
        return len(list(shards.iterdir())) if shards.exists() else 0

    worker = start_worker("rollout:again", killed)
    assert worker.kill_when(lambda: committed() >= 2, signal.SIGKILL) == -signal.SIGKILL
    assert 2 <= committed() < 10
    stages = json.loads(foretell("status", killed.path, "--json", code=1).stdout)["stages"]
    assert stages["rollout:again"]["state"] == "partial"
    assert stages["train:second"] == {"planned": 60, "done": 0, "missing": 60, "state": "missing"}

    killed.do("rollout:again")
    folder = killed.root / "student_second"
    worker = start_worker("train:second", killed)
    reached = (folder / "checkpoints" / "step_00000010").exists
    assert worker.kill_when(reached, signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()

    again = foretell("run", killed.path)
    said = [line for line in again.stderr.splitlines() if ": started" in line]
    assert said == [f"{stage}: started" for stage in stages_of(killed.load())]
    for name in ("student", "student_second"):
        ours, theirs = (r.root / name / "model.safetensors" for r in (killed, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    foretell("status", killed.path)

    changed = "students.student.optimizer.steps=7"
    stale = foretell("run", killed.path, "--set", changed, code=2)
    assert "train:student of run 'killed' was finished with other settings" in stale.stderr


@pytest.mark.slow
def test_all_students_are_compared_with_the_first_teacher_guided(chain, tiny_run):
    run = chain(evaluate=tiny_run.document["evaluate"])
    run.do("rollout", "train:student", "rollout:again", "train:second", "evaluate")
    report = json.loads((run.root / "report" / "report.json").read_text())
    assert {"teacher_guided", "student", "student_second"} <= report.keys()
    paths = (run.root / "report" / "reference", run.root / "store")
    reference, first = (PredictionStore.open(path).manifest for path in paths)
    assert reference.fingerprints.teacher == first.fingerprints.teacher
    assert reference.guidance.scale == first.guidance.scale == 2


def test_the_command_line_refuses_a_round_that_is_not_there(chain, foretell):
    done = foretell("rollout", chain().path, "--round", "never", code=2)
    assert "has no section for the stage 'rollout:never'" in done.stderr


def test_a_configuration_with_rounds_survives_json(chain):
    config = chain().load()
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config
    assert load_config(chain().path) == config
