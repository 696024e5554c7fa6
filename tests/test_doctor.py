"""`foretell doctor`: what it says is what a stage would say, and nothing on a machine breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from pipeline import doctor, packages
from pipeline.config import load_config
from pipeline.doctor import diagnose, everything
from pipeline.doctor_text import diagnosis_text
from pipeline.entry import main
from pipeline.needs import needs
from pipeline.probe import ASKED, reason
from stages.errors import UserError
from stages.event_file import EventFile
from stages.family import load_audio_codec_class, load_denoiser, load_family, load_image_encoder
from stages.quantization import quantize
from store import StoreError
from store.object_client import ObjectClient
from store.object_url import ObjectUrl

ROOT = Path(__file__).parent.parent
LATE = {  # ability → a module without which it cannot be
    "family causal_lm": "stages.families.causal_lm",
    "family diffusion": "stages.families.diffusion",
    "family magpie": "stages.families.magpie",
    "audio-codec nemo": "stages.families.nemo_codec",
    "audio-codec snac": "stages.families.snac_codec",
    "image-encoder pipeline": "stages.families.diffusion_encoders",
    "quantization int8 on cpu": "torchao",
    "quantization int4 on cpu": "bitsandbytes",
    "tensorboard event-files": "tensorboard.compat.proto",
    "object-storage s3://bucket/store": "obstore",
}


def stage(ability: str, folder: Path) -> None:
    """Do what a stage does first that needs an ability."""
    kind, _, name = ability.partition(" ")
    match kind:
        case "family":
            _ = load_denoiser() if name == "diffusion" else load_family(name)
        case "audio-codec":
            load_audio_codec_class(name)
        case "image-encoder":
            load_image_encoder()
        case "quantization":
            quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), name.split()[0], device="cpu")
        case "tensorboard":
            EventFile(folder, 0, [])
        case "object-storage":
            ObjectClient(ObjectUrl(url=name)).exists("manifest.json")


@pytest.mark.parametrize("ability", LATE)
def test_the_doctor_and_the_stage_say_the_same_where_a_package_is_missing(
    ability, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, LATE[ability], None)
    with pytest.raises((UserError, StoreError)) as refused:
        stage(ability, tmp_path)
    assert reason(ability) == str(refused.value)
    assert doctor.INSTALL.search(reason(ability)), "there is something to type"


def test_a_package_that_does_not_fit_is_told_by_both(monkeypatch, tmp_path):
    broken = tmp_path / "brokenpackage.py"
    broken.write_text("from os import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        load_family.__globals__["FAMILIES"], "magpie", ("brokenpackage", "Magpie", "magpie")
    )
    with pytest.raises(UserError, match=r"'magpie' cannot be imported .*no_such_name.*pip install"):
        load_family("magpie")
    assert "cannot be imported (cannot import name 'no_such_name'" in reason("family magpie")


def test_what_is_there_is_no_reason():
    assert reason("family codec_lm") is None
    assert reason("quantization fp8 on cpu") is None
    assert reason("device cpu") is None
    assert "asked for" in reason("device cuda:99")
    with pytest.raises(UserError, match="begins with none of"):
        reason("dance")


def test_everything_can_be_asked_for():
    assert {ability.split(" ")[0] for ability in everything()} <= ASKED.keys()


def answer(**refused: str):
    """Stand in for the processes that import packages."""

    def ask(asked):
        machine = {"torch": "2.14.1", "cuda": "13.0", "devices": [
            {"name": "cpu", "memory_bytes": 2**34, "bf16": False, "fp8": False},
            {"name": "cuda:0 A GPU", "memory_bytes": 80 * 2**30, "bf16": True, "fp8": True},
        ]}  # fmt: skip
        answers = {ability: {"reason": refused.get(ability)} for ability in asked}
        return answers | {"machine": {"machine": machine}}

    return ask


def test_of_a_configuration_all_that_it_needs_is_told_and_what_to_install(tmp_path):
    config = load_config(ROOT / "configs" / "orpheus.yaml")
    missing = "family 'causal_lm' needs the package 'x': pip install 'foretell[orpheus]'"
    ask = answer(**{"family causal_lm": missing, "judge whisper": "none: pip install 'a[b]'"})
    with patch.object(doctor, "_ask", ask):
        found = diagnose(config)
    assert not found.ok
    assert found.install == ("pip install 'foretell[orpheus]'", "pip install 'a[b]'")
    by_name = {ability.name: ability for ability in found.abilities}
    assert by_name["family causal_lm"].key == "teacher.model.family"
    assert by_name["audio-codec snac"].ok
    assert "checkpoints/orpheus-3b is not there" in by_name["file checkpoints/orpheus-3b"].reason
    text = diagnosis_text(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "cuda:0 A GPU, 80.0 GiB, multiplies bf16 and fp8" in text
    assert "the run goes on" in text
    assert "Missing: " in text
    assert "judge whisper" not in text[text.index("Missing: ") :]


def test_a_judge_that_is_missing_is_told_but_stops_nothing(tiny_run):
    config = tiny_run.load('evaluate.judges=["whisper"]')
    with patch.object(doctor, "_ask", answer(**{"judge whisper": "whisper is not installed"})):
        found = diagnose(config)
    assert found.ok
    assert "All is here that this configuration needs." in diagnosis_text(found)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_what_shipped_configurations_need_can_be_asked_for(path):
    asked = [need.ability.split(" ")[0] for need in needs(load_config(path))]
    assert set(asked) <= {*ASKED, "file"}
    assert asked


def test_needs_are_found_wherever_they_stand(run_of):
    draft = run_of("draft").document
    quantized = {"quantization": {"method": "int8"}, "device": "cpu"}
    student = draft["students"]["student"] | {
        "optimizer": {"steps": 1, "tensorboard": True},
        "init": {"kind": "checkpoint", "path": "a/b"},
    }
    run = run_of(
        fitted=True,
        store="s3://bucket/mine",
        cluster={},
        rollout=draft["rollout"] | quantized,
        students={"s": student},
    )
    found = {need.ability: need for need in needs(run.load())}
    assert {
        "family codec_lm", "quantization int8 on cpu", "object-storage s3://bucket/mine", "slurm",
        "tensorboard event-files", "file a/b", "device cpu",
    } < found.keys()  # fmt: skip
    assert found["slurm"].optional
    assert found["quantization int8 on cpu"].key == "rollout.quantization"


def test_what_a_run_makes_itself_is_not_asked_for(run_of):
    draft = run_of("own")
    inside = str(draft.root / "earlier" / "student")
    init = {"kind": "checkpoint", "path": inside}
    student = draft.document["students"]["student"] | {"init": init}
    run = run_of("own", students={"student": student})
    assert f"file {inside}" not in [need.ability for need in needs(run.load())]
    elsewhere = run_of("other", students={"student": student})
    assert f"file {inside}" in [need.ability for need in needs(elsewhere.load())]


def test_a_package_that_ends_the_process_is_a_line_of_text(monkeypatch, tmp_path):
    (tmp_path / "dies.py").write_text(
        "import json, os, sys\n"
        "print('noise'); print(json.dumps({'ability': 'family codec_lm', 'reason': None}))\n"
        "sys.stdout.flush(); sys.stderr.write('AttributeError: no such thing\\n')\n"
        "os.kill(os.getpid(), 11) if 'kill' in sys.argv else sys.exit(1)\n"
    )
    run = subprocess.run

    def instead(command, **more):
        return run([command[0], str(tmp_path / "dies.py"), *command[3:]], **more)

    monkeypatch.setattr(subprocess, "run", instead)
    told = doctor._probe(["family codec_lm", "family magpie"])
    assert told["family codec_lm"]["reason"] is None
    assert told["family magpie"]["reason"] == "it cannot be imported: AttributeError: no such thing"
    assert "ended by SIGSEGV" in doctor._probe(["family magpie", "kill"])["kill"]["reason"]


def test_versions_are_compared_with_what_pyproject_asks_for(monkeypatch):
    monkeypatch.setattr(
        packages, "version",
        lambda name: {"numpy": "1.25.0", "torch": "2.14.1+cu130", "obstore": "0.12.1"}.get(name)
        or (_ for _ in ()).throw(packages.PackageNotFoundError(name)),
    )  # fmt: skip
    found = packages.asked_for()
    base = {package.name: package for package in found[""]}
    assert (base["numpy"].ok, base["numpy"].installed) == (False, "1.25.0")
    assert base["torch"].ok, "a build for a CUDA is the release"
    assert (base["zarr"].ok, base["zarr"].installed) == (False, None)
    assert found["s3"][0].ok
    assert {"magpie", "orpheus", "diffusion", "tensorboard"} <= found.keys()
    assert not {"dev", "bench"} & found.keys()
    with patch.object(doctor, "_ask", answer()):
        diagnosis = diagnose()
    assert not diagnosis.ok
    assert diagnosis.install[0] == "pip install --upgrade foretell"
    text = " ".join(diagnosis_text(diagnosis).split())
    assert "numpy 1.25.0 is there, >=1.26 is needed" in text


def test_an_installed_foretell_asks_for_the_same_as_its_checkout(monkeypatch):
    checkout = packages.asked_for()
    try:
        packages.metadata("foretell")
    except packages.PackageNotFoundError:
        pytest.skip("foretell is not installed here, it runs from its folder")
    monkeypatch.setattr(packages, "_checkout", lambda: None)
    installed = packages.asked_for()
    # What was added to the checkout since it was installed is not known to pip.
    assert {name for name in installed if name} <= checkout.keys()
    assert {p.name for p in installed["magpie"]} == {p.name for p in checkout["magpie"]}
    assert packages.python_wanted() == ">=3.11"


def test_credentials_are_named_and_never_shown(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:word@host")
    with patch.object(doctor, "_ask", answer()):
        told = diagnose().model_dump_json()
    assert "AWS_ACCESS_KEY_ID set with an endpoint of its own" in told
    assert not [secret for secret in ("AKIASECRET", "verysecret", "word") if secret in told]


@pytest.mark.slow
def test_the_command_asks_real_processes(run_of, monkeypatch, tmp_path):
    run = run_of(evaluate=None)
    code, out, _ = said("doctor", run.path, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True), found
    assert found["torch"] == torch.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert {ability["name"] for ability in found["abilities"]} >= {"family codec_lm"}
    document = yaml.safe_load(run.path.read_text())
    document["dataset"] = str(tmp_path / "nowhere")
    run.path.write_text(yaml.safe_dump(document))
    code, out, _ = said("doctor", run.path)
    assert code == 1
    assert "nowhere is not there" in " ".join(out.split())


def said(*arguments: str | Path) -> tuple[int, str, str]:
    with (
        patch.object(sys, "argv", ["foretell", *map(str, arguments)]),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, out.getvalue(), err.getvalue()
