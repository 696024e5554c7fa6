"""What `foretell init` writes for models from elsewhere runs from data to report, as it stands.

The models are tiny ones in the files of the real ones. Only sizes are changed: steps, batches,
samples, lengths, and who judges the audio. What is read, held, stored and learned is what the file
says.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.teacher_files import has_baked_contexts
from store import PredictionStore
from tests.conftest import Program
from tests.magpie_models import Models
from tests.test_diffusion_run import IMPORTS as DIFFUSION
from tests.test_diffusion_run import tiny_pipelines, write_images
from tests.test_orpheus_run import SNAC

pytestmark = pytest.mark.slow

TRAINED = ("steps=3", "warmup_steps=1", "batch_size=4", "checkpoint_every=2")
SPEECH = (
    "prepare.dev_texts=2", "prepare.test_texts=3", "evaluate.samples=2", "evaluate.judges=[]",
    "evaluate.bootstrap_draws=100", "rollout.sampler.max_timesteps=12", "rollout.batch_size=10",
    *(f"students.student.optimizer.{size}" for size in TRAINED),
)  # fmt: skip


@pytest.fixture
def begun(foretell: Callable[..., Program], tmp_path: Path) -> Callable[..., Path]:
    """Write a first configuration by flags, run all of it in small, and return the run's folder."""

    def run(*flags: str | Path, sizes: tuple[str, ...], imports: list[str]) -> Path:
        path, runs = tmp_path / "first.yaml", tmp_path / "runs"
        told = foretell("init", path, *flags).stdout
        assert "Not there yet" not in told
        changed = [f"--set={size}" for size in (f"runs={runs}", *sizes)]
        done = foretell("run", path, *changed, imports=imports)
        assert "all stages are done" in done.stderr
        return runs / "first"

    return run


def reported(run: Path) -> dict[str, Any]:
    """What a run reports, in the page and in its numbers."""
    assert (run / "report" / "report.html").exists()
    found: dict[str, Any] = json.loads((run / "report" / "report.json").read_text())
    return found


def test_a_magpie_that_knows_its_speakers_is_told_by_its_file(magpies, tmp_path):
    baked = magpies.archive(baked=torch.zeros(2, 20, 64))
    assert [has_baked_contexts(path) for path in (baked, magpies.archive(), magpies.codec)] == [
        True, False, False,
    ]  # fmt: skip
    with tarfile.open(baked) as archive, tarfile.open(tmp_path / "t.nemo", "w:gz") as other:
        for member in archive:
            other.addfile(member, archive.extractfile(member))
    assert not has_baked_contexts(tmp_path / "t.nemo"), "which would have to be unpacked for it"
    assert not has_baked_contexts(tmp_path / "gone.nemo")
    (tmp_path / "t.nemo").write_text("no archive")
    assert not has_baked_contexts(tmp_path / "t.nemo")


@pytest.fixture(scope="module")
def magpies(require, tmp_path_factory) -> Models:
    require("nemo", "pip install 'foretell[magpie]'")
    return Models(tmp_path_factory.mktemp("magpie"))


@pytest.mark.parametrize("speakers", [(), ("low", "high")], ids=["contexts", "baked"])
def test_magpie_runs_as_it_is_written(speakers, magpies, begun, tone_corpus):
    """Of a model that hears a speaker in a clip, and of one that knows its speakers."""
    baked = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    run = begun(
        "--family", "magpie", "--data", tone_corpus, "--audio-codec", magpies.codec,
        "--teacher", magpies.archive(baked=baked if speakers else None),
        *(["--speakers", ",".join(speakers)] if speakers else []),
        sizes=SPEECH, imports=["stages.families.magpie", "stages.families.nemo_codec"],
    )  # fmt: skip
    manifest = PredictionStore.open(run / "store").manifest
    assert manifest.guidance.scale == 2.5
    assert (run / "student" / "model.nemo").exists()
    assert reported(run)["student"]["paired_kl"]["value"] > 0


def test_orpheus_runs_as_it_is_written(require, begun, tone_corpus, tmp_path):
    require("peft", "pip install 'foretell[orpheus]'")
    require("snac", "pip install 'foretell[orpheus]'")
    from stages.families.causal_lm_tiny import save_tiny, tiny_config
    from tests.test_snac_codec import build

    size = {"width": 64, "layers": 1, "heads": 4, "key_value_heads": 2, "feed_forward": 64}
    save_tiny(tmp_path / "base", tiny_config(**size, positions=256))
    run = begun(
        "--family", "orpheus", "--data", tone_corpus, "--teacher", tmp_path / "base",
        "--audio-codec", build(tmp_path / "snac", SNAC),
        sizes=(*SPEECH, *(f"fit.optimizer.{size}" for size in TRAINED)),
        imports=["stages.families.causal_lm", "stages.families.snac_codec"],
    )  # fmt: skip
    assert PredictionStore.open(run / "store").manifest.guidance.scale == 1.5
    assert (run / "student" / "adapter_model.safetensors").exists()
    assert reported(run)["student"]["paired_kl"]["value"] > 0


SMALLER = dict.fromkeys(("sd15", "sdxl", "sd3"), ("rollout.rows.slots=2",))
SMALLER["flux"] = ("rollout.rows.steps=4", "prepare.buckets.sizes=[[32,32],[40,24]]")
"""A Flux says nothing of the size of its images, so they are taken to be large."""


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_a_pipeline_runs_as_it_is_written(kind, require, begun, tmp_path):
    require("diffusers", "pip install 'foretell[diffusion]'")
    require("peft", "pip install 'foretell[diffusion]'")
    pipeline = tiny_pipelines(tmp_path)(kind)
    images = write_images(tmp_path / "images")
    trained = (*TRAINED[:2], "checkpoint_every=2")
    run = begun(
        "--family", "diffusion", "--data", images, "--teacher", pipeline,
        sizes=(
            *SMALLER[kind], "evaluate.samples=2", "evaluate.steps=[2]",
            "evaluate.bootstrap_draws=100",
            *(f"students.student.optimizer.{size}" for size in trained),
        ),
        imports=DIFFUSION,
    )  # fmt: skip
    manifest = PredictionStore.open(run / "store").manifest
    assert manifest.guidance.scale == (1.0 if kind == "flux" else 7.0)
    assert len(manifest.buckets) > 1, "images of other shapes than the square are taken too"
    assert (run / "student" / "pytorch_lora_weights.safetensors").exists()
    assert reported(run)["student"]["paired_mse"]["value"] > 0


def test_a_teacher_that_was_fitted_elsewhere_runs_on_data_of_its_own(begun, tiny_run, tone_corpus):
    """Its codes are those of its own run's codec, and its longest rollout is as long as it can."""
    teacher, own = tiny_run.root / "teacher", [s for s in SPEECH if "max_timesteps" not in s]
    run = begun(
        "--family", "codec_lm", "--data", tone_corpus, "--teacher", teacher, "--machine", "cpu",
        sizes=(*own, "prepare.seed=5", "rollout.target.k=6"), imports=[],
    )  # fmt: skip
    store = PredictionStore.open(run / "store")
    theirs = PredictionStore.open(tiny_run.root / "store").manifest.fingerprints
    assert store.manifest.fingerprints.audio_codec == theirs.audio_codec
    assert reported(run)["student"]["paired_kl"]["value"] > 0
