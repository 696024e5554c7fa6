"""The sbatch scripts of a run: plain bash that a person can read, change and submit by hand."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster_config import ClusterConfig, JobConfig
from pipeline.config import Run
from pipeline.folders import RunFolders
from pipeline.job_environment import EARLY_SIGNAL, IN_JOB
from pipeline.run import processes_of
from stages.errors import UserError

BEGINNING = f"""
# Signals that come while the lines below work are kept for foretell.
trap 'export {EARLY_SIGNAL}=USR1' USR1
trap 'export {EARLY_SIGNAL}=TERM' TERM
export {IN_JOB}=1"""
HOLDING = """
# From here until Python listens they wait (or are lost, with an env older than coreutils 8.31).
hold=()
env --block-signal=USR1 true 2>/dev/null && hold=(env --block-signal=USR1 --block-signal=TERM)
trap '' USR1 TERM
"""
MEETING_POINT = """\
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
"""
PLACE = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; "
    'trap "" USR1 TERM; exec "$@"'
)
"""What each process of a job on several nodes does first; its words follow."""


@dataclass(frozen=True)
class JobScripts:
    """Writes the scripts of one run, with the settings and words that `submit` was given."""

    config: Run
    path: Path
    """Its configuration file."""
    overrides: Sequence[str]
    tasks: int
    """Jobs that share a rollout; all of them, however few a script asks for."""
    max_running: int | None

    def write(self, stage: str, array: Sequence[int] = ()) -> Path:
        """Write the script of a stage; `array` are the tasks of a rollout that it asks for."""
        folders = RunFolders(self.config)
        path = folders.jobs / f"{stage.replace(':', '-')}.sh"
        content = self.text(stage, array)
        for folder in (folders.jobs, folders.logs):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    def text(self, stage: str, array: Sequence[int] = ()) -> str:
        """Return the script of a stage.

        Raises `UserError` for a folder whose name Slurm cannot take.
        """
        lines = [
            "#!/bin/bash",
            f"# {stage} of the run {self.config.name}, as foretell submit wrote it.",
            *(f"#SBATCH {option}" for option in self._options(stage, array)),
            BEGINNING,
            *(("", *self._cluster.preamble) if self._cluster.preamble else ()),
            HOLDING,
            self._command(stage),
            "",
        ]
        return "\n".join(lines)

    @property
    def _cluster(self) -> ClusterConfig:
        return self.config.cluster or ClusterConfig()

    def _options(self, stage: str, array: Sequence[int]) -> Iterator[str]:
        yield f"--job-name={job_name(self.config, stage)}"
        yield f"--chdir={_quoted(Path.cwd())}"
        logs = RunFolders(self.config).logs.absolute() / stage.replace(":", "-")
        yield f'--output={_quoted(logs, pattern=True)[:-1]}_{"%A_%a" if array else "%j"}.out"'
        yield "--open-mode=append"
        yield "--requeue"
        yield f"--signal=B:USR1@{self._cluster.grace_s}"
        if array:
            limit = "" if self.max_running is None else f"%{self.max_running}"
            yield f"--array={ranges(array)}{limit}"
        yield from _asked(self._cluster.job(stage), self._processes(stage))

    def _command(self, stage: str) -> str:
        python = self._cluster.python or (sys.executable,)
        words = [*python, "-m", "pipeline", *self._words(stage)]
        command = " ".join(map(shlex.quote, words))
        if stage.startswith("rollout"):
            command += f' --task "$SLURM_ARRAY_TASK_ID" --tasks {self.tasks}'
        if not self._on_several_nodes(stage):
            return f'exec "${{hold[@]}}" {command}'
        processes = self._processes(stage)
        place = shlex.quote(f"export LOCAL_WORLD_SIZE={processes}; {PLACE}")
        # Which srun does not take over from the job, since Slurm 22.05.
        cpus = self._cluster.job(stage).cpus
        asked = "" if cpus is None else f"--cpus-per-task={cpus} "
        start = f"srun {asked}--kill-on-bad-exit=1 bash -c {place} foretell"
        return f'{MEETING_POINT}exec {start} "${{hold[@]}}" {command}'

    def _words(self, stage: str) -> list[str]:
        kind, _, name = stage.partition(":")
        words = [kind, str(self.path.absolute())]
        words += {"train": ["--student", name], "rollout": ["--round", name]}.get(
            kind if name else "", []
        )
        return words + [word for override in self.overrides for word in ("--set", override)]

    def _processes(self, stage: str) -> int:
        """Processes of a stage on each node."""
        return 1 if stage.startswith("rollout") else processes_of(self.config, stage)

    def _on_several_nodes(self, stage: str) -> bool:
        return (self._cluster.job(stage).nodes or 1) > 1


def _asked(job: JobConfig, processes: int) -> Iterator[str]:
    """Yield what a job asks for; one on several nodes has a task of Slurm's for each process."""
    apart = (job.nodes or 1) > 1
    options = {
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "nodes": job.nodes,
        "ntasks-per-node": processes if apart else None,
        "cpus-per-task": job.cpus and job.cpus * (1 if apart else processes),
        "gres": None if job.gpus is None else f"gpu:{job.gpus}",
        "mem": job.memory,
        "time": job.time,
    }
    yield from (f"--{name}={value}" for name, value in options.items() if value is not None)
    yield from job.options


def job_name(config: Run, stage: str) -> str:
    """Return what the queue calls the job of a stage."""
    return f"{config.name}:{stage}"


def ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as Slurm writes them: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _quoted(path: Path, *, pattern: bool = False) -> str:
    """Return a path as an #SBATCH line has it; in a pattern, % has to be doubled."""
    text = str(path)
    if not text.isprintable() or "\\" in text:
        raise UserError(
            f"{text!r} holds a backslash or what cannot be printed, which Slurm refuses in the "
            "name of a folder: choose another folder"
        )
    if pattern:
        text = text.replace("%", "%%")
    return '"' + text.replace('"', '\\"') + '"'
