"""Every block of README and docs is typed as it stands, or says what it needs, or what runs it.

Blocks of a page run in order, in a scratch folder where the named configurations are tiny ones
(`configurations`) and what earlier work left is there already (`SCENES`). Stages run in this
process instead of one each; tests/test_stages_apart.py looks at that.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from pipeline.config import load_config
from store import PredictionStore
from tests.conftest import tiny_document
from tests.object_server import BUCKET
from tests.pages import PAGES, ROOT, Block, blocks_of, code_of, page_name
from tests.slurm_stand_in import StandIn, stand_in

EXIT_CODES = {"doctor": {0, 1}, "status": {0, 1}}
"""Of commands that answer with their code; all others have to end with 0."""
ANSWERS = {"init": "\n"}
"""Of a person who is asked, and takes what is offered; all others say yes."""
PLACEHOLDERS = {"CONFIG": "configs/mini.yaml", "STORE": "runs/mini/store"}
"""What a reader puts in place of a word of capitals."""
DIFFUSION = {"docs/images.md", "docs/families/diffusion.md"}
"""Pages whose settings are those of a run of diffusion models."""
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
OPTIONAL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


# ---- what stands on the pages, without running it


def test_a_block_that_is_not_run_says_why():
    silent = [
        str(block)
        for block in BLOCKS
        if block.language in ("sh", "console", "python") and not block.runs and block.mark is None
    ]
    assert silent == []


def test_no_command_hides_in_a_block_of_text():
    begin = r"(?m)^(\$|foretell [a-z]|python -|pip |make |apt-get )"
    hiding = [
        str(block) for block in BLOCKS if block.language == "text" and re.search(begin, block.text)
    ]
    assert hiding == []


def marked(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.mark is not None and block.mark[0] == kind]


@pytest.mark.parametrize("block", marked("tested"), ids=str)
def test_a_block_that_another_test_runs_is_named_there(block):
    assert block.mark is not None
    test = (ROOT / block.mark[1]).read_text(encoding="utf-8")
    for command in block.commands():
        script = re.search(r"benchmarks/(\w+)\.py|python -m stages\.families\.(\w+)", command)
        if script is not None:
            assert (script[1] or script[2]) in test, f"{block.mark[1]} does not run {command}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_is_python(block):
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json_is_json(block):
    json.loads(block.text)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("sh", "console") and not b.runs], ids=str
)
def test_commands_that_are_not_run_here_could_be(block):
    for command in block.commands():
        require_typed(command)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_within_sentences_could_be_run(page):
    for code in code_of(page):
        if re.match(r"foretell |python (-m|benchmarks)|pip install|make ", code):
            filled = re.sub(r"\bI\b", "0", re.sub(r"\bN\b", "2", code))
            require_typed(re.sub(r"\b[A-Z]+\b", lambda word: word[0].lower(), filled), whole=False)


def require_typed(command: str, *, whole: bool = True) -> None:
    """Check that a command's program, options and files exist; a sentence may leave files out."""
    if "…" in command:
        return
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)
    match words:
        case ["foretell", *arguments]:
            named = [word for word in arguments if word not in ("--help", "--install-completion")]
            require_parsed(named, whole=whole and named == arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, command
        case ["python", script, *options]:
            text = (ROOT / script).read_text(encoding="utf-8")
            known = all(f'"{option}"' in text for option in options if option.startswith("--"))
            assert known, command
        case ["make", *targets]:
            done = subprocess.run(
                ["make", "-n", *targets], cwd=ROOT, capture_output=True, check=False
            )
            assert done.returncode == 0, command
        case ["pip", "install", *packages]:
            named = [re.fullmatch(r"(?:foretell|\.)\[([\w,-]+)\]", package) for package in packages]
            extras = [name for match in named if match for name in match[1].split(",")]
            assert set(extras) <= set(OPTIONAL), command
        case ["torchrun", *options]:
            require_parsed(options[options.index("pipeline") + 1 :])
        case _:
            assert words[0] in ("apt-get", "dpkg", "export", "ssh"), f"{command!r}: what is it?"
    for word in words:
        if re.fullmatch(r"configs/\w+\.yaml", word):
            load_config(ROOT / word)


def require_parsed(arguments: list[str], *, whole: bool = True) -> None:
    """Check that the command line takes arguments, without running the command."""
    from typer.main import get_command

    from pipeline.cli import app

    if not arguments or arguments[0] == "command":
        return
    name, command, context = "foretell", get_command(app), None
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=context)
        except Exception as error:
            if whole or type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):
                raise
            return
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        name, command, arguments = command.resolve_command(context, rest)


