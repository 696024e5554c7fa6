"""What the Tab key offers, asked as bash asks: in a folder where a person types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from pipeline.config import load_config
from pipeline.config_keys import settable_keys
from pipeline.entry import main
from stages.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def asked(line: str) -> dict[str, str]:
    """The environment in which bash asks what may stand at the end of a line.

    It parts words at blanks and around `=` and `:`, and the last is empty behind a blank.
    """
    words = [part for word in line.split() for part in re.findall(r"[=:]+|[^=:]+", word)]
    words += [""] if line.endswith(" ") else []
    return {
        "_FORETELL_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }


def offered(line: str, monkeypatch, capsys) -> list[str]:
    """What bash is offered at the end of a line."""
    for name, value in asked(line).items():
        monkeypatch.setenv(name, value)
    with patch("sys.argv", ["foretell"]), pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.split()


@pytest.fixture
def folder(tmp_path, tiny_run, monkeypatch) -> Path:
    """A folder with a configuration and a store, in which a person types."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    document = tiny_run.document | {"students": {}}
    document["students"] = dict.fromkeys(
        ("student", "half"), tiny_run.document["students"]["student"]
    )
    Path("configs/mine.yaml").write_text(yaml.safe_dump(document))
    Path("configs/broken.yaml").write_text("{")
    Path("configs/notes.txt").write_text("")
    Path(".hidden").mkdir()
    Path(".hidden/other.yaml").write_text("")
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/store").symlink_to(tiny_run.root / "store")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("foretell ev", ["evaluate"]),
        ("foretell run ", ["configs/broken.yaml", "configs/mine.yaml"]),
        ("foretell run configs/m", ["configs/mine.yaml"]),
        ("foretell run .hid", [".hidden/other.yaml"]),
        ("foretell verify ", ["runs/mine/store"]),
        ("foretell verify runs/mi", ["runs/mine/store"]),
        ("foretell inspect plot ", ["runs/mine/store"]),
        ("foretell inspect audio runs/", ["runs/mine/store"]),
        ("foretell inspect audit configs/m", ["configs/mine.yaml"]),
        ("foretell rollout configs/mine.yaml --est", ["--estimate"]),
        ("foretell train configs/mine.yaml --student s", ["student"]),
        ("foretell train configs/mine.yaml --student x", []),
        ("foretell train configs/broken.yaml --student ", []),
        ("foretell listen configs/mine.yaml --system te", ["teacher_guided"]),
        ("foretell convert runs/mine/store new --profile co", ["compact"]),
        (f"foretell train {'x' * 300} --student ", []),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_tab_key_offers_what_fits(line, expected, monkeypatch, capsys):
    assert offered(line, monkeypatch, capsys) == expected


MINE = "foretell run configs/mine.yaml --set"


