"""Scripts of jobs and what is asked of Slurm, whose commands are stood in for by small programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli import fit
from pipeline.cluster_config import ClusterConfig, JobConfig
from pipeline.config import load_config
from pipeline.job_scripts import JobScripts, ranges
from pipeline.launch import FAILED, FINISHED, MORE_TO_DO
from pipeline.progress import needs, progress, stage_identity, stages_of
from pipeline.record import StageRecord, Usage, read_record, write_record
from pipeline.results import stage_costs
from pipeline.run import own_code
from pipeline.slurm import QueueEntry, queue, requeue_if_asked
from pipeline.status import run_status, span, status_text
from pipeline.submission import read_jobs, resubmit, submission_text, submit
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.report_schema import StageCost
from tests.conftest import ROOT, write_run
from tests.slurm_stand_in import StandIn, stand_in

pytestmark = pytest.mark.slow

HOSTILE = "rollout.split=a b'c\"d $(touch pwned) `touch pwned`;\\ \n#SBATCH --x\n*"
SHOWING = (
    "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('FORETELL_SIGNAL')]))"
)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> StandIn:
    return stand_in(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def job_run(run_of, tiny_run):
    """A run of a fitted teacher, none of whose stages is begun."""

    def make(**cluster):
        sections = {"evaluate": tiny_run.document["evaluate"], "cluster": cluster or None}
        return run_of(fitted=True, **sections)

    return make


def script_of(run, stage: str = "rollout", array=(0, 1), overrides=(), tasks=4, limit=None) -> str:
    config = run.load(*overrides)
    return JobScripts(config, run.path, overrides, tasks, limit).text(stage, array)


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line[:8]]


# ---- scripts


def test_a_script_asks_for_what_the_configuration_says(job_run):
    run = job_run(
        partition="gpu,big", account="lab-1", cpus=3, memory="32G", time="1-12", grace_s=60,
        options=["--constraint=a100", "--exclusive"],
        stages={"train": {"gpus": 2, "partition": None}, "train:student": {"memory": "64G"}},
    )  # fmt: skip
    rollout = options_of(script_of(run, tasks=6, limit=2))
    assert rollout[1:] == [
        f'--chdir="{Path.cwd()}"',
        f'--output="{run.root}/logs/rollout_%A_%a.out"',
        "--open-mode=append", "--requeue", "--signal=B:USR1@60", "--array=0-1%2",
        "--partition=gpu,big", "--account=lab-1", "--cpus-per-task=3", "--mem=32G", "--time=1-12",
        "--constraint=a100", "--exclusive",
    ]  # fmt: skip
    train = options_of(script_of(run, "train:student", ()))
    assert "--gres=gpu:2" in train
    assert "--mem=64G" in train
    assert not any(option.startswith(("--partition", "--array")) for option in train)
    assert f'--output="{run.root}/logs/train-student_%j.out"' in train


def test_the_number_of_tasks_stands_in_the_script_whichever_of_them_it_asks_for(job_run):
    text = script_of(job_run(), array=(3, 7), tasks=8)
    assert "#SBATCH --array=3,7\n" in text
    assert text.endswith('--task "$SLURM_ARRAY_TASK_ID" --tasks 8\n')


def test_nothing_of_a_hostile_word_is_executed(job_run, tmp_path):
    run = job_run(python=[sys.executable, "-c", SHOWING, "it's; touch pwned"])
    text = JobScripts(run.load(), run.path, [HOSTILE], 4, None).text("rollout", (0,))
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"},
    )  # fmt: skip
    words, early = json.loads(done.stdout)
    assert words == [
        "it's; touch pwned", "-m", "pipeline", "rollout", str(run.path), "--set", HOSTILE,
        "--task", "0", "--tasks", "4",
    ]  # fmt: skip
    assert early is None
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_in_the_preamble_reaches_python(job_run, number):
    name = number.name.removeprefix("SIG")
    run = job_run(
        python=[sys.executable, "-c", SHOWING], preamble=[f"kill -{name} $$", "export LATER=1"]
    )
    done = subprocess.run(
        ["bash", "-c", script_of(run)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)[1] == name


def test_a_signal_while_python_begins_waits_for_it(job_run):
    blocked = (
        "import json, signal; blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []);"
        "print(json.dumps([{signal.SIGUSR1, signal.SIGTERM} <= blocked, "
        "signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN]))"
    )
    run = job_run(python=[sys.executable, "-c", blocked])
    done = subprocess.run(
        ["bash", "-c", script_of(run)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [True, True]


def test_a_folder_that_slurm_cannot_take_is_refused(run_of):
    run = run_of(fitted=True, runs="runs\\x")
    with pytest.raises(UserError, match="backslash"):
        script_of(run)


def test_training_on_several_nodes_tells_each_process_its_place(job_run, tiny_run, run_of):
    student = dict(tiny_run.document["students"]["student"])
    student["optimizer"] = student["optimizer"] | {"processes": 2}
    run = run_of(
        fitted=True,
        students={"student": student},
        cluster={
            "cpus": 3,
            "stages": {"train": {"nodes": 2}},
            "python": [
                sys.executable,
                "-c",
                "import json, os; print(json.dumps(dict(os.environ)))",
            ],
        },
    )
    text = script_of(run, "train:student", ())
    assert {"--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(options_of(text))
    place = 'SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"'
    srun = f'srun() {{ echo "$1" >&2; shift 2; {place}; exit; }}'
    text = text.replace("exec srun", "srun").replace("#!/bin/bash\n", f"{srun}\n")
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True,
        env=os.environ | {"SLURM_JOB_ID": "30007", "MASTER_ADDR": "n1"},
    )  # fmt: skip
    expected = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "30007", "FORETELL_JOB": "1",
    }  # fmt: skip
    found = json.loads(done.stdout)
    assert {name: found.get(name) for name in expected} == expected
    assert done.stderr == "--cpus-per-task=3\n"
    alone = options_of(script_of(run, "rollout"))
    assert "--cpus-per-task=3" in alone


def test_processes_on_one_node_share_one_task_of_slurm(job_run, run_of, tiny_run):
    student = dict(tiny_run.document["students"]["student"])
    student["optimizer"] = student["optimizer"] | {"processes": 2}
    run = run_of(fitted=True, students={"student": student}, cluster={"cpus": 3})
    text = script_of(run, "train:student", ())
    assert "--cpus-per-task=6" in options_of(text)
    assert "srun" not in text


def test_ranges():
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert ranges([5]) == "5"


# ---- configuration


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("partition", "gpu --wrap=x", "it stands in an #SBATCH line"),
        ("account", "a\nb", "it stands in an #SBATCH line"),
        ("memory", "much", "write for example 32G"),
        ("time", "soon", "write for example 04:00:00"),
        ("options", ["-p gpu"], "write --constraint=a100"),
        ("options", ["--wrap='rm x'"], "write --constraint=a100"),
        ("preamble", ["a\nb"], "give each line by itself"),
        ("stages", {"trian": {}}, "a key of stages is 'trian'"),
        ("stages", {"train:studnet": {"gpus": 2}}, "give one of train:student"),
        ("stages", {"rollout:again": {"gpus": 2}}, "give one of rollout"),
        ("stages", {"evaluate:all": {"gpus": 2}}, "give one of evaluate"),
        ("stages", {"rollout": {"nodes": 2}}, "raise tasks instead"),
        ("nodes", 2, "give it in stages.train"),
        ("tasks", 0, "greater than or equal to 1"),
    ],
)
def test_a_mistake_in_the_section_cluster_is_named(run_of, key, value, said):
    run = run_of(fitted=True, cluster={key: value})
    with pytest.raises(UserError, match="is not a valid configuration") as error:
        load_config(run.path)
    assert "cluster" in str(error.value)
    assert said in str(error.value)


def test_fitting_on_several_nodes_is_done_by_the_processes_that_srun_started(run_of, monkeypatch):
    run = run_of()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("pipeline.run.launch", None)  # it would start others
    before = dict(os.environ)
    with pytest.raises(typer.Exit) as ended:
        fit(run.path)
    assert dict(os.environ) == before, "what is started later would inherit it"
    assert ended.value.exit_code == FINISHED
    assert progress(run.load(), "fit").state == "done"


def test_of_several_processes_that_stop_one_says_so(monkeypatch):
    """srun ends the others at the first code that is not 0, also while they write."""
    assert own_code(MORE_TO_DO) == MORE_TO_DO
    for rank, expected in (("0", [FINISHED, FAILED, MORE_TO_DO]), ("1", [FINISHED, FAILED, 0])):
        monkeypatch.setenv("RANK", rank)
        assert [own_code(code) for code in (FINISHED, FAILED, MORE_TO_DO)] == expected


def test_what_a_stage_is_given_replaces_what_all_are_given():
    config = ClusterConfig(
        memory="1G", gpus=1, stages={"train": JobConfig(memory="2G"), "train:a": JobConfig(gpus=0)}
    )
    assert config.job("rollout") == JobConfig(memory="1G", gpus=1)
    assert config.job("train:b") == JobConfig(memory="2G", gpus=1)
    assert config.job("train:a") == JobConfig(memory="2G", gpus=0)


def test_the_section_cluster_leaves_finished_stages_done(tiny_run):
    ours, theirs = tiny_run.load(), tiny_run.load("cluster.partition=p", "cluster.heartbeat_s=3")
    stages = stages_of(ours)
    assert [stage_identity(ours, s) for s in stages] == [stage_identity(theirs, s) for s in stages]


def test_a_stage_waits_for_what_it_needs_alone(whole_run, tmp_path, tiny_run):
    student = tiny_run.document["students"]["student"]
    students = {"student": student, "second": student | {"round": "again"}}
    run = whole_run(tmp_path, students=students, rounds={"again": {"teacher": "student"}})
    config = run.load()
    assert {stage: needs(config, stage) for stage in stages_of(config)} == {
        "prepare": [],
        "fit": ["prepare"],
        "rollout": ["prepare", "fit"],
        "train:student": ["rollout"],
        "rollout:again": ["train:student"],
        "train:second": ["rollout:again"],
        "evaluate": ["prepare", "fit", "rollout", "train:student", "train:second"],
    }


# ---- submitting


def test_submit_gives_every_stage_that_is_not_done_to_slurm(job_run, slurm):
    run = job_run(tasks=3, max_running=2)
    done = submit(run.path, ["seed=1"], run.load("seed=1"), StopRequest())
    jobs = run.root / "jobs"
    asked = [call for call in slurm.calls() if call.startswith("sbatch")]
    assert asked == [
        f"sbatch --parsable {jobs}/rollout.sh",
        f"sbatch --parsable --dependency=afterany:11 {jobs}/train-student.sh",
        f"sbatch --parsable --dependency=afterany:11:12 {jobs}/evaluate.sh",
    ]
    assert [job.job_id for job in done.values()] == [11, 12, 13]
    assert "--array=0-2%2" in (jobs / "rollout.sh").read_text()
    assert "--set seed=1" in (jobs / "evaluate.sh").read_text()
    noted = read_jobs(run.load())
    assert (noted.tasks, noted.max_running, noted.overrides) == (3, 2, ("seed=1",))
    assert (run.root / "logs").is_dir()
    assert submission_text(done).splitlines()[1] == "train:student: job 12, after rollout"


def test_a_dry_run_writes_scripts_and_submits_nothing(job_run, slurm):
    run = job_run()
    done = submit(run.path, (), run.load(), StopRequest(), tasks=2, dry_run=True)
    assert slurm.calls() == []
    assert (run.root / "jobs" / "evaluate.sh").exists()
    assert read_jobs(run.load()) is None
    assert done["train:student"].command == (
        f"sbatch --parsable '--dependency=afterany:<rollout>' {run.root}/jobs/train-student.sh"
    )


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PENDING", "Dependency"), ("RUNNING", "None"), ("PENDING", "JobHeldUser")],
)
def test_a_second_submission_is_refused_while_jobs_are_in_the_queue(job_run, slurm, state, reason):
    run = job_run()
    submit(run.path, (), run.load(), StopRequest())
    slurm.show((12, "N/A", state, reason, 0, "own:train:student"))
    with pytest.raises(UserError, match=r"'own' has jobs in the queue: train:student \(12\)"):
        submit(run.path, (), run.load(), StopRequest())
    slurm.show((12, "N/A", state, reason, 0, "other:train:student"))
    submit(run.path, (), run.load(), StopRequest())  # the number came again, for another's job
    slurm.show((15, "N/A", "COMPLETED", "None", 0, "own:train:student"))
    submit(run.path, (), run.load(), StopRequest())


def test_what_was_submitted_before_slurm_failed_is_noted(job_run, slurm):
    run = job_run()
    slurm.program("sbatch").write_text(
        '#!/bin/bash\n[ -e "$0.once" ] && { echo "error: no more" >&2; exit 1; }\n'
        'touch "$0.once"; echo "41;cluster"\n'
    )
    with pytest.raises(UserError, match=r"error: no more; submitted before that: 41\. To"):
        submit(run.path, (), run.load(), StopRequest())
    assert {stage: job[0].job_id for stage, job in read_jobs(run.load()).jobs.items()} == {
        "rollout": 41
    }


def test_the_id_stands_in_the_last_line_whatever_a_site_says_before_it(job_run, slurm):
    run = job_run()
    slurm.program("sbatch").write_text(
        "#!/bin/bash\necho 'Welcome to 7 nodes'; echo '41;cluster'\n"
    )
    assert submit(run.path, (), run.load(), StopRequest())["rollout"].job_id == 41
    slurm.program("sbatch").write_text("#!/bin/bash\necho Submitted\n")
    with pytest.raises(
        UserError, match="sbatch gave an answer that is not understood: 'Submitted'"
    ):
        submit(run.path, (), run.load(), StopRequest())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_submission_that_is_stopped_notes_what_slurm_has_taken(job_run, slurm, number):
    run = job_run()
    program = slurm.program("sbatch")
    taken = program.read_text()
    program.write_text(taken.replace("cat next;;", f"cat next; kill -{int(number)} $PPID;;"))
    stopped = foretell("submit", run.path)
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stdout == "rollout: job 11, tasks 0\n"
    assert stopped.stderr == (
        f"stopped: stages that are not named were not submitted: foretell resubmit {run.path}\n"
    )
    program.write_text(taken)
    slurm.show((11, 0, "PENDING", "Priority", 0, "own:rollout"))
    rest = foretell("resubmit", run.path)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.splitlines() == [
        "train:student: job 12, after rollout", "evaluate: job 13, after rollout, train:student",
    ]  # fmt: skip


def foretell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_run_of_a_diffusion_model_is_submitted_in_the_same_way(tmp_path, slurm):
    document = {
        "kind": "diffusion", "name": "own", "runs": str(tmp_path / "runs"),
        "prepare": {
            "source": "images", "encoder": {"kind": "pixels"}, "buckets": {"sizes": [[8, 8]]}
        },
        "teacher": {"pretrained": {"path": "pipeline"}}, "rollout": {},
        "students": {
            "student": {
                "model": {"pipeline": "pipeline"}, "loss": {"guidance_scale": 2.0},
                "init": {"kind": "pipeline"}, "optimizer": {"steps": 9, "batch_size": 4},
            }
        },
    }  # fmt: skip
    run = write_run(document, tmp_path)
    done = submit(run.path, (), run.load(), StopRequest(), tasks=3)
    assert {stage: job.after for stage, job in done.items()} == {
        "prepare": (), "rollout": ("prepare",), "train:student": ("rollout",),
    }  # fmt: skip
    text = (run.root / "jobs" / "rollout.sh").read_text()
    assert "#SBATCH --array=0-2\n" in text
    assert text.endswith(f'rollout {run.path} --task "$SLURM_ARRAY_TASK_ID" --tasks 3\n')
    slurm.show(
        (11, "N/A", "COMPLETED", "None", 1, "own:prepare"),
        (12, 0, "RUNNING", "None", 0, "own:rollout"),
        (12, 1, "FAILED", "NonZeroExitCode", 0, "own:rollout"),
        (12, 2, "PENDING", "Resources", 0, "own:rollout"),
        (13, "N/A", "PENDING", "Dependency", 0, "own:train:student"),
    )
    jobs = run_status(run.load()).jobs["rollout"]
    assert (jobs.running, jobs.pending, jobs.failed) == (1, 1, ("12_1",))
    again = resubmit(run.path, (), run.load(), StopRequest())
    assert {stage: job.tasks for stage, job in again.items()} == {"prepare": (), "rollout": (1,)}


def test_without_slurm_it_is_said_what_is_missing(job_run, monkeypatch):
    run = job_run()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        submit(run.path, (), run.load(), StopRequest())


def test_resubmit_takes_lost_tasks_and_lets_what_waits_wait_for_them(
    job_run, run_of, tiny_run, slurm
):
    run = job_run(tasks=4)
    submit(run.path, (), run.load(), StopRequest())
    run.do("rollout")  # 5 shards
    for shard in (1, 2, 3):
        shutil.rmtree(run.root / "store" / "shards" / f"0000{shard}")
    slurm.show(
        (11, 0, "COMPLETED", "None", 0, "own:rollout"),
        (11, 1, "FAILED", "NonZeroExitCode", 0, "own:rollout"),
        (11, 2, "RUNNING", "None", 0, "own:rollout"),
        (11, 3, "PENDING", "launch failed requeued held", 1, "own:rollout"),
        (12, "N/A", "PENDING", "Dependency", 0, "own:train:student"),
    )
    slurm.forget()
    done = resubmit(run.path, (), run.load(), StopRequest())
    assert done["rollout"].tasks == (1,)
    assert "--array=1\n" in (run.root / "jobs" / "rollout.sh").read_text()
    assert "--tasks 4" in (run.root / "jobs" / "rollout.sh").read_text()
    jobs = run.root / "jobs"
    assert [call for call in slurm.calls() if not call.startswith("squeue")] == [
        f"sbatch --parsable {jobs}/rollout.sh",
        "scontrol update JobId=12 Dependency=afterany:11:14",
        f"sbatch --parsable --dependency=afterany:11:14:12 {jobs}/evaluate.sh",
    ]
    noted = read_jobs(run.load()).jobs
    assert [job.job_id for job in noted["rollout"]] == [11, 14]
    assert [job.job_id for job in noted["evaluate"]] == [13, 15]


def test_resubmit_with_everything_at_work_does_nothing(job_run, slurm):
    run = job_run(tasks=1)
    submit(run.path, (), run.load(), StopRequest())
    slurm.show(
        (11, 0, "RUNNING", "None", 0, "own:rollout"),
        (12, "N/A", "PENDING", "Dependency", 0, "own:train:student"),
        (13, "N/A", "PENDING", "Dependency", 0, "own:evaluate"),
    )
    assert resubmit(run.path, (), run.load(), StopRequest()) == {}


def test_resubmit_wants_the_settings_of_submit(job_run, slurm):
    run = job_run()
    with pytest.raises(UserError, match="nothing of run 'own' was submitted"):
        resubmit(run.path, (), run.load(), StopRequest())
    submit(run.path, ["rollout.batch_size=2"], run.load("rollout.batch_size=2"), StopRequest())
    with pytest.raises(UserError, match=r"with --set \['rollout.batch_size=2'\], not \[\]"):
        resubmit(run.path, (), run.load(), StopRequest())


def test_a_damaged_list_of_jobs_is_named(job_run):
    run = job_run()
    (run.root / "jobs").mkdir(parents=True)
    (run.root / "jobs" / "jobs.json").write_text('{"tasks": "many"}')
    with pytest.raises(UserError, match=r"jobs.json does not list jobs"):
        run_status(run.load())


# ---- the queue and what status says


@pytest.mark.parametrize(
    ("state", "reason", "condition"),
    [
        ("RUNNING", "None", "running"),
        ("COMPLETING", "None", "running"),
        ("PENDING", "Resources", "pending"),
        ("PENDING", "BeginTime", "pending"),
        ("PENDING", "JobHeldUser", "held"),
        ("PENDING", "launch failed requeued held", "held"),
        ("REQUEUE_HOLD", "job requeued in held state", "held"),
        ("COMPLETED", "None", "completed"),
        ("FAILED", "NonZeroExitCode", "failed"),
        ("NODE_FAIL", "None", "failed"),
        ("CANCELLED", "None", "failed"),
        ("A_WORD_OF_TOMORROW", "None", "failed"),
    ],
)
def test_conditions(slurm, state, reason, condition):
    slurm.show((7, 3, state, reason, 2, "own:rollout"))
    (entry,) = queue()
    assert entry == QueueEntry(
        job_id=7, task=3, name="own:rollout", state=state, reason=reason, requeues=2, elapsed="1:00"
    )
    assert (entry.condition, entry.label) == (condition, "7_3")


def test_status_joins_store_and_queue(job_run, slurm):
    run = job_run(tasks=4)
    submit(run.path, (), run.load(), StopRequest())
    run.do("rollout")
    shutil.rmtree(run.root / "store" / "shards" / "00001")
    for number, shard in enumerate(sorted((run.root / "store" / "shards").iterdir())):
        os.utime(shard, (1e9, 1e9 + 30 * number))
    slurm.show(
        (11, 0, "COMPLETED", "None", 0, "own:rollout"),
        (11, 1, "FAILED", "NonZeroExitCode", 2, "own:rollout"),
        (11, 3, "PENDING", "launch failed requeued held", 1, "own:rollout"),
        (12, "N/A", "PENDING", "Dependency", 0, "own:train:student"),
    )
    status = run_status(run.load())
    found = status.model_dump(mode="json")
    assert found["stages"]["rollout"] == {"planned": 5, "done": 4, "missing": 1, "state": "partial"}
    assert found["jobs"]["rollout"] == {
        "job_ids": [11], "running": 0, "pending": 0, "held": ["11_3"], "failed": ["11_1"],
        "finished": 1, "unknown": 1, "requeues": 3,
        "reasons": ["FAILED: NonZeroExitCode", "PENDING: launch failed requeued held"],
    }  # fmt: skip
    store = found["stores"]["rollout"]
    files = [p for p in (run.root / "store" / "shards").rglob("*") if p.is_file()]
    sizes = sum(p.stat().st_size for p in files if p.name != "shard.json")
    assert store == {"bytes": sizes, "shards_per_min": 2.0, "left_s": 30.0}
    text = status_text(status)
    assert re.search(r"^rollout +4 of 5 +shards +partial$", text, re.MULTILINE)
    assert re.search(r"^train:student +0 of [0-9]+ +steps +missing$", text, re.MULTILINE)
    assert "2 shards/min" in text
    assert "scontrol release 11_3" in text
    fast = status.stores["rollout"].model_copy(update={"shards_per_min": 1234.5})
    quick = status_text(status.model_copy(update={"stores": {"rollout": fast}}))
    assert "1,234 shards/min" in quick
    assert "job 11: 1 held, 1 failed, 1 finished, 1 unknown, 3 requeued" in text


def test_of_what_was_submitted_again_the_latest_counts(job_run, slurm):
    run = job_run(tasks=2)
    submit(run.path, (), run.load(), StopRequest())
    slurm.show((11, 0, "FAILED", "None", 1, "own:rollout"),
         (11, 1, "RUNNING", "None", 0, "own:rollout"))  # fmt: skip
    resubmit(run.path, (), run.load(), StopRequest())
    slurm.show((11, 0, "FAILED", "None", 1, "own:rollout"),
         (11, 1, "RUNNING", "None", 0, "own:rollout"),
         (14, 0, "RUNNING", "None", 0, "own:rollout"))  # fmt: skip
    jobs = run_status(run.load()).jobs["rollout"]
    assert (jobs.running, jobs.failed, jobs.requeues, jobs.unknown) == (2, (), 1, 0)


@pytest.mark.parametrize(
    ("squeue", "said"),
    [
        (None, "squeue is not on the PATH"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        ("echo 'maintenance until noon'", "not understood: 'maintenance until noon'"),
    ],
)
def test_status_tells_what_is_stored_where_the_queue_does_not_answer(
    job_run, slurm, monkeypatch, squeue, said
):
    run = job_run()
    assert run_status(run.load()).jobs == {}
    submit(run.path, (), run.load(), StopRequest())
    run.do("rollout")
    if squeue is None:
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        slurm.program("squeue").write_text(f"#!/bin/bash\n{squeue}\n")
    status = run_status(run.load())
    assert status.stages["rollout"].done == 5
    assert (status.jobs, said in str(status.no_queue)) == (None, True)
    assert said in status_text(status)
    with pytest.raises(UserError, match=re.escape(said)):
        resubmit(run.path, (), run.load(), StopRequest())


# ---- a job's own end


def stopped_by(*numbers: int) -> StopRequest:
    stop = StopRequest()
    for number in numbers:
        stop.request(number)
    return stop


@pytest.mark.parametrize(
    ("environment", "code", "number", "asked"),
    [
        ({"SLURM_JOB_ID": "8"}, MORE_TO_DO, signal.SIGUSR1, ["scontrol requeue 8"]),
        (
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"},
            MORE_TO_DO, signal.SIGUSR1, ["scontrol requeue 7_0"],
        ),
        ({"SLURM_JOB_ID": "8", "RANK": "0"}, MORE_TO_DO, signal.SIGUSR1, ["scontrol requeue 8"]),
        ({"SLURM_JOB_ID": "8", "RANK": "1"}, MORE_TO_DO, signal.SIGUSR1, []),
        ({"SLURM_JOB_ID": "8"}, MORE_TO_DO, signal.SIGTERM, []),
        ({"SLURM_JOB_ID": "8"}, FINISHED, signal.SIGUSR1, []),
    ],
)  # fmt: skip
def test_a_job_whose_time_is_over_puts_itself_back_in_line_once(
    slurm, monkeypatch, environment, code, number, asked
):
    for name in ("RANK", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue_if_asked(code, stopped_by(number))
    assert slurm.calls() == [], "only in jobs that foretell wrote"
    monkeypatch.setenv("FORETELL_JOB", "1")
    requeue_if_asked(code, stopped_by(number))
    assert slurm.calls() == asked


@pytest.mark.parametrize(("early", "asked"), [("USR1", ["scontrol requeue 7_2"]), ("TERM", [])])
def test_a_command_heeds_a_signal_that_came_before_it_began(job_run, slurm, early, asked):
    run = job_run()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "FORETELL_JOB": "1",
        "FORETELL_SIGNAL": early, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "rollout", str(run.path), "--task=2", "--tasks=3"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "nothing is lost" in done.stderr
    assert slurm.calls() == asked


def test_tasks_that_run_at_once_note_what_they_cost_each_for_itself(job_run):
    run = job_run()
    run.do("rollout")
    config, folder = run.load(), run.root / "stages"
    record = StageRecord(stage="rollout", identity=stage_identity(config, "rollout"))
    usage = Usage(peak_rss_bytes=5, peak_device_bytes=1)
    assert progress(config, "rollout").state == "partial", "nobody has noted that it is finished"
    write_record(folder, record.after(2.0, [usage], finished=True), "0/2")
    write_record(folder, record.after(3.0, [usage], finished=False), "1/2")
    assert read_record(folder, "rollout", "1/2").wall_s == 3.0
    assert read_record(folder, "rollout") is None
    assert progress(config, "rollout").state == "done", "who stopped earlier does not undo that"
    costs = stage_costs(config, 7.0, usage)
    made = ("written_bytes", "made", "unit")  # of what lies on disk, not of the records
    noted = StageCost(wall_s=5.0, peak_rss_bytes=5, peak_device_bytes=1)
    assert costs["rollout"].model_copy(update=dict.fromkeys(made)) == noted
    assert costs["evaluate"].wall_s == 7.0
    write_record(folder, record.model_copy(update={"identity": "other"}), "0/2")
    assert progress(config, "rollout").state == "partial"
    write_record(folder, record.model_copy(update={"identity": "x", "finished": True}), "1/2")
    assert progress(config, "rollout").state == "stale"


def test_times_are_told_in_the_unit_that_a_person_waits_in():
    times = {0: "0 s", 41.4: "41 s", 60: "1 min", 3540: "59 min", 3600: "1 h 00 min"}
    assert {seconds: span(seconds) for seconds in times} == times
    assert span(90_000) == "25 h 00 min"