@pytest.mark.parametrize(
    "command",
    [
        "foretell dance configs/mini.yaml",
        "foretell rollout configs/mini.yaml --nothing",
        "foretell rollout configs/mini.yaml --task many --tasks 2",
        "foretell convert runs/mini/store",
        "foretell run configs/nothing.yaml",
        "make nothing",
        "pip install 'foretell[nothing]'",
        "python benchmarks/nothing.py",
        "python benchmarks/read_rate.py --nothing 3",
        "python -m stages.nothing",
        "nothing configs/mini.yaml",
    ],
)
def test_what_nobody_could_type_is_found(command):
    with pytest.raises(Exception, match=r"nothing|dance|integer|destination|profile"):
        require_typed(command)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_settings_are_valid_where_they_belong(block, tmp_path):
    path = tmp_path / "settings.yaml"
    for document in settings_of(block):
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        load_config(path)


ANCHORS = """
layout: &layout {slots: [[0, 0]], codes_per_slot: 8, audio_base_id: 10, end_id: 1}
special: &special {a: {id: 2}}
prompt: &prompt "<a>{text}"
model: &model {family: causal_lm, path: base, layout: *layout, special: *special, prompt: *prompt}
schedule: &schedule {steps: 10}
"""
"""What a fragment refers to and its page leaves out."""


def settings_of(block: Block) -> Iterator[dict[str, Any]]:
    """Yield a whole configuration for a fragment, and for each alternative that is commented out.

    A fragment with a name is whole; sections of others replace those of a run of the page's kind.
    """
    lines = block.text.splitlines()
    variants = [block.text]
    for number, line in enumerate(lines):
        if re.match(r" +# [a-z_]+: \{.*\}", line):
            other = [*lines[: number - 1], line.replace("# ", "", 1), *lines[number + 1 :]]
            variants.append("\n".join(other))
    for text in variants:
        anchored = "".join(f"  {line}\n" for line in ANCHORS.strip().splitlines())
        fragment = yaml.safe_load(f"anchors:\n{anchored}{text}")
        del fragment["anchors"]
        yield fragment if "name" in fragment else completed(fragment, page_name(block.page))


def completed(fragment: dict[str, Any], page: str) -> dict[str, Any]:
    """Put a fragment into the run that it belongs to."""
    if page in DIFFUSION:
        base = yaml.safe_load((ROOT / "configs" / "digits_cfg.yaml").read_text())
    else:
        base = tiny_document(Path("corpus"), Path("runs"))
    for name, value in fragment.items():
        together = name in ("prepare", "rollout", "evaluate") and isinstance(value, dict)
        base[name] = base[name] | value if together else value
    first = next(iter(tiny_document(Path("corpus"), Path("runs"))["students"].values()))
    for name, student in fragment.get("students", {}).items():
        base["students"][name] = first | student
    if "model" not in base["teacher"]:
        del base["fit"]
    for stage in fragment.get("cluster", {}).get("stages", {}):
        kind, _, student = stage.partition(":")
        if kind == "train" and student:
            base["students"][student] = first
    return base


# ---- a reader who types what the pages say


