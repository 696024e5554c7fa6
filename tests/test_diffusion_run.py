"""Diffusers' pipelines from a folder of images to students, as a user runs them.

Every pipeline is small, of random weights, and built offline. One run goes through the commands
themselves and is stopped twice on the way. All processes are as they are, but for their imports.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.diffusion.dataset import ImageDataset
from stages.diffusion.facts import FAILED, NOT_ASKED, OK, REPEATED
from stages.diffusion.noise import row_noise
from stages.family import load_denoiser
from stages.silence import silenced
from store import PredictionStore, verify
from tests.conftest import ROOT, Program, Run, Worker, ask, write_run
from tests.test_diffusion_pipelines import original_unet, original_vae
from tests.test_free_space import array_bytes

pytestmark = pytest.mark.slow

HINT = "pip install 'foretell[diffusion]'"
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}
IMPORTS = ["stages.families.diffusion", "stages.families.diffusion_encoders"]
"""What takes seconds to import: once, in the process that starts the others."""
SCALE = 5.0
LORA = "pytorch_lora_weights.safetensors"
SIZES = ((36, 34), (34, 36), (46, 26))
"""(width, height) of images, in turn: two for a square bucket, one for a wide one."""
BUCKETS = {"sizes": [[32, 32], [40, 24]]}
SCHEDULE = {
    "steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 4,
    "log_every": 4, "device": "cpu",
}  # fmt: skip
ROLLOUT = {
    "guidance": {"scale": SCALE}, "rows": {"kind": "forward", "slots": 3},
    "rollouts_per_shard": 4, "batch_size": 8, "device": "cpu",
}  # fmt: skip
EVALUATE = {"split": "test", "samples": 3, "steps": [2], "images": 2, "device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def _needed(require):
    require("diffusers", HINT)
    require("peft", HINT)


@pytest.fixture(scope="module")
def models(_needed, tmp_path_factory) -> Callable[..., Path]:
    return tiny_pipelines(tmp_path_factory.mktemp("models"))


def tiny_pipelines(folder: Path) -> Callable[..., Path]:
    """Return what gives the folder of a tiny pipeline of a kind, and of a seed."""
    from stages.families.diffusion_tiny import save_tiny

    def make(kind: str, seed: int = 0) -> Path:
        path = folder / f"{kind}-{seed}"
        if not path.exists():
            save_tiny(kind, path, seed=seed)
        return path

    return make


CAPTIONS = [f"{what}, {how}" for what in ("waves", "a grid", "smoke", "rain") for how in "abc"]


def write_images(folder: Path, **columns: dict[int, Any]) -> Path:
    """Twelve images with captions; `columns` are further columns by the number of the image."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for number, caption in enumerate(CAPTIONS):
        width, height = SIZES[number % 3]
        across, down = np.linspace(0, 2 + number, width), np.linspace(0, 3, height)
        wave = np.sin(across)[None, :, None] * np.cos(down)[:, None, None]
        image = 128 + 70 * wave + random.normal(0, 15, (height, width, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
        row = {"file_name": f"{number:02d}.png", "text": caption}
        row["split"] = {3: "dev", 10: "test", 11: "test"}.get(number, "train")
        rows.append(row | {name: values[number] for name, values in columns.items()
                           if number in values})  # fmt: skip
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("source") / "images")


def student_of(pipeline: Path, scale: Any = SCALE, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"pipeline": str(pipeline), "adapter": {"rank": 4}},
        "init": {"kind": "pipeline"},
        "loss": {"guidance_scale": scale},
        "optimizer": SCHEDULE,
    } | changes


def document(name: str, runs: Path, pipeline: Path, images: Path, **sections: Any) -> Any:
    """The configuration of a run; sections that are None are left out."""
    whole = {
        "kind": "diffusion",
        "name": name,
        "runs": str(runs),
        "seed": 3,
        "prepare": {
            "source": str(images),
            "encoder": {"kind": "pipeline", "path": str(pipeline), "device": "cpu"},
            "buckets": BUCKETS, "image_variations": 2, "crop": "random", "flip": 0.5,
        },
        "teacher": {"pretrained": {"path": str(pipeline)}},
        "rollout": ROLLOUT,
        "students": {"student": student_of(pipeline)},
        "evaluate": EVALUATE,
    }  # fmt: skip
    return {key: value for key, value in (whole | sections).items() if value is not None}


@pytest.fixture(scope="module")
def foretell(_needed, foretell) -> Callable[..., Program]:
    return partial(foretell, imports=IMPORTS)


@pytest.fixture(scope="module")
def start(_needed, fork_server, tmp_path_factory) -> Callable[..., Worker]:
    """Start a stage in a process of its own, which has imported diffusers already."""
    folder = tmp_path_factory.mktemp("errors")

    def begin(stage: str, run: Run, *options: str) -> Worker:
        stderr = folder / f"{time.monotonic_ns()}"
        request = {"arguments": [stage, str(run.path), *options], "stderr": str(stderr)}
        request |= {"environment": {}, "imports": IMPORTS}
        return Worker(ask(fork_server, request)["pid"], stderr, fork_server)

    return begin


@pytest.fixture(scope="module")
def do(start) -> Callable[..., str]:
    """Do stages of a run one after the other and return what they said."""

    def stages(run: Run, *names: str, code: int = 0, options: Sequence[str] = ()) -> str:
        said = ""
        for name in names:
            worker = start(name, run, *(f"--set={option}" for option in options))
            ended, text = worker.wait(), worker.stderr.read_text()
            assert ended == code, text
            assert "Traceback" not in text
            said += text
        return said

    return stages


# ---- rows, and what models answer


@dataclass
class Row:
    """A row of a store of noised images as this test reads it, with a batch of one in front."""

    key: tuple[str, int, int]
    text: str
    x: Tensor
    noise: Tensor
    t: Tensor
    conditions: dict[str, Tensor]
    parts: dict[str, Tensor]


