"""The training loop: resumed equals uninterrupted, split equals whole, and nothing bad is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stages.checkpoint import load_latest, published
from stages.config import OptimizerConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.optimization import Objective, learning_rate, optimize
from tests.stopping import StopAfter
from tests.test_training_log import points_of_events, points_of_lines

HERE = Place(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Rows:
    """A micro-batch of a linear regression: rows of `x` [b, 3]; the target is their sum."""

    x: torch.Tensor
    weight: float


class Regression:
    """The smallest learner: batches keyed by position, cut into micro-batches of any sizes."""

    def __init__(self, module: nn.Module, cuts: tuple[int, ...] = (8,), nan_at: int = -1) -> None:
        self.module, self.cuts, self.nan_at = module, cuts, nan_at
        self.positions: list[int] = []

    def batches(self, position: int) -> list[Rows]:
        self.positions.append(position)
        generator = torch.Generator().manual_seed(position)
        parts = torch.randn(8, 3, generator=generator).split(list(self.cuts))
        return [Rows(part, float(len(part))) for part in parts]

    def objective(self, step: int, batch: Rows) -> Objective:
        noise = 1 + 0.1 * torch.rand(())  # of the step's own random state
        loss = (noise * (self.module(batch.x).sum(-1) - batch.x.sum(-1)) ** 2).sum()
        if step == self.nan_at:
            loss = loss * torch.nan
        return Objective(loss, {"square": loss})

    def validate(self) -> dict[str, float]:
        return {"dev_square": 0.0}


def config_of(**changes) -> OptimizerConfig:
    plain = {
        "steps": 10, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 2,
        "checkpoint_every": 3, "log_every": 2,
    }  # fmt: skip
    return OptimizerConfig.model_validate(plain | changes)


def module_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def run(
    folder: Path,
    *,
    module=None,
    identity="this",
    stop=None,
    seed=5,
    cuts=(8,),
    nan_at=-1,
    store="",
    **changes,
):
    """Train a fresh module in `folder`; return it, its learner and whether it finished."""
    module = module or module_of()
    learner = Regression(module, cuts, nan_at)
    finished = optimize(
        module, module, learner, config_of(**changes), folder,
        seed=seed, identity=identity, place=HERE, stop=stop or StopRequest(), store=store,
    )  # fmt: skip
    return module, learner, finished


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, others = ours.state_dict(), theirs.state_dict()
    return all(torch.equal(mine[name], others[name]) for name in others)


@pytest.mark.parametrize("first", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, first, ema_decay):
    whole, _, finished = run(tmp_path / "whole", ema_decay=ema_decay)
    assert finished
    _, before, finished = run(tmp_path / "own", stop=StopAfter(first), ema_decay=ema_decay)
    assert not finished
    resumed, after, finished = run(tmp_path / "own", ema_decay=ema_decay)
    assert finished
    assert before.positions[:first] + after.positions == [8 * step for step in range(10)]
    assert same_weights(resumed, whole)


def test_a_finished_run_does_nothing_again(tmp_path):
    whole, _, _ = run(tmp_path)
    again, learner, finished = run(tmp_path)
    assert finished
    assert learner.positions == []
    assert same_weights(again, whole)


def test_the_log_of_a_resumed_run_has_every_step_once_and_forgets_what_was_lost(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "own", stop=StopAfter(6))
    with (tmp_path / "own" / "log.jsonl").open("a") as log:
        # What a killed process had written after its last checkpoint, the last line cut short.
        log.write('{"step": 8, "square": 1e9}\n{"step": 10, "squ')
    run(tmp_path / "own")
    whole, own = (log_of(tmp_path / name) for name in ("whole", "own"))
    assert [r["step"] for r in own if "square" in r] == [2, 4, 6, 8, 10]
    assert [(r["step"], "square" in r) for r in own] == [(r["step"], "square" in r) for r in whole]
    assert own[-2]["square"] == whole[-2]["square"]


def test_a_checkpoint_of_another_identity_is_refused_and_stays(tmp_path):
    run(tmp_path, stop=StopAfter(4))
    before = (tmp_path / "checkpoints" / "step_00000004" / "tensors.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"checkpoint of step 4 .* other settings or data"):
        run(tmp_path, identity="another")
    after = (tmp_path / "checkpoints" / "step_00000004" / "tensors.safetensors").read_bytes()
    assert after == before


def test_a_checkpoint_of_another_store_is_refused_by_the_name_of_both(tmp_path):
    run(tmp_path, stop=StopAfter(4), store="a" * 64)
    with pytest.raises(UserError, match=r"step 4 .*store \(manifest a{12}\) .*manifest b{12}\)"):
        run(tmp_path, store="b" * 64)
    _, learner, finished = run(tmp_path, store="a" * 64)
    assert finished
    assert learner.positions[0] == 8 * 4


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": lambda path: flip(path / "tensors.safetensors", -77),
    "a bit of the numbers": lambda path: flip(path / "state.json", 333),
    "weights cut short": lambda path: os.truncate(path / "tensors.safetensors", 200),
    "no weights": lambda path: (path / "tensors.safetensors").unlink(),
    "no numbers": lambda path: (path / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    whole, _, _ = run(tmp_path / "whole")
    run(tmp_path / "own", stop=StopAfter(7))
    checkpoints = tmp_path / "own" / "checkpoints"
    DAMAGE[damage](checkpoints / "step_00000007")
    (checkpoints / ".step_00000008.left").mkdir()  # by a process that was killed as it wrote
    resumed, learner, finished = run(tmp_path / "own")
    assert finished
    assert learner.positions[0] == 8 * 6
    assert same_weights(resumed, whole)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{checkpoints / 'step_00000007'} is damaged" in said
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step_00000007.damaged", "step_00000009", "step_00000010",
    ]  # fmt: skip


def test_checkpoints_that_are_all_damaged_are_refused_and_stay(tmp_path):
    run(tmp_path, stop=StopAfter(7))
    for path in published(tmp_path / "checkpoints"):
        flip(path / "tensors.safetensors", -5)
    with pytest.raises(UserError, match=r"none of the checkpoints .*step_00000007: .*00000006: "):
        run(tmp_path)
    assert len(published(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize("bits", [range(0, 8 * 200, 7)])
def test_no_altered_bit_of_a_checkpoint_goes_unnoticed(tmp_path, bits):
    run(tmp_path, stop=StopAfter(3))
    (path,) = published(tmp_path / "checkpoints")
    for name in ("state.json", "tensors.safetensors"):
        content = (path / name).read_bytes()
        for bit in bits:
            flip(path / name, bit)
            with pytest.raises(UserError, match="none of the checkpoints"):
                load_latest(tmp_path / "checkpoints")
            (path / name).write_bytes(content)
    assert load_latest(tmp_path / "checkpoints").step == 3


def test_other_seeds_take_other_steps(tmp_path):
    # Cut to one length, gradients that differ in length alone would be the same.
    one, _, _ = run(tmp_path / "one", clip_norm=1e9)
    two, _, _ = run(tmp_path / "two", seed=6, clip_norm=1e9)
    assert not same_weights(one, two)


@pytest.mark.parametrize(
    ("kept", "steps"),
    [({}, [9, 10]), ({"keep_checkpoints": 1}, [10]), ({"keep_checkpoints": 3}, [6, 9, 10])],
)
def test_as_many_of_the_newest_checkpoints_are_kept_as_was_asked_for(tmp_path, kept, steps):
    run(tmp_path, **kept)
    found = [path.name for path in published(tmp_path / "checkpoints")]
    assert found == [f"step_{step:08d}" for step in steps]


def test_a_compiled_pass_over_shared_weights_is_refused():
    with pytest.raises(ValueError, match="set compile: false, or parallel: ddp"):
        config_of(compile=True, parallel="fsdp")


@pytest.mark.parametrize("cuts", [(1, 7), (3, 3, 2), (1,) * 8])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole(tmp_path, cuts):
    for name, sizes in (("whole", (8,)), ("parts", cuts)):
        module = module_of()
        learner = Regression(module, sizes)
        learner.objective = lambda step, batch, m=module: Objective(
            ((m(batch.x).sum(-1) - batch.x.sum(-1)) ** 2).sum(), {}
        )
        optimize(
            module, module, learner, config_of(steps=1, clip_norm=1e9), tmp_path / name,
            seed=0, identity="", place=HERE, stop=StopRequest(),
        )  # fmt: skip
    whole, parts = (load_latest(tmp_path / n / "checkpoints").tensors for n in ("whole", "parts"))
    for name in ("optimizer.exp_avg.weight", "optimizer.exp_avg.bias"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_the_mean_over_weights(tmp_path):
    module = module_of()
    x = Regression(module).batches(0)[0].x
    expected = torch.autograd.grad(((module(x).sum(-1) - x.sum(-1)) ** 2).mean(), module.weight)[0]
    learner = Regression(module, (5, 3))
    learner.objective = lambda step, batch: Objective(
        ((module(batch.x).sum(-1) - batch.x.sum(-1)) ** 2).sum(), {}
    )
    optimize(
        module, module, learner, config_of(steps=1, clip_norm=1e9), tmp_path,
        seed=0, identity="", place=HERE, stop=StopRequest(),
    )  # fmt: skip
    found = load_latest(tmp_path / "checkpoints").tensors["optimizer.exp_avg.weight"] / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    whole, _, _ = run(tmp_path / "whole")
    module = module_of()
    with pytest.raises(FloatingPointError, match=r"optimizer step 7 .*newest checkpoint"):
        run(tmp_path / "own", module=module, nan_at=7)
    checkpoint = load_latest(tmp_path / "own" / "checkpoints")
    assert checkpoint.step == 6
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
    assert all(p.isfinite().all() for p in module.parameters()), "the step must not be taken"
    resumed, _, _ = run(tmp_path / "own")
    assert same_weights(resumed, whole)


def test_the_saved_average_is_the_exponential_mean_of_the_weights_after_every_step(tmp_path):
    average = [p.detach().clone() for p in module_of().parameters()]
    for steps in range(1, 6):
        plain, _, _ = run(tmp_path / str(steps), stop=StopAfter(steps))
        for mean, parameter in zip(average, plain.parameters(), strict=True):
            mean.mul_(0.9).add_(parameter.detach(), alpha=0.1)
        averaged, _, _ = run(tmp_path / f"ema {steps}", stop=StopAfter(steps), ema_decay=0.9)
        assert same_weights(averaged, plain), "an average must not change the training itself"
        tensors = load_latest(tmp_path / f"ema {steps}" / "checkpoints").tensors
        for name, mean in zip(("weight", "bias"), average, strict=True):
            torch.testing.assert_close(tensors[f"average.{name}"], mean)


def test_a_finished_run_hands_out_the_average_and_checkpoints_the_weights(tmp_path):
    module, _, _ = run(tmp_path, ema_decay=0.9)
    tensors = load_latest(tmp_path / "checkpoints").tensors
    assert torch.equal(module.weight, tensors["average.weight"])
    assert not torch.equal(module.weight, tensors["model.weight"])


def test_the_rate_rises_linearly_and_falls_by_half_a_cosine():
    config = config_of(steps=110, warmup_steps=10, learning_rate=3.0, final_learning_rate_share=0.1)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.3 * (step + 1) for step in range(10)])
    for step in (10, 35, 60, 85, 109):
        expected = 0.3 + (3.0 - 0.3) * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert rates[step] == pytest.approx(expected)
    assert rates[60] == pytest.approx((3.0 + 0.3) / 2), "half way down in the middle"
    assert learning_rate(config_of(warmup_steps=0), 0) == 0.05


def test_the_logged_rate_is_the_one_that_was_taken(tmp_path):
    run(tmp_path)
    config = config_of()
    rates = {r["step"]: r["learning_rate"] for r in log_of(tmp_path) if "learning_rate" in r}
    assert rates == {step: learning_rate(config, step - 1) for step in (2, 4, 6, 8, 10)}


def test_matrices_decay_and_vectors_do_not(tmp_path):
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(2.0)
    learner = Regression(module)
    learner.objective = lambda step, batch: Objective(0.0 * module(batch.x).sum(), {})
    config = config_of(steps=1, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    optimize(
        module, module, learner, config, tmp_path,
        seed=0, identity="", place=HERE, stop=StopRequest(),
    )  # fmt: skip
    torch.testing.assert_close(module.weight, torch.full((1, 3), 2.0 * (1 - 0.1 * 0.5)))
    assert module.bias.item() == 2.0


LONG = {
    "steps": 40, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2,
    "checkpoint_every": 3, "log_every": 2, "ema_decay": 0.9,
}  # fmt: skip


def checkpointed(folder: Path, step: int) -> bool:
    names = [path.name for path in published(folder / "checkpoints")]
    return bool(names) and names[-1] >= f"step_{step:08d}"


@pytest.mark.parametrize("stage", ["fit", pytest.param("train:student", marks=pytest.mark.slow)])
def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(
    stage, run_of, start_worker, tiny_run
):
    draft = run_of("draft").document
    noisy = {"dropout": 0.1, "code_noise": 0.1 if stage == "fit" else 0.0}

    def make(name: str):
        if stage == "fit":
            sections = {
                "teacher": {"model": draft["teacher"]["model"] | noisy},
                "fit": draft["fit"] | {"optimizer": LONG},
                "students": None,
                "rollout": None,
            }
            return run_of(name, **sections), "teacher"
        student = draft["students"]["student"]
        student = student | {"model": student["model"] | noisy, "optimizer": LONG}
        store = str(tiny_run.root / "store")
        return run_of(name, store=store, students={"student": student}, rollout=None), "student"

    (whole, folder), (killed, _) = make("whole"), make("killed")
    whole.do(stage)
    code = start_worker(stage, killed).kill_when(
        lambda: checkpointed(killed.root / folder, 9), signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert not (killed.root / folder / "model.safetensors").exists()
    assert 9 <= load_latest(killed.root / folder / "checkpoints").step < 40
    resumed = start_worker(stage, killed)
    assert resumed.wait() == 0, resumed.stderr.read_text()
    ours, theirs = (r.root / folder for r in (killed, whole))
    for file in ("model.safetensors", "config.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    ours_state, theirs_state = (
        load_file(path / "checkpoints" / "step_00000040" / "tensors.safetensors")
        for path in (ours, theirs)
    )
    assert all(torch.equal(ours_state[name], theirs_state[name]) for name in theirs_state)
    lines = Counter((record["step"], "ce" in record or "kl" in record) for record in log_of(ours))
    assert max(lines.values()) == 1
    assert [r["step"] for r in log_of(ours)] == [r["step"] for r in log_of(theirs)]
    if find_spec("tensorboard"):
        assert points_of_events(ours) == points_of_lines(ours)


def first_moments(folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of the first step, up to a factor: (1 − β1)·g."""
    tensors = load_latest(folder / "checkpoints").tensors
    return {n: x for n, x in tensors.items() if n.startswith("optimizer.exp_avg.")}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("stage", [pytest.param("fit", marks=pytest.mark.slow), "train:student"])