@dataclass
class Reader:
    """A scratch folder, and what a page's Python has defined."""

    folder: Path
    words: dict[str, str] = field(default_factory=dict)
    """What the page's words stand for here, beside `PLACEHOLDERS`."""
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What happens elsewhere before a command that begins so, such as listeners who answer."""
    names: dict[str, Any] = field(default_factory=dict)

    def follow(self, block: Block) -> None:
        """Do what a block says; a console's output must be the page's, but for its numbers."""
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), self.names)
            return
        for command, shown in block.exchanges():
            said = self.type(command)
            require_shown(shown, said, f"{block}: {command}")

    def type(self, command: str) -> str:
        """Run a command and return what it said."""
        for begin, happen in self.before.items():
            if command.startswith(begin):
                happen()
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
        for shown, meant in self.words.items():
            words = [word.replace(shown, meant) for word in words]
        words = [name for word in words for name in self._expanded(word)]
        match words:
            case ["foretell", *arguments]:
                return self._foretell(arguments)
            case ["export", *_]:
                return ""
            case ["python", *arguments]:
                done = subprocess.run(
                    [sys.executable, *arguments], cwd=self.folder, check=True, text=True,
                    capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                )  # fmt: skip
                return done.stdout + done.stderr
        raise AssertionError(f"nobody knows how to run {command!r} here: mark its block")

    def _expanded(self, word: str) -> list[str]:
        return sorted(map(str, Path().glob(word))) if "*" in word and "/" in word else [word]

    def _foretell(self, arguments: list[str]) -> str:
        from pipeline.entry import main

        said = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(said),
            redirect_stderr(said),
        ):
            patch.setattr(sys, "argv", ["foretell", *arguments])
            patch.setattr(sys, "stdin", Consenting(9 * ANSWERS.get(arguments[0], "y\n")))
            patch.setattr("pipeline.run.launch", in_this_process)
            with pytest.raises(SystemExit) as ended:
                main()
        expected = EXIT_CODES.get(arguments[0], {0})
        assert ended.value.code in expected, f"{arguments}\n{said.getvalue()}"
        return said.getvalue()


class Consenting(io.StringIO):
    """A person at a terminal who has nothing against it."""

    def isatty(self) -> bool:
        return True


def in_this_process(arguments: Any, processes: int, stop: Any) -> tuple[int, float, list[Any]]:
    """What `launch` does, without new processes."""
    from pipeline.record import own_usage
    from pipeline.worker import main as work

    return work(list(arguments), stop), 1.0, [own_usage(0)]


def require_shown(shown: list[str], said: str, command: str) -> None:
    """Check that lines of a page come in what was said, in order, whatever their numbers are."""
    lines = iter([alike(line) for line in said.splitlines()])
    for line in shown:
        assert line == "..." or alike(line) in lines, f"{command} says no {line!r}, but\n{said}"


def alike(line: str) -> str:
    """A line without its numbers, its columns and the unit that a time happens to have.

    Nor has it a rate: there is none of shards that were committed in one tick of the clock.
    """
    without = re.sub(r"[\d.,]*\d", "0", " ".join(line.split())).replace(", 0 shards/min", "")
    return re.sub(r"\b0 (s|min|h|days) left", "0 s left", without)


def configurations(corpus: Path) -> dict[str, dict[str, Any]]:
    """The tiny runs that stand in for those that pages name, by their files."""
    speech = tiny_document(corpus, Path("runs"))
    student = speech["students"]["student"]
    speech["students"] = {"student": student, "half": student}
    images = {
        "kind": "diffusion",
        "name": "sdxl",
        "prepare": {
            "source": "data/images",
            "encoder": {"kind": "pixels"},
            "buckets": {"sizes": [[8, 8]]},
            "test_images": 1,
        },
    }
    digits = yaml.safe_load((ROOT / "configs" / "digits_cfg.yaml").read_text())
    schedule = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2}
    for settings in (digits["fit"], *digits["students"].values()):
        settings["optimizer"] = settings["optimizer"] | schedule
    digits["prepare"]["test_images"] = 1500
    digits["rollout"]["rows"]["slots"] = 1
    digits["evaluate"] |= {"samples": 12, "steps": [2], "images": 2, "batch_size": 12}
    return {
        "configs/demo.yaml": speech | {"name": "demo"},
        "configs/mini.yaml": speech | {"name": "mini"},
        "configs/digits_cfg.yaml": digits,
        "mini.yaml": speech | {"name": "mini"},
        "images.yaml": images,
    }


def test_tiny_runs_stand_in_for_configurations_that_are_shipped():
    for name in configurations(Path("corpus")):
        if name.startswith("configs/"):
            load_config(ROOT / name)


def test_output_of_a_console_is_compared_but_for_its_numbers():
    require_shown(["fit  60 of 60   done", "..."], "fit 6 of 6 done\nother\n", "status")
    with pytest.raises(AssertionError, match="says no 'fit 60 of 60 missing'"):
        require_shown(["fit 60 of 60 missing"], "fit 6 of 6 done\n", "status")


@pytest.fixture(scope="session")
def finished(tone_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations, where the run `mini` is done."""
    folder = tmp_path_factory.mktemp("finished")
    write_configurations(folder, tone_corpus)
    with chdir(folder):
        Reader(folder).type("foretell run configs/mini.yaml")
    return folder


