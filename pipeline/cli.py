"""The command line: each command parses, calls one function, and prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline.arguments import Config, Set
from pipeline.completion import rounds, stores, students
from pipeline.config import Run, load_config
from pipeline.first_commands import doctor, init
from pipeline.grouped_help import (
    CLUSTER,
    LISTENING,
    STAGES,
    START,
    STORES,
    GroupedHelp,
    PlainTyper,
    examples,
)
from pipeline.inspect_commands import inspect_app
from pipeline.launch import FAILED, FINISHED, MORE_TO_DO
from pipeline.listening_commands import listen, tally
from pipeline.printing import Json, print_document
from pipeline.progress import stages_of
from pipeline.run import (
    do_stage,
    do_stage_among_peers,
    own_code,
    run,
    say,
    under_torchrun,
)
from pipeline.slurm import QueueEntry, requeue_if_asked
from pipeline.status import run_status, status_text
from pipeline.store_commands import convert, copy, gc, verify
from pipeline.submission import Submitted, held_jobs, resubmit, submission_text, submit
from stages.errors import UserError
from stages.interruption import StopRequest, stop_request

app = PlainTyper(
    name="foretell",
    cls=GroupedHelp,
    help="Offline distillation: a teacher's guided predictions, stored once, teach many students.",
    epilog=examples(
        "foretell init my.yaml                   # answer five questions",
        "foretell doctor my.yaml                 # is all here that it needs?",
        "foretell rollout my.yaml --estimate     # how long, how many bytes",
        "foretell run my.yaml                    # everything; again to go on",
        "foretell inspect runs/my/store",
        "foretell COMMAND --help                 # what a command does, and how",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(
    inspect_app,
    name="inspect",
    rich_help_panel=STORES,
    short_help="Show what is in a store, down to one timestep, or in a model.",
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Write the scripts and submit nothing.")]


def command(
    group: str, *shown: str, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the decorator of a command: where the help lists it, and examples of it."""
    return app.command(name, rich_help_panel=group, epilog=examples(*shown))


def _stage(
    stage: str,
    config: Path,
    overrides: list[str] | None,
    task: str | None = None,
    *,
    static: bool = False,
) -> None:
    settings = load_config(config, overrides or [])
    code = _code_of(stage, config, overrides or [], settings, task, static=static)
    raise typer.Exit(own_code(code))


def _code_of(
    stage: str,
    config: Path,
    overrides: list[str],
    settings: Run,
    task: str | None = None,
    *,
    static: bool = False,
) -> int:
    """Do a stage, as one of several processes where torchrun or srun started them."""
    with stop_request() as stop:
        if stage.startswith(("fit", "train")) and under_torchrun():
            code = do_stage_among_peers(stage, config, overrides, settings, stop)
        else:
            code = do_stage(stage, config, overrides, settings, stop, task, static=static)
    requeue_if_asked(code, stop)
    return code


command(
    START,
    "foretell init my.yaml                   # asks five questions",
    "foretell init my.yaml --family codec_lm --data demo --machine cpu",
    "foretell init sdxl.yaml --family diffusion --data data/images \\",
    "  --teacher models/sdxl --guidance 7 --machine gpu",
)(init)
command(
    START,
    "foretell doctor",
    "foretell doctor my.yaml                 # what this run needs",
)(doctor)


@command(
    STAGES,
    "foretell prepare my.yaml",
    "foretell prepare my.yaml --set prepare.max_duration_s=12",
)
def prepare(config: Config, set_: Set = None) -> None:
    """Turn recordings or images into a dataset; say what was rejected.

    Audio is encoded to codes, images to latents. `dataset/rejected.parquet` names every clip or
    image that was left out, with the reason.
    """
    _stage("prepare", config, set_)


@command(
    STAGES,
    "foretell fit my.yaml",
    "torchrun --standalone --nproc-per-node 4 -m pipeline fit my.yaml",
)
def fit(config: Config, set_: Set = None) -> None:
    """Train a teacher on the dataset, with condition dropout.

    Runs alone or under torchrun, and goes on from its newest checkpoint.
    """
    _stage("fit", config, set_)


@command(
    STAGES,
    "foretell rollout my.yaml --estimate",
    "foretell rollout my.yaml",
    "foretell rollout my.yaml --task 3 --tasks 16",
)
def rollout(
    config: Config,
    task: Annotated[
        int | None, typer.Option(metavar="I", help="Number of this job, from 0.", min=0)
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(metavar="N", help="Jobs that share the work.", min=1)
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Write the job's own shards only, and claim none.")
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Score the codes of this store; generate nothing.",
            autocompletion=stores,
        ),
    ] = None,
    round_: Annotated[
        str | None,
        typer.Option(
            "--round",
            metavar="NAME",
            help="Roll out this round, whose teacher is a student.",
            autocompletion=rounds,
        ),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Time a few batches, say what all will take, and write nothing."
        ),
    ] = False,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Estimate as one JSON object.")] = False,
) -> None:
    """Stage one: store what the guided teacher predicts.

    A bare call does all that is missing. Several calls at once share the work; jobs of an array
    say which one they are by --task and --tasks.
    """
    if (task is None) != (tasks is None) or (
        task is not None and tasks is not None and task >= tasks
    ):
        raise UserError(f"--task {task} with --tasks {tasks}: give both, with task below tasks")
    section = "rollout" if round_ is None else f"rounds.{round_}.rollout"
    overrides = [*(set_ or []), *(_replaying(section, replay) if replay is not None else [])]
    stage = "rollout" if round_ is None else f"rollout:{round_}"
    if estimate:
        from pipeline.estimation import estimate_of, estimate_text  # noqa: PLC0415, it needs torch

        found = estimate_of(load_config(config, overrides), round_)
        print_document(found.model_dump(mode="json"), as_json, lambda: estimate_text(found))
        return
    if as_json:
        raise UserError("rollout reports nothing but with --estimate: leave out --json")
    share = None if task is None else f"{task}/{tasks}"
    _stage(stage, config, overrides, share, static=static)


