"""What is installed on this machine, what can run here and why not, and what to install."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from pipeline.config import Run
from pipeline.needs import Need, needs
from pipeline.packages import Package, asked_for, fits, python_wanted
from pipeline.slurm import require_slurm
from stages.config import JudgeName
from stages.errors import UserError
from stages.model_config import FamilyName
from store.object_client import CREDENTIALS, endpoint_url
from store.schema import QuantizationMethod, Record

INSTALL = re.compile(r"(?:pip|apt-get) install [^,;]+")
"""A command within the reason why something cannot run."""
BASE = "family codec_lm"
"""What runs without any extra: where it does not, the installation is broken."""
MACHINE = "machine"
PATIENCE_S = 300
GROUPS = {
    "family causal_lm": "transformers", "audio-codec snac": "transformers",
    "family diffusion": "diffusers", "image-encoder pipeline": "diffusers",
    "family magpie": "nemo", "audio-codec nemo": "nemo",
}  # fmt: skip
"""What is looked at in a process apart, for it takes seconds to import or may be broken."""


class Device(Record):
    """Where models compute."""

    name: str
    memory_bytes: int
    bf16: bool
    """Whether it multiplies bf16 in hardware."""
    fp8: bool
    """Whether it multiplies fp8 in hardware; weights may be held in fp8 anywhere."""


class Ability(Record):
    """Something that may or may not be possible on this machine."""

    name: str
    reason: str | None
    """Why it is not; None where it is."""
    key: str | None = None
    """Key of the configuration that asks for it."""
    optional: bool = False
    """Whether a run goes on without it, and says so."""

    @property
    def ok(self) -> bool:
        """Whether it is possible."""
        return self.reason is None


class Diagnosis(Record):
    """What was found on a machine."""

    ok: bool
    """Whether the base works and, of a configuration, all that it needs is there."""
    python: Package
    torch: str | None
    """Version; None where it cannot be imported."""
    cuda: str | None
    """CUDA that torch was built for."""
    devices: tuple[Device, ...]
    cores: int
    """Cores that this process may use."""
    runs: str
    free_bytes: int
    """On the disk of the folder `runs`."""
    slurm: str | None
    """Why there is none; None where there is."""
    object_storage: str
    """Which credentials the environment has; never their values."""
    packages: dict[str, tuple[Package, ...]]
    """By extra; the empty name is what is always needed."""
    abilities: tuple[Ability, ...]
    """What can run here or, of a configuration, what it needs."""
    install: tuple[str, ...]
    """Commands that would mend what is missing."""


def diagnose(config: Run | None = None) -> Diagnosis:
    """Look at this machine: at all that it may do or, with a configuration, at what that needs.

    Packages are imported in earnest, in processes of their own.
    """
    wanted = needs(config) if config else [Need(name, "") for name in everything()]
    asked = [need.ability for need in wanted]
    answers = _ask([MACHINE, BASE, *(a for a in asked if not a.startswith("file "))])
    abilities = tuple(_ability(need, answers) for need in wanted)
    found = answers[MACHINE].get("machine", {})
    python = platform.python_version()
    packages = asked_for()
    base = packages[""]
    sound = all(package.ok for package in base) and answers[BASE]["reason"] is None
    complete = config is None or all(a.ok or a.optional for a in abilities)
    interpreter = Package(
        name="python", wanted=python_wanted(), installed=python, ok=fits(python, python_wanted())
    )
    runs = config.runs if config else Path("runs")
    broken = () if sound else (Ability(name=BASE, reason=answers[BASE]["reason"]),)
    return Diagnosis(
        ok=sound and complete and interpreter.ok,
        python=interpreter,
        torch=found.get("torch"),
        cuda=found.get("cuda"),
        devices=tuple(Device.model_validate(device) for device in found.get("devices", ())),
        cores=_cores(),
        runs=str(runs),
        free_bytes=shutil.disk_usage(_existing(runs)).free,
        slurm=_slurm(),
        object_storage=_credentials(),
        packages=packages,
        abilities=abilities,
        install=tuple(_commands(abilities + broken, packages, whole=config is None)),
    )


def everything() -> list[str]:
    """Return all that this release may be asked for."""
    return [
        *(f"family {name}" for name in (*get_args(FamilyName), "diffusion")),
        "audio-codec nemo",
        "audio-codec snac",
        *(f"quantization {method} on auto" for method in get_args(QuantizationMethod)),
        *(f"judge {name}" for name in (*get_args(JudgeName), "digits")),
        "voices hibari",
        "voices flite",
        "tensorboard event-files",
    ]


def _ability(need: Need, answers: Mapping[str, dict[str, Any]]) -> Ability:
    kind, _, name = need.ability.partition(" ")
    reason = answers[need.ability]["reason"] if kind != "file" else _file(Path(name))
    return Ability(name=need.ability, reason=reason, key=need.key or None, optional=need.optional)


def _file(path: Path) -> str | None:
    return None if path.exists() else f"{path} is not there (looked for from {Path.cwd()})"


def _ask(asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Put every question to `pipeline.probe`, in as many processes at once as there are cores."""
    groups: dict[str, list[str]] = {}
    for ability in dict.fromkeys(asked):
        groups.setdefault(GROUPS.get(ability, ""), []).append(ability)
    answers: dict[str, dict[str, Any]] = {}
    with (
        ThreadPoolExecutor(_cores()) as pool,
        tqdm(desc="importing packages", total=len(groups), disable=None, leave=False) as bar,
    ):
        for found in pool.map(_probe, groups.values()):
            answers |= found
            bar.update()
    return answers


def _probe(asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the answers of a process; one that ends too early has its last words as a reason."""
    command = [sys.executable, "-m", "pipeline.probe", *asked]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False,
            env=environment, stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
        )  # fmt: skip
        output, trouble = done.stdout, _last_words(done)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        trouble = f"no answer in {PATIENCE_S} s"
    answers = {answer["ability"]: answer for answer in _answers(output)}
    reason = {"reason": f"it cannot be imported: {trouble}"}
    return {ability: answers.get(ability, reason) for ability in asked}


def _answers(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue  # what a package had to say
        if isinstance(answer, dict) and "ability" in answer:
            yield answer


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone says what a job may use
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _existing(path: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _slurm() -> str | None:
    try:
        require_slurm()
    except UserError as error:
        return str(error)
    return None


def _credentials() -> str:
    names = [name for name in CREDENTIALS if os.environ.get(name)]
    where = " with an endpoint of its own" if endpoint_url() else ""
    return f"{', '.join(names)} set{where}" if names else "no credentials in the environment"


def _commands(
    abilities: Sequence[Ability], packages: Mapping[str, Sequence[Package]], whole: bool
) -> dict[str, None]:
    """Return each command once: for the base, what is needed, and what is optional, in this order.

    Where the `whole` machine is looked at, also those of extras whose versions do not fit.
    """
    wrong = [extra for extra, asked in packages.items() if not all(p.ok for p in asked)]
    commands = ["pip install --upgrade foretell"] if "" in wrong else []
    for ability in sorted(abilities, key=lambda ability: ability.optional):
        commands += map(str.strip, INSTALL.findall(ability.reason or ""))
    commands += [f"pip install 'foretell[{extra}]'" for extra in wrong if whole and extra]
    return dict.fromkeys(commands)
