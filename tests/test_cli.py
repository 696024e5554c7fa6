"""The command line: what machines rely on, and every mistake as one message without a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.audio import encode_wav
from stages.family import load_family
from store import PredictionStore
from store.schema import Compact, Hidden, Target, TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pipeline"]
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}


def in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; a traceback is never an answer."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert "Traceback" not in done.stderr
    return done


def foretell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is faster: the same entry point, output and code."""
    from pipeline.entry import main

    command = ["foretell", *map(str, arguments)]
    with (
        patch.object(sys, "argv", command),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


# ---- reports: no model is loaded, so they are quick


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, tiny_run):
    done = in_a_process("status", tiny_run.path, "--set", "rollout.sampler.temperature=0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"foretell: {tiny_run.path} is not a valid configuration:\n")
    assert "rollout.sampler.temperature: temperature is 0.0 but must be > 0" in done.stderr
    done = foretell("run", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stderr == (
        f"foretell: cannot read the configuration {tmp_path}/none.yaml: No such file or directory; "
        "correct the path, or write one with `foretell init`\n"
    )


def test_misuse_of_a_command_is_exit_code_2(tiny_run):
    assert foretell("status").returncode == 2
    assert foretell("dance", tiny_run.path).returncode == 2
    half = foretell("rollout", tiny_run.path, "--task", "1")
    assert (half.returncode, "give both, with task below tasks" in half.stderr) == (2, True)
    beyond = foretell("rollout", tiny_run.path, "--task", "3", "--tasks", "3")
    assert (beyond.returncode, "give both, with task below tasks" in beyond.stderr) == (2, True)
    stranger = foretell("train", tiny_run.path, "--student", "nobody")
    assert (stranger.returncode, "'train:nobody'" in stranger.stderr) == (2, True)


def test_status_of_a_run_that_has_not_begun(run_of, tiny_run):
    run = run_of("new", evaluate=tiny_run.document["evaluate"])
    done = in_a_process("status", run.path, "--json")
    assert done.returncode == 1
    stages = json.loads(done.stdout)["stages"]
    assert list(stages) == ["fit", "rollout", "train:student", "evaluate"]
    assert {stage["state"] for stage in stages.values()} == {"missing"}
    assert stages["fit"] == {"planned": 6, "done": 0, "missing": 6, "state": "missing"}
    assert not run.root.exists(), "looking must not make anything"
    table = foretell("status", run.path)
    assert table.returncode == 1
    assert len(table.stdout.splitlines()) == 4


def test_inspect_says_what_is_in_a_store(tiny_run):
    done = foretell("inspect", tiny_run.root / "store", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    store = PredictionStore.open(tiny_run.root / "store")
    lengths = [len(store[key]) for key in store]
    assert {
        "shards": 5, "rollouts": 40, "timesteps": sum(lengths), "cfg_scale": 2.0,
    }.items() <= found.items()  # fmt: skip
    assert found["teacher"] == store.manifest.fingerprints.teacher
    assert found["targets"]["kind"] == "top_k"
    assert len(found["streams"]) == 4
    assert set(found["bytes"]) >= {"codes", "top_k.ids", "top_k.logits", "top_k.tail_logmass"}
    files = [p for p in (tiny_run.root / "store" / "shards").rglob("*") if p.is_file()]
    on_disk = sum(p.stat().st_size for p in files if p.name != "shard.json")
    assert sum(found["bytes"].values()) == on_disk
    text = foretell("inspect", tiny_run.root / "store")
    assert text.returncode == 0
    assert "top_k.logits" in text.stdout


def test_inspect_says_how_large_a_model_is_without_loading_it(tiny_run, tmp_path):
    teacher = tiny_run.root / "teacher"
    family = load_family("codec_lm").load(teacher, device="cpu", dtype=torch.float32)
    counted = family.architecture().model_dump(mode="json")
    script = (
        "import sys; from pipeline.cli import app; app(standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "inspect", str(teacher), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["family"], found["finished"]) == ("codec_lm", True)
    assert found["architecture"] == counted
    assert found["facts"]["speakers"] == ["high", "low"]
    stored = json.loads(foretell("inspect", tiny_run.root / "store", "--json").stdout)
    assert stored["architecture"] == counted, "the manifest says it of the teacher too"
    text = foretell("inspect", teacher).stdout
    assert f"{counted['parameters']:,} parameters" in text
    keyed = foretell("inspect", teacher, "--key", "a/0")
    assert (keyed.returncode, "is the folder of a model" in keyed.stderr) == (2, True)


def test_inspect_of_a_model_of_an_earlier_release_or_a_broken_one_says_so(tiny_run, tmp_path):
    described = json.loads((tiny_run.root / "teacher" / "config.json").read_text())
    del described["architecture"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    done = foretell("inspect", tmp_path)
    assert "not recorded" in done.stdout
    assert json.loads(foretell("inspect", tmp_path, "--json").stdout)["finished"] is False
    (tmp_path / "config.json").write_text("{}")
    broken = foretell("inspect", tmp_path)
    assert broken.returncode == 2
    (line,) = broken.stderr.splitlines()
    assert "holds no finished model (config.json is none of foretell's: config: Field req" in line
    assert "pydantic" not in line


def test_inspect_shows_a_rollout_and_a_timestep_as_the_store_has_them(tiny_run):
    store = PredictionStore.open(tiny_run.root / "store")
    sample_id, variation = next(iter(store))
    key = f"{sample_id}/{variation}"
    rollout = json.loads(foretell("inspect", store.path, "--key", key, "--json").stdout)
    assert rollout["codes"] == store[sample_id, variation].codes.tolist()
    assert rollout["stop_reason"] == store[sample_id, variation].stop_reason
    assert rollout["conditions"]["text"] == store.sample(sample_id)["text"]
    shown = foretell("inspect", store.path, "--key", f"{key}/1", "--json")
    streams = json.loads(shown.stdout)["streams"]
    arrays = store[sample_id, variation, 1].arrays
    for index, stream in enumerate(streams):
        assert stream["code"] == arrays["codes"][index]
        shown_ids = sorted(candidate["id"] for candidate in stream["candidates"])
        assert shown_ids == arrays["top_k.ids"][index].tolist()
        kept = sum(c["probability"] for c in stream["candidates"])
        assert kept + stream["tail_mass"] == pytest.approx(1, abs=1e-6)
        tail = np.exp(arrays["top_k.tail_logmass"][index, 0])
        assert stream["tail_mass"] == pytest.approx(float(tail))
    for wrong in ("nobody/0", f"{sample_id}/99", f"{key}/999", "nonsense"):
        assert foretell("inspect", store.path, "--key", wrong).returncode == 2


def test_verify_calls_a_sound_store_sound(tiny_run):
    done = in_a_process("verify", tiny_run.root / "store", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert {"ok": True, "shards": 5, "rollouts": 40, "bad": []}.items() <= found.items()
    assert found["timesteps"] > 0


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_file_and_array_that_are_damaged(tiny_run, tmp_path, damage):
    shutil.copytree(tiny_run.root / "store", tmp_path / "store")
    folder = tmp_path / "store" / "shards" / "00002" / "top_k.logits"
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    DAMAGES[damage](file)
    done = foretell("verify", tmp_path / "store", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert found["shards"] == 4
    (bad,) = found["bad"]
    assert bad["shard"] == 2
    assert bad["array"] == "top_k.logits"
    assert bad["file"] == str(file.relative_to(folder.parent))
    assert bad["reason"]


def test_verify_and_inspect_of_no_store_say_so(tmp_path):
    done = foretell("verify", tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith(f"store: manifest.json: {tmp_path} is no store")
    done = foretell("inspect", tmp_path)
    assert done.returncode == 2
    assert "is no store" in done.stderr


def test_what_the_system_refuses_is_one_message_and_code_1(tmp_path):
    long = "x" * 300
    store = ROOT / "tests" / "golden" / "fast" / "top_k"
    for arguments in (
        ("inspect", tmp_path / long),
        ("inspect", "serve", tmp_path / long),
        ("inspect", "plot", store, "-o", tmp_path / f"{long}.png"),
    ):
        done = foretell(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("foretell: cannot go on: ")
        assert line.endswith("the path is too long: choose a shorter one")


# ---- mistakes that a stage notices, each by its own worker process


@pytest.fixture
def refused(start_worker):
    """Run a stage that must be refused; return its message."""

    def run(stage: str, run_, *options: str, code: int = 2) -> str:
        worker = start_worker(stage, run_, *options)
        found = worker.wait()
        message = worker.stderr.read_text()
        assert "Traceback" not in message, message
        assert found == code, message
        return message

    return run


def corpus_of(folder: Path, rows: list[str], wavs: dict[str, bytes] | None = None) -> Path:
    import soundfile

    (folder / "wavs").mkdir(parents=True)
    (folder / "metadata.csv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    for row in rows:
        tone = 0.3 * np.sin(np.arange(8000) * 0.3)
        soundfile.write(folder / "wavs" / f"{row.split('|')[0]}.wav", tone, 8000)
    for name, content in (wavs or {}).items():
        (folder / "wavs" / name).write_bytes(content)
    return folder


def prepare_run(run_of, tiny_run, source: Path):
    section = tiny_run.document["prepare"] | {
        "source": str(source),
        "dev_texts": 0,
        "test_texts": 0,
    }
    return run_of(
        "prepared", prepare=section, dataset=None, teacher=None, fit=None, rollout=None,
        students=None,
    )  # fmt: skip


def test_bad_recordings_are_rejected_by_name_and_counted_and_stop_nothing(
    run_of, tiny_run, tmp_path, start_worker
):
    rows = [f"clip-{i}|text {letter}|text {letter}|low" for i, letter in enumerate("abcdef")]
    rows += ["clip-1|again|again|low", "broken|text g|text g|low"]
    rows += ["wordless|  ||low", "silent|text h|text h|low"]
    silence = encode_wav(np.zeros(8000, np.float32), 8000)
    wavs = {"broken.wav": b"RIFF nothing", "silent.wav": silence}
    source = corpus_of(tmp_path / "corpus", rows, wavs)
    (source / "wavs" / "clip-2.wav").unlink()
    run = prepare_run(run_of, tiny_run, source)
    worker = start_worker("prepare", run)
    assert worker.wait() == 0, worker.stderr.read_text()
    rejected = pq.read_table(run.root / "dataset" / "rejected.parquet").to_pylist()
    reasons = {(row["sample_id"], row["reason"].split(":")[0]) for row in rejected}
    assert reasons == {
        ("clip-1", "duplicate sample_id"),
        ("clip-2", "missing audio"),
        ("broken", "unreadable audio"),
        ("wordless", "empty text"),
        ("silent", "silent audio"),
    }
    told = worker.stderr.read_text()
    assert "4 of 10 recordings accepted" in told
    assert "6 rejected, each with its reason in rejected.parquet" in told
    for kind, count, name in (
        ("duplicate sample_id", 2, "clip-1"), ("missing audio", 1, "clip-2"),
        ("unreadable audio", 1, "broken"), ("empty text", 1, "wordless"),
        ("silent audio", 1, "silent"),
    ):  # fmt: skip
        assert re.search(rf"^{kind} +{count}  '{name}'", told, re.MULTILINE), kind


def test_a_dataset_without_one_good_clip_is_refused(run_of, tiny_run, tmp_path, refused):
    empty = corpus_of(tmp_path / "empty", [])
    assert "has no rows" in refused("prepare", prepare_run(run_of, tiny_run, empty))
    broken = corpus_of(tmp_path / "broken", ["a|text|text|low"], {"a.wav": b"nothing"})
    message = refused("prepare", prepare_run(run_of, tiny_run, broken))
    assert "no recording of" in message
    assert "unreadable audio: 1" in message
    nowhere = prepare_run(run_of, tiny_run, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in refused("prepare", nowhere)
    assert not (nowhere.root / "dataset").exists()


def rollout_run(run_of, tiny_run, **changes: Any):
    section = tiny_run.document["rollout"] | changes
    return run_of("rolled", fitted=True, rollout=section, students=None)


def test_a_k_beyond_the_vocabulary_is_refused(run_of, tiny_run, refused):
    run = rollout_run(run_of, tiny_run, target={"kind": "top_k", "k": 99})
    message = refused("rollout", run)
    assert "k is 99 but must be <= 17, the allowed ids of stream 'backbone.0'" in message
    assert not (run.root / "store").exists()


def test_a_split_without_samples_and_an_unknown_one_are_refused(run_of, tiny_run, refused):
    assert "split='nope' is none of" in refused(
        "rollout", rollout_run(run_of, tiny_run, split="nope")
    )


def test_a_store_of_another_teacher_or_dataset_or_with_other_settings_is_refused(
    run_of, tiny_run, refused, tmp_path
):
    store = {"store": str(tiny_run.root / "store")}
    run = run_of("own", fitted=True, students=None, **store)
    assert "cfg" not in refused("rollout", run, code=0)
    other = tiny_run.document["rollout"] | {"guidance": {"scale": 3.0}}
    message = refused("rollout", run_of("own", fitted=True, students=None, rollout=other, **store))
    assert "differs in guidance.scale: 2.0 in the store, 3.0 given" in message
    teacher = shutil.copytree(tiny_run.root / "teacher", tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["head.weight"] += 1
    save_file(tensors, teacher / "model.safetensors")
    run = run_of("own", fitted=True, students=None, teacher={"checkpoint": str(teacher)}, **store)
    assert "differs in fingerprints.teacher" in refused("rollout", run)
    dataset = shutil.copytree(tiny_run.root / "dataset", tmp_path / "dataset")
    altered(dataset)
    run = run_of("own", fitted=True, students=None, dataset=str(dataset), **store)
    assert "differs in fingerprints.dataset" in refused("rollout", run)
    run = run_of("own", fitted=True, rollout=None, dataset=str(dataset), **store)
    assert "was made from the dataset" in refused("train:student", run)


def altered(dataset: Path) -> None:
    """Leave the last sample out and describe the dataset again: sound, and another one."""
    from stages.dataset import SAMPLES, fingerprint

    header = json.loads((dataset / "dataset.json").read_text())
    table = pq.read_table(dataset / "samples.parquet")
    table = pa.table(table.slice(0, table.num_rows - 1).to_pydict(), SAMPLES)
    pq.write_table(table, dataset / "samples.parquet")
    header["fingerprint"] = fingerprint(table, header["facts"]["audio_codec"])
    (dataset / "dataset.json").write_text(json.dumps(header))


def test_a_damaged_dataset_is_refused(run_of, tiny_run, refused, tmp_path):
    dataset = shutil.copytree(tiny_run.root / "dataset", tmp_path / "dataset")
    header = json.loads((dataset / "dataset.json").read_text())
    altered(dataset)
    (dataset / "dataset.json").write_text(json.dumps(header))
    run = run_of("own", fitted=True, students=None, dataset=str(dataset))
    assert "a file was altered" in refused("rollout", run)


def test_a_store_path_inside_a_store_is_refused(run_of, tiny_run, refused):
    inside = tiny_run.root / "store" / "shards" / "mine"
    run = run_of("own", fitted=True, students=None, store=str(inside))
    assert "lies inside the store" in refused("rollout", run)
    assert not inside.exists()


def test_nan_from_a_teacher_ends_the_stage_with_its_place(run_of, tiny_run, refused, tmp_path):
    teacher = shutil.copytree(tiny_run.root / "teacher", tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["head.weight"][0] = torch.nan
    save_file(tensors, teacher / "model.safetensors")
    run = run_of("own", fitted=True, students=None, teacher={"checkpoint": str(teacher)})
    message = refused("rollout", run, code=1)
    assert "NaN" in message
    assert "variation" in message
    assert PredictionStore.open(run.root / "store").committed == []


def test_guidance_without_condition_dropout_warns_and_goes_on(run_of, tiny_run, refused, tmp_path):
    teacher = shutil.copytree(tiny_run.root / "teacher", tmp_path / "teacher")
    described = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(described | {"condition_dropout": 0.0}))
    run = run_of("own", fitted=True, students=None, teacher={"checkpoint": str(teacher)})
    message = refused("rollout", run, code=0)
    assert "trained without condition dropout" in message
    assert message.count("condition dropout") == 1


def test_text_that_the_teacher_has_no_characters_for_is_refused(
    run_of, tiny_run, refused, tmp_path
):
    teacher = shutil.copytree(tiny_run.root / "teacher", tmp_path / "teacher")
    described = json.loads((teacher / "config.json").read_text())
    described["facts"]["alphabet"] = described["facts"]["alphabet"].replace("b", "z")
    (teacher / "config.json").write_text(json.dumps(described))
    run = run_of("own", fitted=True, students=None, teacher={"checkpoint": str(teacher)})
    message = refused("rollout", run)
    assert "can be rolled out; the first, " in message
    assert "text outside the alphabet: " in message
    assert "'b'" in message


def train_run(run_of, tiny_run, name: str = "trained", **changes: Any):
    student = tiny_run.document["students"]["student"]
    merged = {
        key: student.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    store = str(tiny_run.root / "store")
    return run_of(name, store=store, students={"student": student | merged}, rollout=None)


REFUSED_STUDENTS = {
    "other frame stacking": (
        {"model": {"frames_per_step": 1}},
        ("the student's streams", "frame stacking"),
    ),
    "a local transformer": (
        {"model": {"local_transformer": {"d_model": 16, "heads": 2}}},
        ("the student's streams (", "local.0:18"),
    ),
    "a temperature that is not stored": (
        {"loss": {"temperature": 2.0}},
        ("loss.temperature=2.0: the store keeps", "[1.0] only", "roll out with it listed"),
    ),
    "nrmse without moments": (
        {"loss": {"nrmse": 1.0}},
        ("loss.nrmse=1.0: it needs the moments", "target.moments: true"),
    ),
    "codebook weights that do not fit": (
        {"loss": {"codebook_weights": [1.0, 1.0, 1.0]}},
        ("3 codebook_weights do not fit 4 streams",),
    ),
    "a device that is not there": (
        {"optimizer": {"device": "cuda:99"}},
        ("cuda:99",),
    ),
}


@pytest.mark.parametrize("case", REFUSED_STUDENTS)
def test_a_student_that_the_store_cannot_teach_is_refused(run_of, tiny_run, refused, case):
    changes, words = REFUSED_STUDENTS[case]
    run = train_run(run_of, tiny_run, **changes)
    message = refused("train:student", run)
    assert all(word in message for word in words), message
    assert not (run.root / "student" / "checkpoints").exists()


def test_a_student_of_other_codebooks_or_sizes_is_refused(run_of, tiny_run, refused, tmp_path):
    checkpoint = shutil.copytree(tiny_run.root / "student", tmp_path / "checkpoint")
    other = train_run(
        run_of, tiny_run, init={"kind": "checkpoint", "path": str(checkpoint)},
        model={"d_model": 24},
    )  # fmt: skip
    message = refused("train:student", other)
    assert "d_model" in message, "a checkpoint of another architecture is not taken silently"


def test_training_from_a_store_of_another_dataset_is_refused(run_of, tiny_run, refused, tmp_path):
    dataset = shutil.copytree(tiny_run.root / "dataset", tmp_path / "dataset")
    altered(dataset)
    student = {"student": tiny_run.document["students"]["student"]}
    run = run_of(
        "own", store=str(tiny_run.root / "store"), dataset=str(dataset), students=student,
        rollout=None,
    )  # fmt: skip
    assert "dataset" in refused("train:student", run)


def test_an_unfinished_store_is_refused_for_training(run_of, tiny_run, refused, tmp_path):
    store = shutil.copytree(tiny_run.root / "store", tmp_path / "store")
    shutil.rmtree(store / "shards" / "00003")
    run = run_of("own", store=str(store), rollout=None)
    message = refused("train:student", run)
    assert "lacks 1 of 5 shards (first: 00003)" in message


def test_a_damaged_store_is_noticed_in_training(run_of, tiny_run, refused, tmp_path):
    store = shutil.copytree(tiny_run.root / "store", tmp_path / "store")
    folder = store / "shards" / "00002" / "top_k.ids"
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    message = refused("train:student", run_of("own", store=str(store), rollout=None))
    assert "shard 00002" in message
    assert "top_k.ids" in message


def test_training_with_other_settings_over_a_checkpoint_is_refused(run_of, tiny_run, refused):
    refused("train:student", train_run(run_of, tiny_run), code=0)
    message = refused("train:student", train_run(run_of, tiny_run, loss={"ce": 1.0}))
    assert "holds a checkpoint of step 6 that was trained with other settings or data" in message


def test_convert_shrinks_a_store_verifies_it_and_goes_on_where_it_stopped(tiny_run, tmp_path):
    source, there, back = tiny_run.root / "store", tmp_path / "compact", tmp_path / "fast"
    done = foretell("convert", source, there, "--profile", "compact", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["bytes_after"] < result["bytes_before"]
    assert result["written"] == result["shards"] == len(PredictionStore.open(source).committed)
    assert result["losses"]["top_k.ids"]["exact"]
    assert 0 < result["mean_kl"] <= result["max_kl"] <= 3e-4 * 1.001
    again = foretell("convert", source, there, "--profile", "compact")
    assert "0 written now" in again.stdout
    assert "top_k.logits: KL" in again.stdout
    assert json.loads(foretell("inspect", there, "--json").stdout)["profile"]["kind"] == "compact"
    assert foretell("convert", there, back, "--profile", "fast").returncode == 0
    assert foretell("verify", back).returncode == 0


def synthetic(path: Path, target: Target) -> Path:
    store = synthetic_store(path, synthetic_manifest(target), 2, 1, 2)
    write_synthetic_shard(store, 0, 20)
    return path


def test_convert_rounds_states_by_the_step_that_it_is_given(tmp_path):
    source = synthetic(tmp_path / "fast", Hidden())
    step = ["--profile", "compact", "--hidden-step", "0.125"]
    done = foretell("convert", source, tmp_path / "compact", *step)
    assert done.returncode == 0
    assert PredictionStore.open(tmp_path / "compact").manifest.profile == Compact(hidden_step=0.125)
    stated = "by the profiles of the 2 stores from the first on, a state may be off by 6.25% of its"
    assert stated in done.stdout
    assert "row of logits" not in done.stdout


def test_convert_states_what_all_roundings_since_the_first_store_may_have_cost(tmp_path):
    store = synthetic(tmp_path / "0", TopK(k=4))
    for number, profile in enumerate((["compact", "--loss-nats", "0.05"], ["fast"]), 1):
        done = foretell("convert", store, tmp_path / str(number), "--profile", *profile)
        assert "stores from the first on, a row of logits may have lost 0.05 nats" in done.stdout
        store = tmp_path / str(number)
    assert "by the profiles of the 3 stores" in done.stdout


def test_convert_refuses_what_it_cannot_do(tiny_run, tmp_path):
    source = tiny_run.root / "store"
    for words, *arguments in (
        ["one lies within the other", source / "inner", "--profile", "compact"],
        ["--loss-nats 0.1 is for", tmp_path / "x", "--profile", "fast", "--loss-nats", "0.1"],
        ["--hidden-step 0.1 is for", tmp_path / "x", "--profile", "fast", "--hidden-step", "0.1"],
        ["--loss-nats -1.0: ", tmp_path / "x", "--profile", "compact", "--loss-nats", "-1"],
        ["--hidden-step 2.0: hid", tmp_path / "x", "--profile", "compact", "--hidden-step", "2"],
        ["'small' is not one of", tmp_path / "x", "--profile", "small"],
    ):
        done = foretell("convert", source, *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert words in done.stderr