def _replaying(section: str, store: str) -> list[str]:
    """Return the overrides that --replay stands for."""
    return [
        f"{section}.source=replay",
        f"{section}.replay={json.dumps(store)}",
        f"{section}.student=null",
    ]


@command(
    STAGES,
    "foretell train my.yaml",
    "foretell train my.yaml --student half",
    "torchrun --standalone --nproc-per-node 4 -m pipeline train my.yaml",
)
def train(
    config: Config,
    student: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Train this student only.", autocompletion=students),
    ] = None,
    set_: Set = None,
) -> None:
    """Stage two: train the students from the store, without a teacher.

    Runs alone or under torchrun, and goes on from its newest checkpoint.
    """
    settings = load_config(config, set_ or [])
    students = [stage for stage in stages_of(settings) if stage.startswith("train:")]
    for stage in students if student is None else [f"train:{student}"]:
        code = _code_of(stage, config, set_ or [], settings)
        if code != FINISHED:
            raise typer.Exit(own_code(code))


@command(
    STAGES,
    "foretell evaluate my.yaml",
    "foretell evaluate my.yaml --set evaluate.samples=20",
)
def evaluate(config: Config, set_: Set = None) -> None:
    """Compare teacher and students on held-out data; write the report.

    The teacher is measured with guidance and without. Open `runs/NAME/report/report.html`.
    """
    _stage("evaluate", config, set_)


@command(
    START,
    "foretell run configs/mini.yaml",
    "foretell run my.yaml --set name=second --set seed=2",
    name="run",
)
def run_command(config: Config, set_: Set = None) -> None:
    """Do all stages of a configuration, skipping what is done.

    May be interrupted anywhere: the same command goes on where it stopped.
    """
    raise typer.Exit(run(config, set_ or [], load_config(config, set_ or [])))


@command(
    START,
    "foretell status my.yaml",
    "foretell status my.yaml --json",
)
def status(config: Config, set_: Set = None, as_json: Json = False) -> None:
    """Show how far a run is, and its jobs on a cluster.

    Exit code 0 only when all is done, 1 where something is left.
    """
    found = run_status(load_config(config, set_ or []))
    print_document(found.model_dump(mode="json"), as_json, lambda: status_text(found))
    complete = all(stage.state == "done" for stage in found.stages.values())
    raise typer.Exit(FINISHED if complete else FAILED)


@command(
    CLUSTER,
    "foretell submit my.yaml --dry-run",
    "foretell submit my.yaml --tasks 16 --max-running 4",
    name="submit",
)
def submit_command(
    config: Config,
    tasks: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Jobs that share a rollout; without it, cluster.tasks.", min=1
        ),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most of them at a time; without it, cluster.max_running.",
            min=1,
        ),
    ] = None,
    dry_run: DryRun = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write and submit the Slurm jobs of every stage that is not done."""
    settings = load_config(config, set_ or [])
    with stop_request() as stop:
        done = submit(
            config, set_ or [], settings, stop,
            tasks=tasks, max_running=max_running, dry_run=dry_run,
        )  # fmt: skip
    _tell_submission(config, stop, done, [], as_json)


@command(
    CLUSTER,
    "foretell resubmit my.yaml",
    name="resubmit",
)
def resubmit_command(
    config: Config, dry_run: DryRun = False, set_: Set = None, as_json: Json = False
) -> None:
    """Submit again what is missing and not in the queue.

    Names the jobs that only a person can release.
    """
    settings = load_config(config, set_ or [])
    with stop_request() as stop:
        done = resubmit(config, set_ or [], settings, stop, dry_run=dry_run)
    _tell_submission(config, stop, done, held_jobs(settings), as_json)


def _tell_submission(
    config: Path,
    stop: StopRequest,
    done: Mapping[str, Submitted],
    held: Sequence[QueueEntry],
    as_json: bool,
) -> None:
    document = {
        "jobs": {stage: job.model_dump(mode="json") for stage, job in done.items()},
        "held": [entry.label for entry in held],
    }
    print_document(document, as_json, lambda: submission_text(done, held))
    if stop.requested:
        say(f"stopped: stages that are not named were not submitted: foretell resubmit {config}")
        raise typer.Exit(MORE_TO_DO)


command(
    STORES,
    "foretell verify runs/my/store",
    "foretell verify runs/my/store --repair",
)(verify)
command(
    STORES,
    "foretell convert runs/my/store runs/my/store_small --profile compact",
)(convert)
command(
    STORES,
    "foretell copy runs/my/store s3://bucket/my",
    "foretell copy s3://bucket/my stores/my",
)(copy)
command(
    STORES,
    "foretell gc runs/my/store",
)(gc)
command(
    LISTENING,
    "foretell listen my.yaml --sheets 8",
    "foretell listen my.yaml --only ab --items 10",
)(listen)
command(
    LISTENING,
    "foretell tally my.yaml answers/*.csv",
)(tally)