def rows_of(store: PredictionStore, key: tuple[str, int]) -> list[Row]:
    rollout, rows = store[key], []
    latent = store.table("latents")[rollout.drawn["latent"]]
    conditions = dict(store.table("conditions")[rollout.drawn["condition"]])
    conditions |= {name: latent[name] for name in ("time_ids",) if name in latent}
    for slot in range(len(rollout)):
        column = {name: rollout.arrays[f"row.{name}"][slot] for name in ("t", "alpha", "sigma")}
        noise = rollout.arrays.get("row.noise")
        if noise is None:
            image, text = rollout.drawn["image_variation"], rollout.drawn["text_variation"]
            shape = latent["latent"].shape
            noise_of = row_noise(store.manifest.seed, key[0], image, text, slot, shape)
        else:
            noise_of = noise[slot, 0].astype(np.float32)
        alpha, sigma = np.float32(column["alpha"]), np.float32(column["sigma"])
        x = alpha * latent["latent"].astype(np.float32) + sigma * noise_of
        rows.append(
            Row(
                (*key, slot),
                store.sample(key[0])["text"],
                torch.tensor(x)[None],
                torch.tensor(noise_of),
                torch.tensor([column["t"]], dtype=torch.float64),
                {name: torch.tensor(value).float()[None] for name, value in conditions.items()},
                {
                    name.removeprefix("dense."): torch.tensor(values[slot]).float()
                    for name, values in rollout.arrays.items()
                    if name.startswith("dense.")
                },
            )
        )
    return rows


@torch.no_grad()
def answer(model: Any, row: Row, scale: float | None = None) -> Tensor:
    told = None if scale is None else torch.tensor([scale])
    return model.predict(row.x, row.t, row.conditions, told)


