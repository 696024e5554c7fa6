"""Stage two in several processes: the same work whoever does it, and an end when one of them dies.

All are real processes. Those of `start_worker` are what torchrun would start, without its wait.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.checkpoint import load_latest, published
from stages.config import RolloutConfig
from stages.families.codec_lm import CodecLM
from stages.interruption import StopRequest
from stages.model_config import CodecLMConfig
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from store import PredictionStore
from tests.conftest import Run, write_run
from tests.test_optimization import checkpointed, free_port, log_of
from tests.test_train import FACTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LIMIT_S = 120
"""For what must end within a minute; a machine under load may take longer for everything."""
MODEL = {
    "family": "codec_lm", "d_model": 16, "heads": 2, "text_layers": 1, "decoder_layers": 2,
    "feed_forward": 24, "dropout": 0.0, "max_timesteps": 80, "max_characters": 20,
    "local_transformer": {"d_model": 16, "layers": 1, "heads": 2},
}  # fmt: skip
EXPERTS = MODEL | {"experts": {"experts": 3, "active": 2}}
LOSS = {"kl": 1.0, "auxiliary": 0.1, "local_start_step": 2}
TIMESTEPS = (2, 70, 3, 2, 66, 4, 3, 2, 60, 5, 3)
"""Of every sample: shards differ sixfold, rollouts more; and neither 5, the
size of a batch, nor 2 or 3 processes divide their number."""
OPTIMIZER = {
    "steps": 9, "batch_size": 5, "learning_rate": 2e-3, "warmup_steps": 2, "log_every": 1,
    "checkpoint_every": 3, "ema_decay": 0.9, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PredictionStore:
    """Whole distributions of a teacher over the codes of samples of very different lengths."""
    random = np.random.default_rng(0)
    samples = [
        {
            "sample_id": f"clip {number}",
            "text": "".join(random.choice(list(" abcdefg"), size=4)),
            "speaker": ("low", "high")[number % 2],
            "codes": random.integers(0, 14, size=2 * timesteps),
        }
        for number, timesteps in enumerate(TIMESTEPS)
    ]
    config = RolloutConfig.model_validate(
        {
            "source": "dataset", "guidance": {"scale": 2.0}, "rollouts_per_shard": 3,
            "target": {"kind": "full", "dtype": "float32"}, "batch_size": 3,
            "sampler": {"max_timesteps": 80},
        }
    )  # fmt: skip
    model = CodecLMConfig.model_validate(MODEL)
    teacher = CodecLM.build(model, FACTS.model_dump(mode="json"), seed=3)
    teacher.condition_dropout = 0.1
    path = tmp_path_factory.mktemp("processes") / "store"
    made = create_store(
        path,
        teacher,
        lay_out(config, teacher, samples, facts=FACTS, dataset_fingerprint="d", seed=0),
    )
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert rollout(teacher, made, by_id, made.missing(), batch_size=3, stop=StopRequest())
    found = PredictionStore.open(path)
    of_shards = [int(lengths.sum()) for lengths in found.lengths()]
    assert max(of_shards) > 5 * min(of_shards)
    return found


@pytest.fixture
def training(store, tmp_path):
    """Write the configuration of a run that trains students on the store; none has a teacher."""

    def make(
        name: str,
        model: dict[str, Any] = MODEL,
        twin: dict[str, Any] | None = None,
        **optimizer: Any,
    ) -> Run:
        settings = {"student": optimizer} | ({} if twin is None else {"twin": twin})
        document = {
            "name": name, "runs": str(tmp_path / "runs"), "seed": 1, "store": str(store.path),
            "students": {
                student: {"model": model, "loss": LOSS, "optimizer": OPTIMIZER | changes}
                for student, changes in settings.items()
            },
        }  # fmt: skip
        return write_run(document, tmp_path)

    return make


@pytest.fixture
def start(start_worker):
    """Start the processes of a stage."""

    def run(run: Run, processes: int = 1, **more: Any) -> list[Any]:
        place = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
        environments = (place | rank if processes > 1 else {} for rank in ranks)
        # Sharing weights imports the compiler, which takes seconds: once for all processes.
        more |= {"imports": ["torch._dynamo", "stages.sharded"]}
        return [start_worker("train:student", run, environment=e, **more) for e in environments]

    return run


def finish(workers: list[Any]) -> None:
    for worker in workers:
        assert worker.wait() == 0, worker.stderr.read_text()


def order_of(path: Path, processes: int) -> dict[int, list[str]]:
    """Keys of every global batch by its position, in order, from what every process noted.

    Batches that some of them did not come to, for they were killed, are left out.
    """
    shares: dict[int, dict[int, list[str]]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        position, rank, keys = json.loads(line)
        found = shares[position].setdefault(rank, keys)
        assert found == keys, "a batch that is begun again must be the same"
    batches = {}
    for position, share in shares.items():
        if len(share) == processes:
            count = sum(map(len, share.values()))
            batches[position] = [share[i % processes][i // processes] for i in range(count)]
    return batches


def require_same_curve(ours: Path, theirs: Path) -> None:
    one, two = log_of(ours), log_of(theirs)
    for mine, other in zip(one, two, strict=True):
        for name in mine.keys() - {"steps_per_s", "data_wait_share"}:
            assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), (name, mine)


def require_same_weights(ours: Path, theirs: Path) -> None:
    one, two = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


SHARED = {
    "two, accumulating": (2, {"micro_batch_size": 2}),
    "two, sharing weights, accumulating": (2, {"micro_batch_size": 2, "parallel": "fsdp"}),
    "three, sharing weights": (3, {"parallel": "fsdp"}),
}


def test_however_a_batch_is_shared_the_run_is_the_same(training, start, tmp_path, store):
    alone = training("alone")
    finish(start(alone, order=str(tmp_path / "alone.order")))
    expected = order_of(tmp_path / "alone.order", 1)
    epoch = [tuple(key) for position in sorted(expected) for key in expected[position]]
    assert sorted(epoch[: len(store)]) == sorted(store.keys()), "every rollout once"
    for number, (name, (processes, optimizer)) in enumerate(SHARED.items()):
        run, notes = training(f"shared{number}", **optimizer), tmp_path / f"{number}.order"
        finish(start(run, processes, order=str(notes)))
        assert order_of(notes, processes) == expected, name
        ours, theirs = run.root / "student", alone.root / "student"
        require_same_curve(ours, theirs)
        require_same_weights(ours, theirs)
        mine, other = (load_latest(path / "checkpoints").tensors for path in (ours, theirs))
        assert {k: (x.shape, x.dtype) for k, x in mine.items()} == {
            k: (x.shape, x.dtype) for k, x in other.items()
        }


def test_sharing_weights_changes_nothing_of_a_model_with_experts(training, start):
    """How they are balanced is counted by micro-batch, so that only the same ones compare."""
    whole = training("whole", model=EXPERTS, micro_batch_size=2)
    shared = training("shared", model=EXPERTS, micro_batch_size=2, parallel="fsdp")
    finish(start(whole, 2))
    finish(start(shared, 2))
    require_same_curve(shared.root / "student", whole.root / "student")
    require_same_weights(shared.root / "student", whole.root / "student")


def test_a_killed_run_goes_on_with_other_processes_and_micro_batches(training, start, tmp_path):
    alone = training("alone", steps=18)
    finish(start(alone, order=str(tmp_path / "alone.order")))
    killed = training("killed", steps=18, micro_batch_size=2)
    notes = tmp_path / "killed.order"
    leading, other = start(killed, 2, order=str(notes))
    code = leading.kill_when(lambda: checkpointed(killed.root / "student", 6), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert other.wait() == 1
    assert f"process 1 of 2 ends, because process 0 (pid {leading.pid} on" in said_by(other)
    begun = order_of(notes, 2)
    assert load_latest(killed.root / "student" / "checkpoints").step < 30
    for name, processes, optimizer in (
        ("one", 1, {"micro_batch_size": 3}),
        ("three", 3, {"micro_batch_size": 1, "parallel": "fsdp"}),
    ):
        resumed, more = training(name, steps=18, **optimizer), tmp_path / f"{name}.order"
        shutil.copytree(killed.root / "student", resumed.root / "student")
        finish(start(resumed, processes, order=str(more)))
        continued = order_of(more, processes)
        assert min(continued) > 0
        assert begun | continued == order_of(tmp_path / "alone.order", 1)
        require_same_curve(resumed.root / "student", alone.root / "student")
        require_same_weights(resumed.root / "student", alone.root / "student")


def said_by(worker: Any) -> str:
    text = worker.stderr.read_text(encoding="utf-8")
    assert "Traceback" not in text, text
    return text


def test_a_signal_to_one_process_stops_all_between_two_steps(training, start):
    run = training("stopped", steps=100_000, parallel="fsdp")
    workers = start(run, 2)
    folder = run.root / "student"
    assert workers[1].kill_when(lambda: checkpointed(folder, 6), signal.SIGTERM) == 75
    assert workers[0].wait() == 75
    assert load_latest(folder / "checkpoints").step == max(r["step"] for r in log_of(folder))
    assert len(published(folder / "checkpoints")) == 2


def torchrun(run: Run, *, exits: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start `torchrun -m pipeline train CONFIG` with two processes."""
    exits.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.noted_exit", "train", str(run.path),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EXITS": str(exits)}
    with output.open("wb") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, cwd=ROOT)