@pytest.mark.parametrize(
    ("line", "begin", "expected"),
    [
        (f"{MINE} rollout.sampler.to", "rollout.sampler.",
         ["top_k=", "top_p=", "too_short_multiple=", "too_short_weight=", "too_long_multiple=",
          "too_long_weight="]),
        (f"{MINE} students.half.optimizer.st", "students.half.optimizer.", ["steps=", "steps=..."]),
        (f"{MINE} students.other.", "", []),
        (f"{MINE} teacher.model.lo", "teacher.model.local_transformer",
         ["=", ".d_model=", ".layers=", ".heads="]),
        ("foretell run configs/broken.yaml --set teacher.model.lora.ra", "teacher.model.lora.",
         ["rank=", "rank=..."]),
        ("foretell run --set teacher.model.lora.ra", "teacher.model.lora.", ["rank=", "rank=..."]),
        ("foretell train --set students.student.loss.er", "students.student.loss.error=",
         ["mse", "l1", "huber", "log_cosh"]),
        (f"{MINE} rollout.samples=", "", ["null"]),
        (f"{MINE} rollout.batch_size=", "", []),
        (f"{MINE} rollout.nothing=", "", []),
        (f"{MINE} nothing", "", []),
        (f"{MINE} evaluate.split=d", "", ["dev"]),
        (f"{MINE}=evaluate.split=d", "", ["dev"]),
        ("foretell inspect audit configs/m", "", ["configs/mine.yaml"]),
        ("foretell inspect audit configs/mine.yaml --set evaluate.split=d", "", ["dev"]),
        (f"{MINE}=evaluate.sp", "evaluate.split=", ["dev", "test"]),
        (f"{MINE} seed=3 --set prepare.lower_case=", "", ["true", "false"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("folder")
def test_a_key_of_the_configuration_and_its_few_values_are_offered(
    line, begin, expected, monkeypatch, capsys
):
    assert set(offered(line, monkeypatch, capsys)) == {begin + end for end in expected}


@pytest.mark.usefixtures("folder")
def test_the_kind_of_a_section_chooses_its_keys_and_may_be_changed(monkeypatch, capsys):
    target = offered(f"{MINE} rollout.target.", monkeypatch, capsys)
    names = {each.removeprefix("rollout.target.").partition("=")[0] for each in target}
    assert names == {"kind", "k", "temperatures", "moments", "tail_samples", "dtype"}
    kinds = offered(f"{MINE} rollout.target.kind=", monkeypatch, capsys)
    assert kinds == ["top_k", "full", "sampled", "hidden", "dense"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_of_a_shipped_configuration_is_offered(path):
    document, known = yaml.safe_load(path.read_text()), settable_keys(load_config(path))
    assert [key for key in leaves(document, known) if key not in known] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "magpie_tiny", "orpheus_tiny", "digits_cfg"])
def test_what_is_offered_for_a_key_may_stand_there(name):
    path, refused = ROOT / "configs" / f"{name}.yaml", []
    known = settable_keys(load_config(path))
    assert sum(len(key.values) for key in known.values()) > 100
    for key, found in known.items():
        for value in found.values:
            try:
                load_config(path, [f"{key}={value}"])
            except UserError as error:  # of two settings that do not go together, one may be right
                wrong = rf"  {re.escape(key)}: (unknown key|Input should be|{value!r} is none of)"
                refused += re.findall(wrong, str(error))
    assert refused == []


def leaves(document, known, prefix=""):
    """Keys of a document that hold no section, or one that is a value of its own."""
    for name, value in document.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from leaves(value, known, f"{key}.")
        else:
            yield key


def test_completion_looks_at_a_bounded_number_of_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.completion.MOST_ENTRIES", 3)
    for number in range(9):
        Path(f"{number}.yaml").write_text("")
    assert offered("foretell run ", monkeypatch, capsys) == ["0.yaml", "1.yaml", "2.yaml"]


@pytest.mark.usefixtures("folder")
def test_a_fault_offers_nothing_and_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.config_keys.settable_keys", lambda config: 1 / 0)
    with redirect_stderr(StringIO()) as err:
        assert offered(f"{MINE} se", monkeypatch, capsys) == []
    assert err.getvalue() == ""


@pytest.mark.usefixtures("folder")
def test_zsh_is_told_on_one_line_what_a_key_means(monkeypatch, capsys):
    monkeypatch.setenv("_FORETELL_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"{MINE} rollout.device")
    with patch("sys.argv", ["foretell"]), pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().out.splitlines()
    assert '"rollout.device=":"Torch device' in line


@pytest.mark.usefixtures("folder")
def test_completion_comes_without_torch():
    script = (
        "import sys; from pipeline.entry import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    environment = os.environ | asked(f"{MINE} evaluate.split=d") | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dev\n", "")


def test_bash_is_told_how_to_ask(capsys, monkeypatch):
    monkeypatch.setenv("_FORETELL_COMPLETE", "source_bash")
    with patch("sys.argv", ["foretell"]), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert "_FORETELL_COMPLETE=complete_bash" in script
    assert re.search(r"complete .*foretell", script)
