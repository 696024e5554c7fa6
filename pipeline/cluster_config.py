"""How a run is given to Slurm: what its jobs ask for, and how they begin."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from stages.ranges import Positive
from store.claims import HEARTBEAT_S
from store.schema import Record, require

STAGES = ("prepare", "fit", "rollout", "train", "evaluate")
PLAIN = re.compile(r"[A-Za-z0-9_.,:@+=/-]{1,128}")
MEMORY = re.compile(r"[0-9]{1,9}[KMGT]?")
TIME = re.compile(r"[0-9]{1,6}(:[0-9]{1,2}){0,2}|[0-9]{1,3}-[0-9]{1,2}(:[0-9]{1,2}){0,2}")
OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[^\s\"'\\#]+)?")
LONGEST_LINE = 4096


def _plain(value: str) -> str:
    limit = "1 to 128 letters, digits and _ . , : @ + = / -"
    require(bool(PLAIN.fullmatch(value)), "this", value, limit, "it stands in an #SBATCH line")
    return value


def _memory(value: str) -> str:
    limit = "a number with K, M, G or T behind it"
    require(bool(MEMORY.fullmatch(value)), "memory", value, limit, "write for example 32G")
    return value


def _time(value: str) -> str:
    limit = "minutes, hours:minutes:seconds or days-hours"
    require(bool(TIME.fullmatch(value)), "time", value, limit, "write for example 04:00:00")
    return value


def _option(value: str) -> str:
    limit = "one long option without blanks and quotes"
    require(bool(OPTION.fullmatch(value)), "option", value, limit, "write --constraint=a100")
    return value


def _line(value: str) -> str:
    one = value.isprintable() and 0 < len(value) <= LONGEST_LINE
    require(one, "line", value, "one line of printable text", "give each line by itself")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
Line = Annotated[str, AfterValidator(_line)]


class JobConfig(Record):
    """What a job asks Slurm for; what is null is left to the cluster's own defaults."""

    partition: Plain | None = None
    """Partition, or several with commas."""
    account: Plain | None = None
    """Account that is charged."""
    qos: Plain | None = None
    """Quality of service."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of each node of the job (--gres=gpu:N)."""
    cpus: Positive | None = None
    """Cores of each process (--cpus-per-task)."""
    memory: Annotated[str, AfterValidator(_memory)] | None = None
    """Memory of each node, for example 32G."""
    time: Annotated[str, AfterValidator(_time)] | None = None
    """Longest time of the job; it is asked to stop `grace_s` before and goes on in a new one."""
    nodes: Positive | None = None
    """Nodes of a job of `train` or `fit`, each with the processes that its optimizer says."""
    options: tuple[Annotated[str, AfterValidator(_option)], ...] = ()
    """Further options of sbatch, for example --constraint=a100."""


class ClusterConfig(JobConfig):
    """Jobs of a run on Slurm; nothing here changes what the run produces."""

    stages: dict[str, JobConfig] = Field(default_factory=dict)
    """What differs by stage: prepare, fit, rollout, train, evaluate, or one of them as train:NAME;
    what is given there replaces what stands above."""
    preamble: tuple[Line, ...] = ()
    """Lines of bash before the job begins: modules, a virtual environment, variables."""
    python: tuple[Line, ...] | None = None
    """Words that start Python, for example those of a container; null takes the Python that
    submits."""
    tasks: Positive = 1
    """Jobs that share a rollout, unless --tasks says otherwise."""
    max_running: Positive | None = None
    """Most of them at a time; null for all."""
    grace_s: int = Field(120, ge=1, le=65535)
    """Seconds before the end of a job's time at which it is asked to stop (--signal=B:USR1)."""
    heartbeat_s: float = Field(HEARTBEAT_S, gt=0)
    """Seconds between two signs of life of a worker; one that misses nine is followed by others."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage, job in self.stages.items():
            kind, separator, name = stage.partition(":")
            known = kind in STAGES and bool(separator) == bool(name)
            advice = f"give one of {', '.join(STAGES)}, or a single one as train:NAME"
            require(known, "a key of stages", stage, "a stage", advice)
            parallel = kind in ("train", "fit") or (job.nodes or 1) == 1
            require(parallel, f"stages.{stage}.nodes", job.nodes, "1", "raise tasks instead")
        advice = "give it in stages.train, for other stages have no use for several"
        require((self.nodes or 1) == 1, "nodes", self.nodes, "1", advice)
        return self

    def job(self, stage: str) -> JobConfig:
        """Return what the job of a stage (`train:NAME`, `rollout:NAME`) asks for."""
        settings = {name: getattr(self, name) for name in JobConfig.model_fields}
        for key in (stage.partition(":")[0], stage):
            given = self.stages.get(key, JobConfig())
            settings |= {name: getattr(given, name) for name in given.model_fields_set}
        return JobConfig(**settings)