def write_configurations(folder: Path, corpus: Path) -> None:
    (folder / "configs").mkdir()
    for name, document in configurations(corpus).items():
        (folder / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


@pytest.fixture
def reader(tone_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader in a folder where nothing was done yet."""
    monkeypatch.chdir(tmp_path)
    write_configurations(tmp_path, tone_corpus)
    return Reader(tmp_path)


# ---- what is there before a page begins


def nothing(_: Reader, __: Path, ___: pytest.FixtureRequest) -> None:
    """The page makes all that it shows."""


def finished_runs(reader: Reader, finished: Path, _: pytest.FixtureRequest) -> None:
    """The runs `mini` and `demo` are done."""
    for name in ("mini", "demo"):
        shutil.copytree(finished / "runs" / "mini", reader.folder / "runs" / name)
    reader.words["SAMPLE/"] = f"{next(PredictionStore.open('runs/mini/store').keys())[0]}/"


def damaged(reader: Reader, finished: Path, request: pytest.FixtureRequest) -> None:
    """A byte of a store is another one."""
    finished_runs(reader, finished, request)
    file = reader.folder / "runs/demo/store/shards/00001/top_k.ids/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)


def shard_by_number(reader: Reader, finished: Path, _: pytest.FixtureRequest) -> None:
    """The page reads shard 42 of a store by plain Zarr."""
    shutil.copytree(finished / "runs/mini/store/shards/00000", reader.folder / "STORE/shards/00042")


def images(reader: Reader, _: Path, __: pytest.FixtureRequest) -> None:
    """Images have captions in files of text, and another folder of them was prepared."""
    folder = reader.folder / "data" / "images"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (90 * number, 9, 9)).save(folder / f"{number}.png")
    rows = "".join(f'{{"file_name": "{number}.png", "label": 0}}\n' for number in range(3))
    (folder / "metadata.jsonl").write_text(rows, encoding="utf-8")
    reader.type("foretell prepare images.yaml")
    (folder / "metadata.jsonl").unlink()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"red, {number}\n", encoding="utf-8")


def listeners(reader: Reader, finished: Path, request: pytest.FixtureRequest) -> None:
    """Sheets that were written come back with answers."""
    finished_runs(reader, finished, request)

    def answer() -> None:
        (reader.folder / "answers").mkdir()
        for sheet in sorted(Path("runs/demo/listening").glob("sheet_*")):
            rows = list(csv.DictReader(io.StringIO((sheet / "answers.csv").read_text())))
            with (reader.folder / "answers" / f"{sheet.name}.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                for row in rows:
                    said = "4" if row["kind"] == "mos" else "equal"
                    table.writerow(row | {"answer": said, "listener": sheet.name})

    reader.before["foretell tally"] = answer


def replayed(reader: Reader, finished: Path, _: pytest.FixtureRequest) -> None:
    """There is another store of the same dataset and teacher."""
    done = finished / "runs" / "mini"
    shutil.copytree(done / "store", reader.folder / "runs" / "first" / "store")
    for name in ("dataset", "teacher", "stages"):
        shutil.copytree(done / name, reader.folder / "runs" / "mini" / name)
    for record in (reader.folder / "runs" / "mini" / "stages").glob("rollout*"):
        record.unlink()


def object_storage(reader: Reader, finished: Path, request: pytest.FixtureRequest) -> None:
    """A bucket is there, and three more machines take part in stage one."""
    server = request.getfixturevalue("object_server")
    patch = request.getfixturevalue("monkeypatch")
    for name, value in (server.environment | {"FORETELL_RETRY_S": "60"}).items():
        patch.setenv(name, value)
    patch.setenv("FORETELL_CACHE", str(reader.folder / "cache"))
    done = finished / "runs" / "mini"
    document = yaml.safe_load((finished / "mini.yaml").read_text())
    document = {name: document[name] for name in ("seed", "rollout", "students")} | {
        "name": "mini",
        "store": f"s3://{BUCKET}/runs/mini",
        "dataset": str(done / "dataset"),
        "teacher": {"checkpoint": str(done / "teacher")},
    }
    del document["students"]["half"]
    (reader.folder / "mini.yaml").write_text(
        yaml.safe_dump(document, sort_keys=False), encoding="utf-8"
    )

    def others() -> None:
        for task in (1, 2, 3):
            reader.type(f"foretell  rollout mini.yaml --task {task} --tasks 4")

    reader.before["foretell rollout"] = others


def slurm(reader: Reader, finished: Path, request: pytest.FixtureRequest) -> None:
    """Slurm's commands answer, and when the reader asks, the rollout is at work."""
    patch = request.getfixturevalue("monkeypatch")
    programs: StandIn = stand_in(reader.folder / "slurm", patch)
    runs = reader.folder / "runs"

    def at_work() -> None:
        kept = shutil.ignore_patterns("student*", "report*", "00001", "00003", "train*", "eval*")
        shutil.copytree(finished / "runs" / "mini", runs / "mini", ignore=kept, dirs_exist_ok=True)
        jobs = (("prepare", "COMPLETED"), ("fit", "COMPLETED"), ("rollout", "RUNNING"))
        running = [
            (11 + number, task, state, "None", 0, f"mini:{stage}")
            for number, (stage, state) in enumerate(jobs)
            for task in (("N/A",) if stage != "rollout" else (0, 1, 2))
        ]
        waiting = (13, 3, "PENDING", "JobArrayTaskLimit", 0, "mini:rollout")
        behind = [
            (14 + n, "N/A", "PENDING", "Dependency", 0, f"mini:{stage}")
            for n, stage in enumerate(("train:student", "train:half", "evaluate"))
        ]
        programs.show(*running, waiting, *behind)

    def lost() -> None:
        (programs.folder / "queue").unlink()

    reader.before["foretell status"] = at_work
    reader.before["foretell resubmit"] = lost


def networks(_: Reader, __: Path, request: pytest.FixtureRequest) -> None:
    """The page makes all that it shows, with the packages of diffusion."""
    for module in ("diffusers", "sklearn"):
        request.getfixturevalue("require")(module, "pip install 'foretell[diffusion]'")


SCENES = {
    "docs/families/codec_lm.md": nothing,
    "docs/families/diffusion.md": networks,
    "docs/cluster.md": slurm,
    "docs/faults.md": damaged,
    "docs/format.md": shard_by_number,
    "docs/images.md": images,
    "docs/listening.md": listeners,
    "docs/object_storage.md": object_storage,
    "docs/targets.md": replayed,
}
"""What pages find; all others find finished runs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks_of(p))], ids=page_name
)
def test_a_page_can_be_followed(page, reader, finished, request):
    SCENES.get(page_name(page), finished_runs)(reader, finished, request)
    for block in blocks_of(page):
        if block.runs:
            reader.follow(block)