@torch.no_grad()
def stock_answer(stock: Any, row: Row, embeds: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
    added = {"text_embeds": pooled, "time_ids": sizes}
    return stock.unet(
        row.x, row.t.float(), encoder_hidden_states=embeds, added_cond_kwargs=added
    ).sample


def stock_unet(pipeline: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")


@torch.no_grad()
def stock_text_answer(unet: Any, row: Row) -> Tensor:
    return unet(row.x, row.t, row.conditions["prompt_embeds"]).sample


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root mean square difference of predictions."""
    pairs = zip(found, wanted, strict=True)
    return float(torch.stack([(x - y).square().mean() for x, y in pairs]).mean().sqrt())


# ---- SDXL, by the commands

SLOW = SCHEDULE | {"steps": 40, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def sdxl(models, images, foretell, start_program, tmp_path_factory) -> Run:
    """A finished run of SDXL by the commands, stopped in the middle of stage one."""
    folder, pipeline = tmp_path_factory.mktemp("sdxl"), models("sdxl")
    sections = document("sdxl", folder / "runs", pipeline, images)
    sections["prepare"]["unconditional"] = {"kind": "zeros"}
    sections["rollout"] = ROLLOUT | {
        "rows": {"kind": "forward", "slots": 3, "store_noise": True}, "rollouts_per_shard": 1,
        "batch_size": 2, "previews": {"samples": 1, "steps": 2, "split": "dev"},
    }  # fmt: skip
    sections["students"]["student"] |= {"optimizer": SLOW, "previews": {"every": 30}}
    run = write_run(sections, folder)
    shards = run.root / "store" / "shards"
    stopped = start_program("foretell", "run", run.path, imports=IMPORTS)
    code = stopped.kill_when(lambda: len(list(shards.glob("*"))) >= 2, signal.SIGINT)
    said = stopped.stderr.read_text()
    assert code == 75, said
    assert 2 <= len(list(shards.glob("*/shard.json"))) < 18
    assert "Traceback" not in said
    assert f"nothing is lost. To go on: foretell run {run.path}" in said
    foretell("run", run.path)
    return run


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_command_knows_the_finished_run(sdxl, foretell):
    stages = json.loads(foretell("status", sdxl.path, "--json").stdout)["stages"]
    assert [*stages] == ["prepare", "rollout", "train:student", "evaluate"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    checked = json.loads(foretell("verify", sdxl.root / "store", "--json").stdout)
    assert (checked["ok"], checked["rollouts"], checked["timesteps"]) == (True, 18, 54)
    found = json.loads(foretell("inspect", sdxl.root / "store", "--json").stdout)
    assert (found["rollouts"], found["cfg_scale"], found["family"]) == (18, SCALE, "diffusion")
    assert [bucket["shape"] for bucket in found["buckets"]] == [[4, 16, 16], [4, 12, 20]]
    assert sum(bucket["shards"] for bucket in found["buckets"]) == 18
    assert found["recording"]["schedule"]["prediction"] == "epsilon"
    student = json.loads(foretell("inspect", sdxl.root / "student", "--json").stdout)
    adapter = load_file(sdxl.root / "student" / LORA)
    assert student["architecture"]["parts"]["adapter"] == sum(t.numel() for t in adapter.values())


def test_an_estimate_says_to_the_byte_what_the_finished_run_took(sdxl, foretell, tmp_path):
    dataset = f"--set=dataset={sdxl.root / 'dataset'}"
    own = ("--set=prepare=null", dataset, f"--set=runs={tmp_path / 'runs'}")
    done = foretell("rollout", sdxl.path, "--estimate", "--json", *own)
    assert not (tmp_path / "runs").exists()
    found = json.loads(done.stdout)
    assert (found["samples"], found["rollouts"], found["timesteps"]) == (9, 18, 54)
    assert found["missing_bytes"] == sum(found["bytes"].values()) == found["bytes_in_all"]
    assert found["bytes"] == array_bytes(PredictionStore.open(sdxl.root / "store"))
    assert found["timesteps_per_s"] > 0


@pytest.fixture(scope="module")
def audited(foretell) -> Callable[..., Any]:
    """Audit a fifth of a run and return what the command printed."""

    def audit(run: Run, *options: str, code: int = 0) -> Any:
        asked = ("inspect", "audit", run.path, "--fraction", "0.2", "--json", *options)
        return json.loads(foretell(*asked, code=code).stdout)

    return audit


def test_an_audit_of_a_finished_run_finds_what_the_teacher_predicts(audited, sdxl, flux, mixed):
    for run, rollouts, parts in ((sdxl, 4, 9), (flux, 4, 4), (mixed, 3, 9)):
        found = audited(run)
        assert found["ok"], found
        assert found["teacher_matches"], found["differences"]
        assert found["rollouts"] == rollouts
        assert len(found["drift"]["parts"]) == parts
        assert found["drift"]["measure"] == "squared_error"
        assert found["largest_mean"] < found["limit"] < 3e-2


def test_an_audit_tells_another_denoiser(audited, sdxl, models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models("sdxl"), other)
    (weights,) = (other / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: 1.05 * tensor for name, tensor in tensors.items()}, weights)
    found = audited(sdxl, f"--set=teacher.pretrained.path={other}", code=1)
    assert list(found["differences"]) == ["teacher"]
    assert not found["ok"]
    assert not found["teacher_matches"]


def test_a_disk_that_is_too_small_is_refused_and_the_floor_is_heeded(sdxl, do, tmp_path):
    own = ("prepare=null", f"dataset={sdxl.root / 'dataset'}", f"runs={tmp_path / 'runs'}")
    said = do(sdxl, "rollout", code=2, options=(*own, "rollout.free_floor=1000000000000000"))
    assert "the 18 missing shards of" in said
    assert "rollout.disk_check: false" in said
    floor = ("rollout.disk_check=false", "rollout.free_floor=1000000000000000")
    said = do(sdxl, "rollout", code=1, options=(*own, *floor))
    assert "lets no shard be begun with less than 1,000,000,000,000,000" in said
    assert list((tmp_path / "runs/sdxl/store/shards").iterdir()) == []


def test_a_second_run_does_nothing(sdxl, foretell):
    before = bytes_of(sdxl.root)
    done = foretell("run", sdxl.path)
    assert bytes_of(sdxl.root) == before
    assert "started" not in done.stderr


def test_runs_that_were_stopped_elsewhere_end_with_the_same_bytes(sdxl, start, do, tmp_path):
    """The one by the commands in the middle of stage one, the other in that of stage two."""
    other = write_run(sdxl.document | {"runs": str(tmp_path)}, tmp_path)
    student = other.root / "student"
    do(other, "prepare", "rollout")
    training = start("train:student", other)
    ready = (student / "checkpoints" / "step_00000010").exists
    assert training.kill_when(ready, signal.SIGINT) == 75, training.stderr.read_text()
    assert not (student / LORA).exists()
    do(other, "train:student")
    for name in ("dataset", "store", "previews"):
        assert bytes_of(other.root / name) == bytes_of(sdxl.root / name)
    for name in (LORA, "previews/00000030.safetensors", "previews/00000030.png"):
        assert (student / name).read_bytes() == (sdxl.root / "student" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_share_shards_and_follow_one_that_gives_no_signs_of_life(
    sdxl, start, tmp_path, number
):
    sections = {"runs": str(tmp_path), "dataset": str(sdxl.root / "dataset")}
    sections["cluster"] = {"heartbeat_s": 0.1}
    document = {key: value for key, value in sdxl.document.items() if key != "prepare"}
    other = write_run(document | sections, tmp_path)
    store, claims = other.root / "store", other.root / "store" / "tmp" / "claims"
    first = start("rollout", other, "--task=0/2")
    while len(list(store.glob("shards/*"))) < 2 or not list(claims.glob("*.*")):
        assert Path(f"/proc/{first.pid}").exists(), first.stderr.read_text()
        time.sleep(0.002)
    os.kill(first.pid, number)
    second = start("rollout", other, "--task=1/2")
    assert second.wait() == 0, second.stderr.read_text()
    assert PredictionStore.open(store).missing() == [], "it waited for nobody"
    if number == signal.SIGSTOP:
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait() == 0, first.stderr.read_text()
        assert list((store / "tmp").iterdir()) == [], "the loser leaves nothing"
    assert verify(store).ok
    assert bytes_of(store / "shards") == bytes_of(sdxl.root / "store" / "shards")
    assert bytes_of(other.root / "previews") == bytes_of(sdxl.root / "previews")


def test_stored_predictions_are_what_the_stock_pipeline_predicts(sdxl, models):
    """Of captions encoded by stock diffusers, at noised latents by this test's own formula."""
    from diffusers import StableDiffusionXLPipeline

    with silenced():
        stock = StableDiffusionXLPipeline.from_pretrained(models("sdxl"))
    store = PredictionStore.open(sdxl.root / "store")
    rows = [row for key in list(store)[::3] for row in rows_of(store, key)]
    for row in rows:
        texts = stock.encode_prompt(row.text, do_classifier_free_guidance=False)
        embeds, pooled = (x.half().float() for x in (texts[0], texts[2]))
        sizes = row.conditions["time_ids"]
        cond = stock_answer(stock, row, embeds, pooled, sizes)
        without = stock_answer(stock, row, 0 * embeds, 0 * pooled, sizes)
        for part, expected in (("cond", cond), ("delta", cond - without)):
            error = (row.parts[part] - expected).norm() / expected.norm()
            assert error < 1e-3, (row.key, part, error)
    assert len({row.parts["delta"].shape for row in rows}) == 2, "both buckets"


def test_the_adapter_loads_in_stock_diffusers_and_does_there_what_it_does_here(sdxl, models):
    from diffusers import StableDiffusionXLPipeline

    with silenced():
        stock = StableDiffusionXLPipeline.from_pretrained(models("sdxl"))
    stock.set_progress_bar_config(disable=True)
    store = PredictionStore.open(sdxl.root / "store")
    student = load_denoiser().load(sdxl.root / "student", device="cpu", dtype=torch.float32)
    rows = [row for key in store for row in rows_of(store, key)]

    def stock_answers() -> list[Tensor]:
        names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
        return [stock_answer(stock, row, *(row.conditions[n] for n in names)) for row in rows]

    def image() -> Tensor:
        with silenced(), torch.no_grad():
            return stock(
                "waves, a", guidance_scale=1.0, num_inference_steps=2, height=32, width=32,
                output_type="latent", generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

    base, before = stock_answers(), image()
    with silenced():
        stock.load_lora_weights(sdxl.root / "student")
    trained, after = stock_answers(), image()
    ours = [answer(student, row) for row in rows]
    for theirs, own in zip(trained, ours, strict=True):
        torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-4)
    wanted = [row.parts["cond"] + (SCALE - 1) * row.parts["delta"] for row in rows]
    assert distance(trained, wanted) < 0.9 * distance(base, wanted)
    assert (after - before).norm() > 0.01 * before.norm()


def test_the_page_shows_what_every_system_drew(sdxl):
    report = json.loads((sdxl.root / "report" / "report.json").read_text())
    page = (sdxl.root / "report" / "report.html").read_text()
    shown = [
        np.array(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
        for content in re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"', page)
    ]
    samples = report["images"]["samples"]
    assert [*samples[0]["files"]] == ["teacher_guided", "teacher_unguided", "student"]
    assert len(shown) == 2 * 4
    dataset = ImageDataset.open(sdxl.root / "dataset")
    for sample, picture in zip(samples, shown, strict=False):
        np.testing.assert_array_equal(picture, dataset.reference(sample["sample_id"]))
        assert sample["text"] in page
    for place, name in enumerate(samples[0]["files"], start=1):
        for column, sample in enumerate(samples):
            file = np.array(Image.open(sdxl.root / "report" / sample["files"][name]))
            np.testing.assert_array_equal(shown[2 * place + column], file)
    assert len({picture.tobytes() for picture in shown}) == len(shown)
    assert report["teacher_guided"]["paired_mse"]["value"] == 0
    assert (
        0 < report["student"]["paired_mse"]["value"]
        < report["teacher_unguided"]["paired_mse"]["value"]
    )  # fmt: skip


def test_one_store_serves_students_of_other_scales(sdxl, models, do, tmp_path):
    model = {"pipeline": str(models("sdxl")), "adapter": {"rank": 4}, "scale_input": True}
    sections = {
        "prepare": None, "teacher": None, "rollout": None, "evaluate": None,
        "store": str(sdxl.root / "store"),
        "students": {
            "weak": student_of(models("sdxl"), 2.0, optimizer=SLOW),
            "ranged": student_of(models("sdxl"), [1.0, 9.0], optimizer=SLOW, model=model),
        },
    }  # fmt: skip
    run = write_run(document("others", tmp_path, Path(), Path(), **sections), tmp_path)
    before = bytes_of(sdxl.root / "store")
    do(run, "train:weak", "train:ranged")
    assert bytes_of(sdxl.root / "store") == before
    store = PredictionStore.open(sdxl.root / "store")
    rows = [row for key in store for row in rows_of(store, key)]
    wanted = {s: [r.parts["cond"] + (s - 1) * r.parts["delta"] for r in rows] for s in (2.0, 9.0)}
    weak, ranged = (
        load_denoiser().load(run.root / f"student_{name}", device="cpu", dtype=torch.float32)
        for name in ("weak", "ranged")
    )
    found = [answer(weak, row) for row in rows]
    assert distance(found, wanted[2.0]) < distance(found, wanted[9.0])
    told = {scale: [answer(ranged, row, scale) for row in rows] for scale in wanted}
    assert distance(told[9.0], wanted[9.0]) < distance(told[2.0], wanted[9.0])
    assert distance(told[2.0], wanted[2.0]) < distance(told[9.0], wanted[2.0])


def test_the_shipped_configuration_runs_where_its_paths_and_sizes_are_small(
    models, images, do, tmp_path
):
    """Only these are changed: what is held, computed and learned is what the file says."""
    whole = yaml.safe_load((ROOT / "configs" / "sdxl_cfg.yaml").read_text())
    pipeline, student = str(models("sdxl")), whole["students"]["student"]
    whole["runs"] = str(tmp_path / "runs")
    whole["prepare"] |= {"source": str(images), "buckets": BUCKETS}
    whole["prepare"]["encoder"]["path"] = student["model"]["pipeline"] = pipeline
    whole["teacher"]["pretrained"]["path"] = pipeline
    whole["rollout"]["rows"]["slots"] = 2
    whole["rollout"]["previews"] |= {"samples": 1, "steps": 2}
    student["optimizer"] |= {"steps": 2, "warmup_steps": 1}
    student["previews"] = {"every": 2}
    whole["evaluate"] |= {"samples": 2, "steps": [2], "bootstrap_draws": 100}
    run = write_run(whole, tmp_path)
    do(run, "prepare", "rollout", "train:student", "evaluate")
    assert PredictionStore.open(run.root / "store").manifest.quantization.method == "fp8"
    assert (run.root / "student" / LORA).exists()
    assert (run.root / "student" / "previews" / "00000002.png").exists()
    assert (run.root / "report" / "report.html").exists()


# ---- Stable Diffusion 1.5 from a single file, quantized, of three sources


@pytest.fixture(scope="module")
def single_file(models) -> Path:
    """Stable Diffusion's own single file of the tiny pipeline: other names of the same tensors."""
    folder, tensors = models("sd15"), {}
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    for part, name in (parts | {"text_encoder": "model"}).items():
        for key, tensor in load_file(folder / part / f"{name}.safetensors").items():
            match part:
                case "unet":
                    tensors[f"model.diffusion_model.{original_unet(key)}"] = tensor
                case "vae":
                    own, shaped = original_vae(key, tensor)
                    tensors[f"first_stage_model.{own}"] = shaped.contiguous()
                case _:
                    bare = key.removeprefix("text_model.")
                    tensors[f"cond_stage_model.transformer.text_model.{bare}"] = tensor
    file = folder.with_name("sd15.safetensors")
    save_file(tensors, file)
    return file


DATA, PRIOR = (1, 8), (2, 4)
"""Images that are their own targets, and those that keep what the teacher predicts unguided."""
MASKED = (0, 1, 4, 5)


@pytest.fixture(scope="module")
def mixed(models, single_file, do, tmp_path_factory) -> Run:
    """A run on a single file in fp8, with all three sources of targets, and masks."""
    folder, pipeline = tmp_path_factory.mktemp("mixed"), models("sd15")
    targets = {n: "data" for n in DATA} | {n: "prior" for n in PRIOR}
    masks = {n: f"masks/{n:02d}.png" for n in MASKED}
    source = write_images(folder / "images", target=targets, mask=masks)
    (source / "masks").mkdir()
    for number, name in masks.items():
        width, height = SIZES[number % 3]
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(source / name)
    whole = document("mixed", folder / "runs", pipeline, source)
    whole["prepare"]["encoder"] |= {
        "path": str(single_file), "config": str(pipeline), "quantization": {"text_encoder": "fp8"},
    }  # fmt: skip
    whole["prepare"]["unconditional"] = {"kind": "negative", "text": "smudge"}
    whole["teacher"]["pretrained"] = {"path": str(single_file), "config": str(pipeline)}
    whole["rollout"] = ROLLOUT | {"quantization": "fp8"}
    model = {"pipeline": str(single_file), "pipeline_config": str(pipeline), "adapter": {"rank": 4}}
    loss = {"guidance_scale": SCALE, "mask": {"unmasked_weight": 0.25}}
    # All 54 rows in one batch, so that the first step can be computed by hand.
    optimizer = SCHEDULE | {"steps": 8, "batch_size": 54, "log_every": 1}
    whole["students"]["student"] = student_of(pipeline, model=model, loss=loss, optimizer=optimizer)
    run = write_run(whole, folder)
    said = do(run, "prepare", "rollout", "train:student", "evaluate")
    assert re.search(r"quantizing text_encoder of .*\nquantized \d+ linear layers to fp8", said)
    return run


def test_rows_have_one_source_each_and_what_was_quantized_is_told(mixed):
    store = PredictionStore.open(mixed.root / "store")
    assert verify(store.path).ok
    held = store.manifest.quantization
    assert held.method == "fp8"
    assert [bucket.predicted for bucket in store.manifest.buckets] == [True, True, False, False]
    statuses = {}
    for key in store:
        rollout, sample = store[key], store.sample(key[0])
        statuses.setdefault(sample["target"], set()).update(rollout.arrays["row.status"].tolist())
        assert ("dense.cond" in rollout.arrays) == (sample["target"] != "data")
    assert statuses == {"teacher": {OK}, "prior": {OK}, "data": {NOT_ASKED}}
    text = json.loads((mixed.root / "dataset" / "dataset.json").read_text())["facts"]
    assert text["unconditional_text"] == "smudge"
    report = json.loads((mixed.root / "report" / "report.json").read_text())
    assert report["student"]["paired_mse"]["value"] > 0


def test_the_first_step_is_what_a_hand_computes(mixed, models):
    """Guided, unguided and data targets, masked: the mean error of the untrained network."""
    unet = stock_unet(models("sd15"))
    store, losses = PredictionStore.open(mixed.root / "store"), []
    for key in store:
        target = store.sample(key[0])["target"]
        latent = store.table("latents")[store[key].drawn["latent"]]
        mask = torch.tensor(latent.get("mask", np.ones((1, 1, 1)))).float().clamp(min=0.25)
        for row in rows_of(store, key):
            found = stock_text_answer(unet, row)[0]
            wanted = {
                "data": lambda row=row: row.noise,
                "prior": lambda row=row: row.parts["cond"][0],
                "teacher": lambda row=row: (row.parts["cond"] + (SCALE - 1) * row.parts["delta"])[
                    0
                ],
            }[target]()
            losses.append(float(((found - wanted).square() * mask).mean()))
    assert len(losses) == 54
    log = [json.loads(x) for x in (mixed.root / "student" / "log.jsonl").read_text().splitlines()]
    assert log[0]["total"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert log[-1]["total"] < log[0]["total"]
    shares = [log[0][f"{name}_share"] for name in ("teacher", "data", "prior")]
    assert shares == pytest.approx([5 / 9, 2 / 9, 2 / 9])


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_what_a_quantized_teacher_predicts_is_near_to_what_it_would_predict(
    mixed, models, do, tmp_path, method
):
    sections = {
        "prepare": None, "dataset": str(mixed.root / "dataset"), "students": {}, "evaluate": None,
    }  # fmt: skip
    stores = {}
    for name, held in (("whole", None), (method, method)):
        rollout = ROLLOUT | {"quantization": held}
        run = document(name, tmp_path, models("sd15"), Path(), **sections, rollout=rollout)
        said = do(write_run(run, tmp_path), "rollout")
        stores[name] = PredictionStore.open(tmp_path / name / "store")
        assert (method in said) == (held is not None)
    whole, held = stores.values()
    assert whole.manifest.fingerprints.teacher == held.manifest.fingerprints.teacher
    assert held.manifest.quantization.method == method
    keys = [key for key in whole if whole.sample(key[0])["target"] != "data"]
    for name in ("row.x_t_crc", "row.t"):
        assert all((whole[k].arrays[name] == held[k].arrays[name]).all() for k in keys)
    pairs = [
        [torch.tensor(store[key].arrays["dense.cond"]).float() for store in stores.values()]
        for key in keys
    ]
    size = distance([one for one, _ in pairs], [0 * one for one, _ in pairs])
    error = distance(*zip(*pairs, strict=True)) / size
    assert 1e-5 < error < 0.1


# ---- Flux along trajectories


@pytest.fixture(scope="module")
def flux(models, images, do, tmp_path_factory) -> Run:
    """A run of Flux, which is told its guidance, along its own trajectories."""
    folder, pipeline = tmp_path_factory.mktemp("flux"), models("flux")
    whole = document("flux", folder / "runs", pipeline, images)
    whole["teacher"]["pretrained"]["embedded_guidance"] = 3.5
    whole["rollout"] = ROLLOUT | {
        "guidance": {"scale": 1.0}, "target": {"kind": "dense", "branches": "guided"},
        "rows": {"kind": "trajectory", "steps": 4},
    }  # fmt: skip
    # All 72 rows in one batch, so that the first step can be computed by hand.
    optimizer = SCHEDULE | {
        "steps": 8, "batch_size": 72, "learning_rate": 1e-3, "log_every": 1,
    }  # fmt: skip
    whole["students"] = {
        name: student_of(
            pipeline, init={"kind": "teacher"}, loss={"teaches": name}, optimizer=optimizer
        )
        for name in ("end", "pairs")
    }
    run = write_run(whole, folder)
    do(run, "prepare", "rollout", "train:end", "train:pairs", "evaluate")
    return run


def test_states_follow_each_other_as_eulers_method_says(flux):
    store = PredictionStore.open(flux.root / "store")
    assert verify(store.path).ok
    assert (store.manifest.recording["embedded_guidance"], len(store)) == (3.5, 18)
    for key in store:
        arrays = store[key].arrays
        x, value = (arrays[n][:, 0].astype(np.float32) for n in ("row.x_t", "dense.guided"))
        alpha, sigma = arrays["row.alpha"], arrays["row.sigma"]
        np.testing.assert_allclose(alpha + sigma, 1, atol=1e-12)
        assert (sigma[0], sigma[-1]) == (1, 0)
        for step in range(4):
            ahead = x[step] + (sigma[step + 1] - sigma[step]) * value[step]
            np.testing.assert_allclose(ahead, x[step + 1], atol=0.01)


def test_students_begin_to_learn_where_trajectories_end(flux, models):
    """The first step by hand: of all states, and of points of the line between both ends.

    Where on the line the points lie is drawn, one in each quarter: here every quarter has many.
    """
    teacher = load_denoiser().load(flux.root / "student_end", device="cpu", dtype=torch.float32)
    store, errors = PredictionStore.open(flux.root / "store"), {"end": [], "pairs": []}
    for key in store:
        rollout = store[key]
        states = torch.tensor(rollout.arrays["row.x_t"]).float()
        texts = store.table("conditions")[rollout.drawn["condition"]]
        conditions = {n: torch.tensor(v).float()[None] for n, v in texts.items()}
        start, end = states[0], states[-1]
        line = [(k + 0.5) / 16 for k in range(16)]
        points = {
            "end": [(states[k], float(rollout.arrays["row.sigma"][k])) for k in range(4)],
            "pairs": [((1 - sigma) * end + sigma * start, sigma) for sigma in line],
        }
        for name, found in points.items():
            x, sigma = torch.cat([x for x, _ in found]), torch.tensor([sigma for _, sigma in found])
            asked = {n: v.expand(len(x), *v.shape[1:]) for n, v in conditions.items()}
            with torch.no_grad(), teacher.adapter_off():
                answered = teacher.predict(
                    x, 1000 * sigma.double(), asked, torch.full(sigma.shape, 3.5)
                )
            wanted = (x - end) / sigma.reshape(-1, 1, 1, 1)
            errors[name].append(float((answered - wanted).square().mean()))
    for name, tolerance in (("end", 1e-3), ("pairs", 0.05)):
        lines = (flux.root / f"student_{name}" / "log.jsonl").read_text().splitlines()
        log = [json.loads(line)["total"] for line in lines]
        assert log[0] == pytest.approx(np.mean(errors[name]), rel=tolerance)
        assert log[-1] < log[0]


# ---- what an adapter changes, taught to another base


def test_the_effect_of_an_adapter_is_taught_to_another_base(mixed, models, images, do, tmp_path):
    """A student that begins as its own base is wrong by what it is to learn, twice as strong."""
    adapter, other = mixed.root / "student" / LORA, models("sd15", 1)
    optimizer = SCHEDULE | {"steps": 12, "batch_size": 54, "log_every": 1, "learning_rate": 5e-3}
    whole = document(
        "transfer", tmp_path, models("sd15"), images, evaluate=None,
        teacher={"pretrained": {"path": str(models("sd15")), "adapter": str(adapter)}},
        rollout=ROLLOUT | {"contrast": {"kind": "adapter"}},
        students={"student": student_of(other, 2.0, optimizer=optimizer)},
    )  # fmt: skip
    run = write_run(whole, tmp_path)
    do(run, "prepare", "rollout", "train:student")
    store = PredictionStore.open(run.root / "store")
    rows = [row for key in store for row in rows_of(store, key)]
    stock = stock_unet(models("sd15"))
    plain = [stock_text_answer(stock, row) for row in rows]
    stock.load_lora_adapter(load_file(adapter), prefix="unet")
    changed = [stock_text_answer(stock, row) for row in rows]
    deltas = [with_it - without for with_it, without in zip(changed, plain, strict=True)]
    size = distance(deltas, [0 * delta for delta in deltas])
    assert distance([row.parts["delta"] for row in rows], deltas) < 2e-3 * size
    lines = (run.root / "student" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line)["total"] for line in lines]
    assert log[0] == pytest.approx((2 * size) ** 2, rel=1e-2)
    assert log[-1] < log[0]


# ---- mistakes


@pytest.fixture(scope="module")
def other_pipeline(models, tmp_path_factory) -> Callable[..., Path]:
    """A copy of a pipeline with a JSON file of it changed."""

    def make(name: str, file: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("other") / name
        shutil.copytree(models("sd15"), folder)
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))
        return folder

    return make


@pytest.fixture(scope="module")
def pickled(models, tmp_path_factory) -> Path:
    """A pipeline whose weights are pickles, as they once were published."""
    folder = tmp_path_factory.mktemp("pickled") / "sd15"
    shutil.copytree(models("sd15"), folder)
    for file in folder.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    return folder


def own(mixed: Run, models: Any, folder: Path, **sections: Any) -> Run:
    """A run on the dataset of another one, with a teacher from the folder of its pipeline."""
    given = {"prepare": None, "evaluate": None, "dataset": str(mixed.root / "dataset")}
    folder.mkdir(exist_ok=True)
    whole = document("own", folder / "runs", models("sd15"), Path(), **given | sections)
    return write_run(whole, folder)


def another_dataset(dataset: Path, folder: Path) -> Path:
    """A dataset of which all that training reads is its fingerprint."""
    folder.mkdir()
    header = json.loads((dataset / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(header | {"fingerprint": "another"}))
    return folder


MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "a folder that is not there": (
        "prepare", ["prepare.source=NOWHERE"], "prepare.source=.*NOWHERE is no folder",
    ),
    "a pipeline that is not there": (
        "prepare", ["prepare.encoder.path=NOWHERE"],
        "NOWHERE does not exist here: names of models on a hub",
    ),
    "a teacher that is not there": (
        "rollout", ["teacher.pretrained.path=NOWHERE"],
        "NOWHERE does not exist here: names of models on a hub",
    ),
    "encoders in pickles": (
        "prepare", ["prepare.encoder.path=PICKLED"], "only pickles, which run code",
    ),
    "an encoder that there is not": (
        "prepare", ["prepare.encoder.quantization={text_encoder_2: fp8}"], "text_encoder_2",
    ),
    "sizes that cannot be halved": (
        "prepare", ["prepare.buckets.sizes=[[33, 32]]"], r"\[33, 32\].* multiples of 2",
    ),
    "a teacher in pickles": (
        "rollout", ["teacher.pretrained.path=PICKLED"], "only pickles, which run code",
    ),
    "a teacher of another autoencoder": (
        "rollout", ["teacher.pretrained.path=SCALED"], "scaling_factor=0.5 .* 0.18215",
    ),
    "no adapter to compare with": (
        "rollout", ["rollout.contrast={kind: adapter}"], "no adapter to switch off",
    ),
    "another model of another schedule": (
        "rollout", ["rollout.contrast={kind: model, other: {path: VPRED}}"],
        "'epsilon' on .* 'v_prediction' on .* one schedule",
    ),
    "trajectories of images that are their own target": (
        "rollout", ["rollout.rows={kind: trajectory, steps: 3}"], "have the target 'data'",
    ),
    "a layer that there is not": (
        "rollout", ["rollout.quantization=fp8", "rollout.keep=[nose]"], "nose.* no linear layer",
    ),
    "another scheduler than the store's": (
        "rollout", ["store=STORE", "teacher.pretrained.path=VPRED"], "v_prediction",
    ),
    "no scale for both parts": (
        "train:student", ["store=STORE", "rollout=null", "students.student.loss={}"],
        "guidance_scale",
    ),
    "a range for a student that is not told": (
        "train:student", ["store=STORE", "students.student.loss.guidance_scale=[1, 2]"],
        "model.scale_input: true",
    ),
    "the end of no trajectory": (
        "train:student",
        ["store=STORE", "rollout=null", "students.student.loss={teaches: end}"],
        "cannot teach this: .* no trajectories",
    ),
    "a student of other captions": (
        "train:student",
        ["store=STORE", "students.student.model.pipeline=SDXL", "students.student.init.kind=fresh"],
        "cross_attention_dim=64.* needs 32",
    ),
    "a student of another autoencoder": (
        "train:student", ["store=STORE", "students.student.model.pipeline=SCALED"],
        "scaling_factor=0.5 .* 0.18215",
    ),
    "a student whose schedule has few of the levels": (
        "train:student",
        ["store=STORE", "students.student.model.schedule={train_timesteps: 1000, "
         "beta_schedule: linear, prediction: epsilon}", "students.student.loss.largest_factor=1.01",
         "students.student.model.prediction=sample"],
        "cannot learn from the store's",
    ),
    "a layer to adapt that there is not": (
        "train:student", ["store=STORE", "students.student.model.adapter.targets=[to_z]"],
        "to_z.* such as .*to_q",
    ),
    "a student from pickles": (
        "train:student", ["store=STORE", "students.student.model.pipeline=PICKLED"],
        "only pickles, which run code",
    ),
    "a student of another class": (
        "train:student",
        ["store=STORE", "students.student.model={network: UNet2DModel}",
         "students.student.init.kind=fresh"],
        "reads no 'prompt_embeds'",
    ),
    "a store of another dataset": (
        "train:student", ["store=STORE", "dataset=ANOTHER"],
        "was made from the dataset .* is another",
    ),
    "a store that is not there": ("train:student", ["store=NOWHERE"], "NOWHERE"),
    "previews that nobody rendered": (
        "train:student", ["store=STORE", "students.student.previews={every: 2}"],
        "give rollout.previews",
    ),
    "unknown settings": (
        "rollout", ["rollout.slots=8"], "slots",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line_before_any_work(
    mixed, models, images, do, other_pipeline, pickled, tmp_path, case
):
    stage, overrides, message = MISTAKES[case]
    places = {
        "NOWHERE": lambda: tmp_path / "NOWHERE",
        "PICKLED": lambda: pickled,
        "SDXL": lambda: models("sdxl"),
        "STORE": lambda: mixed.root / "store",
        "ANOTHER": lambda: another_dataset(mixed.root / "dataset", tmp_path / "ANOTHER"),
        "SCALED": lambda: other_pipeline("scaled", "vae/config.json", scaling_factor=0.5),
        "VPRED": lambda: other_pipeline(
            "v", "scheduler/scheduler_config.json", prediction_type="v_prediction"
        ),
    }
    for name, place in places.items():
        overrides = [re.sub(rf"\b{name}\b", str(place()), o) if name in o else o for o in overrides]
    sections = {}
    if stage == "prepare":
        sections = document("own", tmp_path, models("sd15"), images)
        sections = {"prepare": sections["prepare"], "dataset": None}
    run = own(mixed, models, tmp_path, **sections)
    before = bytes_of(mixed.root / "store")
    said = do(run, stage, code=2, options=overrides)
    assert re.search(message, said), said
    # Weights that predict another type are warned of before the levels are refused.
    lines = {"unknown settings": 4, "a student whose schedule has few of the levels": 2}
    assert len(said.strip().splitlines()) <= lines.get(case, 1), said
    assert bytes_of(mixed.root / "store") == before
    assert not list(run.root.glob("*/shards/*"))
    assert not (run.root / "student").exists()
    assert not (run.root / "dataset").exists()


def test_images_that_cannot_be_used_are_left_out_with_a_reason(models, do, tmp_path):
    source = write_images(tmp_path / "images")
    (source / "00.png").write_bytes(b"no picture")
    (source / "01.png").unlink()
    Image.new("RGB", (90, 30)).save(source / "02.png")
    Image.new("RGB", (16, 16)).save(source / "04.png")
    lines = (source / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    del rows[5]["text"]
    rows[6]["weight"] = "much"
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = write_run(document("defects", tmp_path, models("sd15"), source), tmp_path)
    said = do(run, "prepare")
    dataset = ImageDataset.open(run.root / "dataset")
    reasons = {row["file"]: row["reason"] for row in dataset.rejected()}
    assert sorted(reasons.values()) == sorted(set(reasons.values()))
    wanted = {
        "00.png": "unreadable", "01.png": "missing file", "02.png": "aspect", "04.png": "small",
        "05.png": "caption",
    }  # fmt: skip
    for file, word in wanted.items():
        assert word in reasons.pop(file), dataset.rejected()
    assert len(reasons) == 1
    assert "weight" in reasons.popitem()[1]
    assert "6 of 12 images accepted" in said
    assert [len(dataset.samples(split)) for split in ("train", "dev", "test")] == [3, 1, 2]


def test_captions_that_nobody_wrote_are_missed(models, do, tmp_path):
    source = write_images(tmp_path / "images")
    rows = map(json.loads, (source / "metadata.jsonl").read_text().splitlines())
    bare = [{"file_name": row["file_name"]} for row in rows]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    run = write_run(document("bare", tmp_path, models("sd15"), source), tmp_path)
    assert "rejected no caption: 12; 0 accepted" in do(run, "prepare", code=2)
    assert not (run.root / "dataset").exists()


def rescaled(models: Any, folder: Path, factors: dict[str, float]) -> Path:
    """A pipeline whose tensors of the denoiser are multiplied, each by its factor."""
    shutil.copytree(models("sd15"), folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_what_overflows_in_half_precision_is_predicted_again(mixed, models, do, tmp_path):
    """A normalisation behind a layer undoes its factor, unless numbers were infinite before."""
    layer = "mid_block.resnets.0.conv1"
    factors = {f"{layer}.weight": 1e6, f"{layer}.bias": 1e6}  # below 65504 all the same
    pipeline = rescaled(models, tmp_path / "model", factors)
    stores = {}
    for precision in ("fp16", "fp32"):
        run = own(
            mixed, models, tmp_path / precision, students={},
            teacher={"pretrained": {"path": str(pipeline)}},
            rollout=ROLLOUT | {"precision": precision, "samples": 3},
        )  # fmt: skip
        said = do(run, "rollout")
        assert ("not finite in fp16, and so predicted in fp32" in said) == (precision == "fp16")
        stores[precision] = PredictionStore.open(run.root / "store")
    half, single = stores.values()
    keys = [key for key in single if single.sample(key[0])["target"] != "data"]
    assert {s for key in keys for s in half[key].arrays["row.status"].tolist()} == {REPEATED}
    for key in keys:
        for part in ("dense.cond", "dense.delta"):
            ours, exact = (store[key].arrays[part].astype(np.float32) for store in (half, single))
            assert np.abs(ours - exact).max() < 0.02 * np.abs(exact).max()


def test_a_row_beyond_half_precision_is_told_by_its_key_and_weighs_nothing(
    mixed, models, do, tmp_path
):
    """The last layer is enlarged until exactly one row of the store goes beyond 65504."""
    exact = own(mixed, models, tmp_path / "exact", students={})
    do(exact, "rollout")
    store, largest = PredictionStore.open(exact.root / "store"), {}
    for key in store:
        if store.sample(key[0])["target"] != "data":
            for row in rows_of(store, key):
                largest[row.key] = max(float(part.abs().max()) for part in row.parts.values())
    worst, second = sorted(largest, key=largest.__getitem__)[:-3:-1]
    factor = 65504 / (largest[worst] * largest[second]) ** 0.5
    pipeline = rescaled(
        models, tmp_path / "model", {"conv_out.weight": factor, "conv_out.bias": factor}
    )
    run = own(
        mixed, models, tmp_path, teacher={"pretrained": {"path": str(pipeline)}},
        students={"student": student_of(
            pipeline, optimizer=SCHEDULE | {"steps": 1, "batch_size": 54, "log_every": 1}
        )},
    )  # fmt: skip
    said = do(run, "rollout", "train:student")
    assert f"{worst[0]!r} variation {worst[1]} slot {worst[2]}" in said
    found = PredictionStore.open(run.root / "store")
    statuses = {
        (*key, slot): status
        for key in found
        for slot, status in enumerate(found[key].arrays["row.status"].tolist())
        if status != NOT_ASKED
    }
    assert [key for key, status in statuses.items() if status == FAILED] == [worst]
    assert set(statuses.values()) == {OK, FAILED}
    assert not found[worst[:2]].arrays["dense.cond"][worst[2]].any()
    (line,) = (run.root / "student" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["failed_share"] == pytest.approx(1 / 54)
    assert json.loads(line)["total"] < 1e12


def test_a_teacher_that_is_broken_stores_nothing_and_says_so(mixed, models, do, tmp_path):
    pipeline = rescaled(models, tmp_path / "model", {"conv_out.weight": float("nan")})
    run = own(mixed, models, tmp_path, teacher={"pretrained": {"path": str(pipeline)}})
    said = do(run, "rollout", code=1)
    assert "rows of a shard have a prediction that is NaN or infinite" in said
    assert not list((run.root / "store" / "shards").glob("*/dense.cond"))


def test_the_missing_extra_is_named(mixed, models, tmp_path):
    (tmp_path / "diffusers.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'diffusers'\", name='diffusers')\n"
    )
    run = own(mixed, models, tmp_path / "run")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "rollout", str(run.path)], capture_output=True,
        text=True, env=ENVIRONMENT | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'foretell[diffusion]'" in done.stderr
    assert "Traceback" not in done.stderr