def wait_for(process: subprocess.Popen[bytes], output: Path, ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None, output.read_text()
        time.sleep(0.01)


def process_of_rank(parent: int, rank: int) -> int:
    """The process below another whose variables say this rank."""
    below = [parent]
    while below:
        pid = below.pop()
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if pid != parent and f"RANK={rank}".encode() in variables:
            return pid
        below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    raise AssertionError(f"no process of rank {rank}")


def test_torchrun_trains_one_student_after_the_other_and_stops_with_a_checkpoint(
    training, tmp_path
):
    run = training("both", steps=4, twin={"steps": 100_000})
    folder, exits, output = run.root / "student_twin", tmp_path / "exits", tmp_path / "said"
    process = torchrun(run, exits=exits, output=output)
    wait_for(process, output, lambda: checkpointed(folder, 6))
    process.send_signal(signal.SIGTERM)
    process.wait(LIMIT_S)
    # Of several one says so: at the first code but 0 torchrun ends the others, which are not done.
    assert {path.name: path.read_text() for path in exits.iterdir()} == {"0": "75", "1": "0"}
    assert load_latest(folder / "checkpoints").step == max(r["step"] for r in log_of(folder))
    assert (run.root / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("by", ["torchrun", "foretell"])
def test_the_death_of_the_leading_process_ends_all_and_says_who_died(training, tmp_path, by):
    run = training("endless", steps=100_000, processes=2)
    output = tmp_path / "said"
    if by == "torchrun":
        process = torchrun(run, exits=tmp_path / "exits", output=output)
    else:
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "train", str(run.path)],
                stdout=sink, stderr=sink, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
            )  # fmt: skip
    wait_for(process, output, lambda: checkpointed(run.root / "student", 6))
    leading, other = (process_of_rank(process.pid, rank) for rank in range(2))
    os.kill(leading, signal.SIGKILL)
    assert process.wait(LIMIT_S) == 1
    assert not Path(f"/proc/{other}").exists()
    said = output.read_text()
    assert f"process 1 of 2 ends, because process 0 (pid {leading} on" in said
    assert "run the same command again" in said
    if by == "foretell":
        assert f"train:student: process 0 of 2 (pid {leading}) was ended by SIGKILL" in said
        assert "Traceback" not in said