def test_micro_batches_and_processes_share_a_batch_without_changing_its_gradient(
    stage, run_of, start_worker, tiny_run
):
    one_step = LONG | {
        "steps": 1,
        "batch_size": 5,
        "ema_decay": None,
        "clip_norm": 1e9,
        "device": "cpu",
    }
    draft = run_of("draft").document
    still = {"dropout": 0.0, "code_noise": 0.0}

    def make(name: str, **changes):
        optimizer = one_step | changes
        if stage == "fit":
            teacher = {"model": draft["teacher"]["model"] | still}
            fit = draft["fit"] | {"optimizer": optimizer}
            return run_of(name, teacher=teacher, fit=fit, students=None, rollout=None)
        student = draft["students"]["student"]
        student = student | {"model": student["model"] | still, "optimizer": optimizer}
        store = str(tiny_run.root / "store")
        return run_of(name, store=store, students={"student": student}, rollout=None)

    folder = "teacher" if stage == "fit" else "student"
    whole, cut, shared = make("whole"), make("cut", micro_batch_size=2), make("shared")
    whole.do(stage)
    cut.do(stage)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    workers = [
        start_worker(stage, shared, environment=place | {"RANK": str(rank), "LOCAL_RANK": "0"})
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.wait() == 0, worker.stderr.read_text()
    expected = first_moments(whole.root / folder)
    assert any(x.abs().max() > 1e-4 for x in expected.values())
    if stage == "fit":
        whole_dev, shared_dev = (log_of(r.root / folder)[-1]["dev_ce"] for r in (whole, shared))
        assert shared_dev == pytest.approx(whole_dev, rel=1e-4), "dev loss must be of all samples"
    for other in (cut, shared):
        for name, gradient in first_moments(other.root / folder).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_more_processes_than_sequences_are_refused_instead_of_waiting_for_ever(run_of):
    module = module_of()
    crowd = Place(0, 9, torch.device("cpu"))
    with pytest.raises(UserError, match=r"batch_size is 8, .*9 processes"):
        optimize(
            module, module, Regression(module), config_of(), Path("nowhere"),
            seed=0, identity="", place=crowd, stop=StopRequest(),
        )  # fmt: skip
