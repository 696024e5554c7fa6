"""`foretell inspect audio` and `foretell inspect audit`, as a person calls them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.stored_audio import StoredAudio
from stages.audio import read_audio, to_pcm16
from stages.audio_codec import load_audio_codec
from stages.code_drift import code_drift
from stages.drift_limits import limit_of
from stages.errors import UserError
from stages.family import load_family
from stages.stored_frames import stored_frames
from store import PredictionStore
from tests.diffusion_stores import write_store
from tests.rewritten import rewritten
from tests.test_causal_lm import family_of as language_model_of
from tests.test_causal_lm import folder, tiny  # noqa: F401, fixtures: a tiny language model
from tests.test_causal_lm import samples_of as language_samples_of
from tests.test_cli import foretell
from tests.test_rollout import VARIANTS, teacher_of, written

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KEY = ("clip-00", 1)


@pytest.fixture(scope="module")
def store(tiny_run: Any) -> PredictionStore:
    return PredictionStore.open(tiny_run.root / "store")


@pytest.fixture(scope="module")
def key(store: PredictionStore) -> tuple[str, int]:
    """The longest rollout."""
    return max(store.keys(), key=lambda key: len(store[key]))


# ---- frames


def described(family: Any) -> Any:
    """What a manifest of an earlier release says of a family's codes."""
    return SimpleNamespace(
        family=family.name,
        streams=family.streams,
        end_id=family.end_id,
        forbidden=family.forbidden,
        conditioning=family.facts.model_dump(mode="json"),
        recording={},
    )


