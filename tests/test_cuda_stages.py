"""Both stages of speech on CUDA: what the CPU gives is given there too, and runs go on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from stages.checkpoint import load_latest
from stages.data import StoreBatches
from stages.distributed import Place, choose_device, computes_bf16, peak_device_bytes, place
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.philox import uniforms
from stages.rollout import rollout
from stages.train import TargetLearner, train
from store import PredictionStore, verify
from tests import test_data, test_rollout, test_train
from tests.conftest import ROOT, TINY_MODEL
from tests.stopping import StopAfter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EVERYWHERE = (Place(0, 1, CPU), Place(0, 1, CUDA))


def teacher_of(device: torch.device, **changes):
    family = test_rollout.teacher_of(**changes)
    family.module.to(device)
    return family


# Stage one


def test_keyed_numbers_are_the_same_on_both():
    seeds = torch.tensor([1, -7, 2**62])
    timesteps = torch.tensor([0, 5, 70_000])
    expected = uniforms(seeds, timesteps, 3, 40)
    assert torch.equal(uniforms(seeds.cuda(), timesteps.cuda(), 3, 40).cpu(), expected)


@pytest.mark.parametrize("variant", test_rollout.VARIANTS)
def test_guided_rollouts_draw_the_codes_that_the_cpu_draws(tmp_path, variant):
    """In float32: a draw would differ only where a number falls between two roundings."""
    samples = test_rollout.samples_of()
    stores = [
        test_rollout.written(
            tmp_path / d.type, teacher_of(d, **test_rollout.VARIANTS[variant]), samples
        )
        for d in (CPU, CUDA)
    ]
    assert verify(stores[1].path).ok
    for key in stores[0]:
        ours, theirs = (store[key] for store in stores)
        assert ours.codes.tolist() == theirs.codes.tolist()
        np.testing.assert_allclose(
            theirs.arrays["full.logits"], ours.arrays["full.logits"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", test_rollout.TARGETS)
def test_targets_of_recordings_are_those_of_the_cpu(tmp_path, kind):
    samples = test_rollout.samples_of()
    settings = {"source": "dataset", "target": test_rollout.TARGETS[kind]}
    stores = [
        test_rollout.written(tmp_path / d.type, teacher_of(d), samples, **settings)
        for d in (CPU, CUDA)
    ]
    for key in stores[0]:
        ours, theirs = (store[key].arrays for store in stores)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            near = 2e-3 if array.dtype == np.float16 else 1e-4
            np.testing.assert_allclose(theirs[name], array, near, near, err_msg=name)


@pytest.mark.parametrize("variant", test_rollout.VARIANTS)
def test_decoding_step_by_step_is_scoring_at_once(tmp_path, variant):
    samples = test_rollout.samples_of()
    family = teacher_of(CUDA, **test_rollout.VARIANTS[variant])
    store = test_rollout.written(tmp_path / "store", family, samples)
    by_id = {sample["sample_id"]: sample for sample in samples}
    for key in store:
        codes = torch.from_numpy(store[key].codes.astype(np.int64))[None].to(CUDA)
        lengths = torch.tensor([codes.shape[1]], device=CUDA)
        with torch.no_grad():
            scores = family.score([by_id[key[0]]], codes, lengths, cfg_scale=2.5)
        logits = scores.logits[0].double()
        logits[..., list(family.forbidden)] = -torch.inf
        stored = test_rollout.stored_logprobs(store, key)
        torch.testing.assert_close(logits.log_softmax(-1).cpu(), stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_stopped_rollout_goes_on_to_the_same_bytes(tmp_path, kind):
    samples, target = test_rollout.samples_of(), test_rollout.TARGETS[kind]
    family = teacher_of(CUDA)
    whole = test_rollout.written(tmp_path / "whole", family, samples, target=target)
    begun, _ = test_rollout.store_of(tmp_path / "parted", family, samples, target=target)
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert not rollout(family, begun, by_id, begun.missing(), batch_size=3, stop=StopAfter(3))
    parted = test_rollout.written(tmp_path / "parted", family, samples, target=target)
    assert test_rollout.shard_bytes(parted.path) == test_rollout.shard_bytes(whole.path)


def test_a_teacher_in_bf16_is_near_the_one_in_fp32(tmp_path):
    samples = test_rollout.samples_of()
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        family = teacher_of(CUDA)
        family.module.to(dtype)
        store = test_rollout.written(tmp_path / name, family, samples, source="dataset")
        found[name] = [test_rollout.stored_logprobs(store, key) for key in store]
    exact, short = (torch.cat([each.flatten(0, 1) for each in x]) for x in found.values())
    kept = exact.isfinite()
    assert torch.equal(kept, short.isfinite())
    kl = (exact.exp() * (exact - short)).where(kept, 0.0).sum(-1)
    assert 0 < kl.mean() < 0.02


# Stage two


LOSSES = {
    "full": {"kl": 1.0},
    "full_both": {"kl": 1.0, "guidance_scale": 2.5},
    "hidden": {"kl": 1.0},
    "hidden_both": {"kl": 1.0, "guidance_scale": 2.5},
    "top_k": {"kl": 1.0},
    "sampled": {"kl": 0.0, "soft_ce": 1.0},
}


def learned(store: PredictionStore, loss: dict, here: Place, precision: str = "fp32"):
    """Loss and gradients of the first batch."""
    student = test_train.family_of(1)
    student.module.to(here.device)
    config = test_train.config_of(loss)
    with closing(TargetLearner(student, store, config, 0, here)) as learner:
        (batch,) = learner.batches(0)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=precision == "bf16"):
            objective = learner.objective(0, batch)
        objective.total.backward()
    gradient = {n: p.grad.cpu() for n, p in student.module.named_parameters() if p.grad is not None}
    return float(objective.total.detach()), gradient


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_those_of_the_cpu(tmp_path, kind):
    store = test_train.store_of(tmp_path / "store", kind)
    (ours, gradient), (theirs, other) = (learned(store, LOSSES[kind], here) for here in EVERYWHERE)
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert gradient.keys() == other.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-3, msg=name)


def test_a_loss_in_bf16_is_near_the_one_in_fp32(tmp_path):
    store = test_train.store_of(tmp_path / "store", "top_k")
    exact, _ = learned(store, LOSSES["top_k"], EVERYWHERE[1])
    short, gradient = learned(store, LOSSES["top_k"], EVERYWHERE[1], "bf16")
    assert short != exact
    assert short == pytest.approx(exact, rel=0.05)
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in gradient.values())


def trained(folder: Path, store: PredictionStore, here: Place = EVERYWHERE[1], stop=None, **more):
    student = test_train.family_of(1)
    student.module.to(here.device)
    optimizer = {"checkpoint_every": 3, "batch_size": 4, "micro_batch_size": 2} | more
    loader = optimizer.pop("loader", {})
    config = test_train.config_of({"kl": 1.0}, **optimizer)
    config = config.model_copy(update={"loader": config.loader.model_copy(update=loader)})
    finished = train(
        student, store, config, folder, seed=3, identity="i", place=here,
        stop=stop or StopRequest(),
    )  # fmt: skip
    return finished, {n: p.detach().cpu() for n, p in student.module.state_dict().items()}


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["total"] for line in lines]


def test_training_in_fp32_takes_the_steps_of_the_cpu(tmp_path):
    store = test_train.store_of(tmp_path / "store", "top_k")
    for here in EVERYWHERE:
        assert trained(tmp_path / here.device.type, store, here, precision="fp32")[0]
    ours, theirs = (losses_of(tmp_path / here.device.type) for here in EVERYWHERE)
    assert theirs == pytest.approx(ours, rel=2e-2)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, precision):
    store = test_train.store_of(tmp_path / "store", "top_k")
    finished, whole = trained(tmp_path / "whole", store, precision=precision, ema_decay=0.5)
    assert finished
    parted = {"precision": precision, "ema_decay": 0.5}
    assert not trained(tmp_path / "parted", store, stop=StopAfter(7), **parted)[0]
    assert load_latest(tmp_path / "parted" / "checkpoints").step == 7
    finished, again = trained(tmp_path / "parted", store, **parted)
    assert finished
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.filterwarnings("ignore")  # what the compiler advises and deprecates within itself
def test_a_compiled_student_learns_the_same(tmp_path):
    store = test_train.store_of(tmp_path / "store", "top_k")
    plain = {"precision": "fp32", "steps": 4}
    trained(tmp_path / "plain", store, **plain)
    trained(tmp_path / "compiled", store, **plain, compile=True)
    ours, theirs = (losses_of(tmp_path / name) for name in ("plain", "compiled"))
    assert theirs == pytest.approx(ours, rel=1e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_through_page_locked_memory_are_equal(tmp_path, workers):
    store = test_data.made(tmp_path / "store", test_data.TopK(k=4, moments=True))
    config = test_data.config_of(micro=3, workers=workers, start="spawn")
    assert config.loader.pin_memory
    expected = test_data.walked(store, config, range(0, 56, 8))
    with closing(StoreBatches(store, config, 5, EVERYWHERE[1])) as batches:
        waiting = [batch for position in range(0, 56, 8) for batch in batches.batches(position)]
        assert all(batch.arrays.memory.is_pinned() for batch in waiting)
        found = [batches.restored(batch) for batch in waiting]
    assert test_data.seen(found) == test_data.seen(expected)
    for one, other in zip(found, expected, strict=True):
        ours, theirs = test_data.tensors(one), test_data.tensors(other)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.device == CUDA
            assert test_data.bits(tensor.cpu()).equal(test_data.bits(theirs[name])), name


def test_gradients_and_totals_go_through_nccl(tmp_path):
    """In a group of one process: there is one device."""
    alone, shared = nn.Linear(3, 2).to(CUDA), nn.Linear(3, 2).to(CUDA)
    shared.load_state_dict(alone.state_dict())
    x = torch.randn(5, 3, device=CUDA)
    torch.cuda.set_device(CUDA)
    meeting = f"file://{tmp_path}/meeting"
    dist.init_process_group("nccl", meeting, rank=0, world_size=1, device_id=CUDA)
    try:
        here = Place(0, 2, CUDA)  # what it asks of the group when it is not alone
        assert here.totals(1.5, 2.0) == [1.5, 2.0]
        here.barrier()
        parallel = here.parallel(shared)
        assert isinstance(parallel, nn.parallel.DistributedDataParallel)
        for network in (alone, parallel):
            network(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(shared.weight.grad, alone.weight.grad)


# Whole runs, as a user starts them


def test_auto_is_the_device_that_is_there(monkeypatch):
    assert choose_device("auto") == choose_device("cuda") == CUDA
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    assert choose_device("auto") == CUDA
    with pytest.raises(UserError, match=r"'cuda:99' .* has \d+ CUDA devices"):
        choose_device("cuda:99")
    with place("auto") as here:
        assert here == Place(0, 1, CUDA)
    assert isinstance(computes_bf16(CUDA), bool)


def test_what_was_held_on_the_device_is_told():
    torch.cuda.reset_peak_memory_stats()
    before = peak_device_bytes(CUDA)
    piece = torch.empty(2**24, dtype=torch.uint8, device=CUDA)
    del piece
    assert peak_device_bytes(CUDA) >= before + 2**24


def usage_of(folder: Path, command: list[str], **environment: str) -> dict:
    """Run a worker and return what it says it needed."""
    told = folder / "usage.json"
    environment |= {"FORETELL_USAGE": str(told), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_of_a_run_use_the_device_and_say_how_much(run_of, tmp_path, precision):
    run = run_of(fitted=True)
    rolled = ["-m", "pipeline.worker", "rollout", str(run.path), "--set"]
    usage = usage_of(tmp_path, [*rolled, f"rollout.precision={precision}"])
    assert usage["peak_device_bytes"] > 0
    assert verify(run.root / "store").ok
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    launched += ["-m", "pipeline.worker", "train:student", str(run.path), "--set"]
    usage = usage_of(tmp_path, [*launched, f"students.student.optimizer.precision={precision}"])
    assert usage["peak_device_bytes"] > 0
    assert (run.root / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_is_told_to_end_goes_on_to_the_same_weights(run_of, start_worker):
    schedule = {
        "steps": 60, "batch_size": 4, "learning_rate": 2e-3, "checkpoint_every": 2, "log_every": 2,
    }  # fmt: skip
    student, weights = TINY_MODEL | {"decoder_layers": 1}, []
    for name in ("whole", "stopped"):
        students = {"student": {"model": student, "optimizer": schedule}}
        run = run_of(name, fitted=True, students=students)
        assert start_worker("rollout", run).wait() == 0
        folder = run.root / "student"
        if name == "stopped":
            ready = (folder / "checkpoints" / "step_00000010").exists
            worker = start_worker("train:student", run)
            assert worker.kill_when(ready, signal.SIGTERM) == 75, worker.stderr.read_text()
            assert not (folder / "model.safetensors").exists()
        worker = start_worker("train:student", run)
        assert worker.wait() == 0, worker.stderr.read_text()
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