def require_frames(family: Any, codes: torch.Tensor) -> None:
    found = stored_frames(described(family), codes)
    assert torch.equal(found, family.frames(codes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_manifest_gives_the_frames_that_the_family_gives(variant):
    family, random = teacher_of(**VARIANTS[variant]), np.random.default_rng(1)
    allowed = [*range(14), family.end_id]
    for length in (1, 2, 9):
        codes = random.choice(allowed, size=(length, len(family.streams)))
        require_frames(family, torch.from_numpy(codes))


def test_slots_of_a_language_model_are_frames_up_to_its_end(folder):  # noqa: F811
    family = language_model_of(folder)
    codes = torch.randint(0, 6, (5, 7), generator=torch.Generator().manual_seed(0))
    require_frames(family, codes)
    for place in ((0, 0), (2, 3), (4, 6)):
        ended = codes.clone()
        ended[place] = family.end_id
        require_frames(family, ended)
        assert len(stored_frames(described(family), ended)) == place[0]


class FakeCodec:
    """An audio codec whose samples are the codes that it is given."""

    output_sample_rate_hz = 100

    def decode(self, frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames.astype(np.float32)).flatten()


def heard(store: PredictionStore, key: tuple[str, int], monkeypatch: Any) -> np.ndarray:
    monkeypatch.setattr("stages.audio_codec.load_audio_codec", lambda _: FakeCodec())
    return StoredAudio(store, store.path).waveform(*key).samples


@pytest.fixture
def whole(folder, tmp_path) -> tuple[Any, PredictionStore]:  # noqa: F811
    """A language model that predicts its whole vocabulary, and a store of its run."""
    family = language_model_of(folder, vocabulary="full")
    sampler = {"temperature": 2.0, "max_timesteps": 4, "min_timesteps": 1}
    path = tmp_path / "run" / "store"
    return family, written(path, family, language_samples_of(3), sampler=sampler)


def test_ids_of_a_whole_vocabulary_are_heard_as_codes_of_their_slots(whole, monkeypatch):
    family, store = whole
    layout = family.config.layout
    assert store.manifest.recording == {"layout": layout.model_dump(mode="json")}
    first = layout.audio_base_id + layout.codes_per_slot * np.arange(7)
    for key in store:
        codes = store[key].codes.astype(np.int64)
        whole_frames = ~(codes == layout.end_id).any(-1)
        frames = (codes - first)[whole_frames]
        assert ((frames >= 0) & (frames < family.facts.codes_per_codebook)).all()
        assert torch.equal(torch.from_numpy(frames), family.frames(torch.from_numpy(codes)))
        np.testing.assert_array_equal(heard(store, key, monkeypatch), frames.flatten())


def test_which_ids_are_audio_is_asked_of_the_run_where_an_earlier_release_wrote(
    whole, tmp_path, monkeypatch
):
    family, store = whole
    earlier = rewritten(store, tmp_path / "old" / "store", recording={})
    key = next(iter(store))
    with pytest.raises(UserError, match=r"manifest does not say .* and of the models .* none says"):
        heard(earlier, key, monkeypatch)
    family.save(tmp_path / "old" / "student_half")
    expected = heard(store, key, monkeypatch)
    np.testing.assert_array_equal(heard(earlier, key, monkeypatch), expected)
    family.save(tmp_path / "old" / "teacher")
    config = tmp_path / "old" / "teacher" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"audio_base_id": 300', '"audio_base_id": 304'), "utf-8")
    with pytest.raises(UserError, match="some disagree"):
        heard(earlier, key, monkeypatch)
    shutil.rmtree(tmp_path / "old" / "student_half")
    with pytest.raises(UserError, match="is no code of slot"):
        heard(earlier, key, monkeypatch)


def test_a_store_that_an_earlier_release_began_goes_on(whole, tmp_path):
    _, store = whole
    earlier = rewritten(store, tmp_path / "old", recording={})
    PredictionStore.create(
        earlier.path, store.manifest.model_copy(update={"files": {}}), store.plan, store.samples
    )


# ---- audio


def test_a_rollout_sounds_as_the_audio_codec_decodes_its_codes(tiny_run, store, key, tmp_path):
    path = tmp_path / "x.wav"
    done = foretell("inspect", "audio", store.path, f"{key[0]}/{key[1]}", "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    weights = tiny_run.root / "teacher"
    teacher = load_family("codec_lm").load(weights, device="cpu", dtype=torch.float32)
    frames = teacher.frames(torch.from_numpy(store[key].codes.astype(np.int64))).numpy()
    expected = load_audio_codec(tiny_run.root / "dataset" / "audio_codec").decode(frames)
    waveform, rate_hz = read_audio(path)
    assert rate_hz == 8000
    assert len(expected) > 0
    np.testing.assert_array_equal(to_pcm16(waveform), to_pcm16(expected))
    found = json.loads(done.stdout)
    assert found["samples"] == len(expected)
    assert found["audio_s"] == len(expected) / 8000
    assert (found["sample_id"], found["variation"]) == key
    assert found["timesteps"] == len(store[key])
    assert found["stop_reason"] == store[key].stop_reason


def test_the_recording_behind_a_rollout_is_what_its_own_codes_sound_like(tiny_run, store, key):
    from stages.dataset import Dataset

    dataset = Dataset.open(tiny_run.root / "dataset")
    (sample,) = (each for each in dataset.samples("train") if each["sample_id"] == key[0])
    found = StoredAudio.open(store).recording(key[0])
    expected = dataset.audio_codec().decode(dataset.codes(sample))
    np.testing.assert_array_equal(found.samples, expected.numpy())
    with pytest.raises(UserError, match="has no sample 'nobody'"):
        StoredAudio.open(store).recording("nobody")


def test_a_file_that_is_there_is_replaced_only_if_a_person_says_so(store, key, tmp_path):
    path, named = tmp_path / "x.wav", f"{key[0]}/{key[1]}"
    path.write_bytes(b"mine")
    done = foretell("inspect", "audio", store.path, named, "-o", path)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert path.read_bytes() == b"mine"
    done = foretell("inspect", "audio", store.path, named, "-o", path, "--force", "--recording")
    assert done.returncode == 0
    assert done.stdout.startswith(f"the recording {key[0]!r}")
    assert path.read_bytes().startswith(b"RIFF")
    assert [each.name for each in tmp_path.iterdir()] == ["x.wav"]


@pytest.mark.parametrize(
    ("key", "output", "message"),
    [
        ("nothing", "x.wav", "is not SAMPLE/VARIATION, such as 'clip-"),
        ("clip-99/0", "x.wav", "is not planned"),
        ("clip-00/0", "x.mp3", "ends in .wav"),
        ("clip-00/0", ".", "ends in .wav"),
    ],
)
def test_what_is_no_rollout_or_no_wav_file_is_refused(store, tmp_path, key, output, message):
    done = foretell("inspect", "audio", store.path, key, "-o", tmp_path / output)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_audio_codec_that_is_not_the_stores_is_refused(tiny_run, store, tmp_path):
    with pytest.raises(UserError, match=r"no audio codec can be read .* \(--dataset\)"):
        StoredAudio.open(store, tmp_path)
    copied = tmp_path / "elsewhere" / "store"
    shutil.copytree(store.path, copied)
    with pytest.raises(UserError, match="no audio codec is beside the store"):
        StoredAudio.open(PredictionStore.open(copied))
    StoredAudio.open(PredictionStore.open(copied), tiny_run.root / "dataset")
    shutil.copytree(tiny_run.root / "dataset" / "audio_codec", tmp_path / "audio_codec")
    header = tmp_path / "audio_codec" / "audio_codec.json"
    other = json.loads(header.read_bytes()) | {"fingerprint": "5e" * 32}
    header.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(UserError, match=f"is {'5e' * 32}, with which they would sound wrong"):
        StoredAudio.open(store, tmp_path)


def test_a_package_of_the_audio_codec_that_is_missing_is_named(store, key, tmp_path, monkeypatch):
    (tmp_path / "audio_codec").mkdir()
    header = {"kind": "snac", "fingerprint": store.manifest.fingerprints.audio_codec}
    path = tmp_path / "audio_codec" / "audio_codec.json"
    path.write_text(json.dumps(header), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "snac", None)
    monkeypatch.delitem(sys.modules, "stages.families.snac_codec", raising=False)
    audio = StoredAudio.open(store, tmp_path)
    with pytest.raises(UserError, match=r"pip install 'foretell\[orpheus\]'"):
        audio.waveform(*key)


def test_of_images_there_is_nothing_to_hear(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    done = foretell("inspect", "audio", store.path, "a/0", "-o", tmp_path / "x.wav")
    assert done.returncode == 2
    assert "is a store of images, of which there is nothing to hear" in done.stderr


def test_finding_an_audio_codec_loads_neither_it_nor_torch(store):
    script = (
        "import sys; from store import PredictionStore; from pipeline.stored_audio import *;"
        f"StoredAudio.open(PredictionStore.open({str(store.path)!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- audit


@pytest.fixture
def audited(tiny_run: Any, run_of: Any) -> Any:
    """A run whose store is that of `tiny_run`, and whose teacher is yet to be named."""

    def audit(*options: str, teacher: Path | None = None) -> subprocess.CompletedProcess[str]:
        document = {"teacher": {"checkpoint": str(teacher or tiny_run.root / "teacher")}}
        run = run_of(fit=None, store=str(tiny_run.root / "store"), **document)
        return foretell("inspect", "audit", run.path, "--fraction", "0.2", *options)

    return audit


def copied(teacher: Path, path: Path) -> Path:
    shutil.copytree(teacher, path)
    return path


def test_a_store_that_its_teacher_wrote_passes(audited, store):
    done = audited("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {
        "ok", "store", "fraction", "seed", "rollouts", "committed", "timesteps", "teacher_matches",
        "differences", "drift", "limit", "limit_from", "largest_mean", "not_finite", "above",
        "further",
    }, "names that machines rely on: one may be added here, none may go"  # fmt: skip
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    assert [name for name in found if f"`{name}`" not in page] == []
    assert found["ok"]
    assert found["teacher_matches"]
    assert found["differences"] == {}
    assert found["rollouts"] == -(-len(store) // 5)
    assert found["committed"] == len(store)
    assert 0 <= found["largest_mean"] < 1e-6 < found["limit"] < 1e-4
    streams = [part["name"] for part in found["drift"]["parts"]]
    assert streams == [stream.name for stream in store.manifest.streams]
    lines = audited().stdout.splitlines()
    assert lines[-1] == "it holds what this teacher predicts"
    assert all(len(line) <= 80 for line in lines[1:]), "fits a terminal"
    assert audited("--seed", "1", "--json").stdout != done.stdout


def test_what_is_stored_beside_predictions_decides_too(run_of, tiny_run, tmp_path):
    target = {"kind": "top_k", "k": 6, "moments": True, "tail_samples": 4}
    section = tiny_run.document["rollout"] | {"target": target, "variations": 1}
    run = run_of(fitted=True, rollout=section, students=None)
    run.do("rollout")

    def audit(*options: str, store: Path) -> subprocess.CompletedProcess[str]:
        other = run_of("again", fitted=True, rollout=section, students=None, store=str(store))
        return foretell("inspect", "audit", other.path, "--fraction", "1", *options)

    whole = PredictionStore.open(run.root / "store")
    done = audit("--json", store=whole.path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measures = [each["drift"]["measure"] for each in found["further"]]
    assert measures == ["kept_ids", "logit_mean", "logit_std", "tail_draws"]
    assert all(each["ok"] and each["above"] == [] for each in found["further"])

    def raised(_: object, arrays: dict[str, np.ndarray]) -> None:
        arrays["top_k.moments"][:, 1, 1] += 0.01

    altered = rewritten(whole, tmp_path / "altered", raised)
    done = audit("--json", "--limit", "9", store=altered.path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert found["above"] == [], "the predictions are as they were"
    names = [stream.name for stream in whole.manifest.streams]
    assert [each["above"] for each in found["further"]] == [[], [], [names[1]], []]
    text = audit(store=altered.path).stdout
    _, table = text.split("\nstandard deviation of the logits: difference beyond rounding, nats\n")
    assert f"\nABOVE IT       {names[1]}\n" in table
    assert text.endswith("IT DOES NOT HOLD WHAT THIS TEACHER PREDICTS\n")
    assert all(len(line) <= 80 for line in text.splitlines()[1:]), "fits a terminal"


def test_a_limit_that_a_person_sets_is_the_one_that_counts(audited):
    done = audited("--limit", "1e-12", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["ok"], found["limit"], found["limit_from"]) == (False, 1e-12, "--limit")
    text = audited("--limit", "1e-12").stdout
    assert "> 1.0e-12, the limit (--limit)\n" in text
    assert text.endswith("IT DOES NOT HOLD WHAT THIS TEACHER PREDICTS\n")


@pytest.mark.parametrize("limit", ["nan", "inf", "-1"])
def test_a_limit_that_is_none_is_refused(audited, limit):
    done = audited(f"--limit={limit}")
    assert done.returncode == 2
    assert f"foretell: --limit {limit} must be a number of at least 0" in done.stderr


def test_another_teacher_is_named_and_measured(audited, tiny_run, tmp_path):
    other = copied(tiny_run.root / "teacher", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, other / "model.safetensors")
    done = audited("--json", teacher=other)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert not found["teacher_matches"]
    assert list(found["differences"]) == ["teacher"]
    assert found["largest_mean"] > 1e-3
    text = audited(teacher=other).stdout
    assert "ANOTHER TEACHER\n  of the store  " in text
    assert text.endswith("IT DOES NOT HOLD WHAT THIS OTHER TEACHER PREDICTS\n")


def test_another_teacher_that_predicts_the_same_is_named_and_passes(audited, tiny_run, tmp_path):
    other = copied(tiny_run.root / "teacher", tmp_path / "other")
    config = json.loads((other / "config.json").read_bytes())
    config["condition_dropout"] += 0.01
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = audited(teacher=other)
    assert done.returncode == 0
    assert "ANOTHER TEACHER" in done.stdout
    assert done.stdout.endswith("it holds what this other teacher predicts\n")


def test_codes_behind_an_end_are_not_compared(folder, tmp_path):  # noqa: F811
    family = language_model_of(folder)
    sampler = {"temperature": 2.0, "max_timesteps": 4, "min_timesteps": 1}
    store = written(
        tmp_path / "store", family, language_samples_of(3), sampler=sampler, source="dataset"
    )
    (found,) = code_drift(family, store, list(store.keys()), batch_size=2)
    assert family.predicted is not None
    counted = sum(
        family.predicted(torch.from_numpy(store[key].codes.astype(np.int64))).sum(0)
        for key in store
    ).tolist()
    assert [part.predictions for part in found.parts] == counted
    assert counted[0] > counted[1], "after the end in a timestep's first slot nothing counts"
    assert found.within(limit_of(store.manifest, "fp32", quantized=False).value)


def test_ctrl_c_ends_an_audit_with_more_to_do(audited, monkeypatch):
    import pipeline.assembly

    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pipeline.assembly, "code_drift", interrupted)
    done = audited()
    assert (done.returncode, done.stdout) == (75, "")


def test_an_audit_writes_nothing(audited, tiny_run):
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tiny_run.root.rglob("*") if p.is_file()}

    before = files()
    assert audited().returncode == 0
    assert files() == before


def test_an_audit_of_what_is_not_there_is_one_message(audited):
    done = audited("--round", "two")
    assert done.returncode == 2
    assert "has no round 'two': it has none" in done.stderr
    done = audited("--set", "store=nowhere")
    assert done.returncode == 2
    assert "is no store" in done.stderr
