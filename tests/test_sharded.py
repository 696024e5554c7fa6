"""Weights that processes share out: every family learns what it learns with whole ones."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from stages.checkpoint import load_latest
from stages.config import FitConfig, OptimizerConfig
from stages.diffusion.distil import distil
from stages.diffusion.model_config import LoraConfig
from stages.diffusion.record_config import AdapterContrast
from stages.distributed import Place
from stages.errors import UserError
from stages.fit import CodeLearner
from stages.interruption import StopRequest
from stages.optimization import Objective, attach, optimize
from stages.sharded import is_sharded
from tests import magpie_models, test_causal_lm, test_diffusion_family
from tests.diffusion_stores import FakeDenoiser, Written, config_of, write_store
from tests.test_causal_lm import adapted, folder, tiny  # noqa: F401 - the last two are fixtures

CONFIG = OptimizerConfig(
    steps=3, batch_size=5, micro_batch_size=2, learning_rate=2e-3, warmup_steps=1, log_every=1,
    ema_decay=0.5, checkpoint_every=2,
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    place: int
    weight: float = 3.0


class Denoising:
    """The mean square of what a denoiser predicts: two passes on one process, one on the other."""

    def __init__(self, denoiser: Any, place: Place) -> None:
        self._denoiser, self._place = denoiser, place

    def batches(self, position: int) -> list[Rows]:
        return [Rows(place) for place in range(2 - self._place.rank)]

    def objective(self, step: int, batch: Rows) -> Objective:
        x, t, conditions = test_diffusion_family.question(self._denoiser)
        predicted = self._denoiser.predict(x + batch.place + self._place.rank, t, conditions)
        return Objective((predicted - x).square().mean() * batch.weight, {})

    def validate(self) -> dict[str, float]:
        return {}


def codes(make: Callable[[], Any], samples: list[dict]) -> Callable[[Place], tuple[Any, Any]]:
    def build(place: Place) -> tuple[Any, Any]:
        config = FitConfig(optimizer=CONFIG, dev_batches=1)
        family = make()
        return family, CodeLearner(family, samples, samples[:2], config, 0, place)

    return build


def rows(**model: Any) -> Callable[[Place], tuple[Any, Any]]:
    def build(place: Place) -> tuple[Any, Any]:
        denoiser = test_diffusion_family.built(**model)
        test_diffusion_family.disturb(denoiser)
        return denoiser, Denoising(denoiser, place)

    return build


@pytest.fixture
def model(request, tmp_path) -> Callable[[Place], tuple[Any, Any]]:
    """What builds a family and its learner, the same in every process."""
    require = request.getfixturevalue("require")
    match request.param:
        case "causal_lm" | "causal_lm, adapter":
            base = request.getfixturevalue("folder")
            build = adapted if "adapter" in request.param else test_causal_lm.family_of
            changes = {"rank": 2} if "adapter" in request.param else {}
            return codes(lambda: build(base, **changes), test_causal_lm.samples_of(7))
        case "magpie":
            require("nemo", "pip install 'foretell[magpie]'")
            models = magpie_models.Models(tmp_path)
            archive = models.archive(experts=3)
            return codes(lambda: models.student(archive), magpie_models.samples_of(7))
    require("diffusers", test_diffusion_family.HINT)
    require("peft", test_diffusion_family.HINT)
    import stages.families.diffusion  # noqa: F401 - once, and not in each process

    match request.param:
        case "dit":
            return rows(network="DiTTransformer2DModel")
        case _:
            known = test_diffusion_family.facts(**test_diffusion_family.CAPTIONED)
            return rows(network="UNet2DConditionModel", known=known, adapter=LoraConfig(rank=2))


def work(rank: int, path: Path, parallel: str, build: Any) -> None:
    """One of two data-parallel processes."""
    meeting = f"file://{path}/meeting-{parallel}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=2)
    place = Place(rank, 2, torch.device("cpu"))
    config = CONFIG.model_copy(update={"parallel": parallel})
    torch.manual_seed(0)
    model, learner = build(place)
    network = attach(model, config, place)
    assert is_sharded(model.module) == (parallel == "fsdp")
    assert optimize(
        model.module, network, learner, config, path / parallel,
        seed=5, identity="i", place=place, stop=StopRequest(),
    )  # fmt: skip
    if place.leads:
        model.save(path / parallel)
    dist.destroy_process_group()


def work_in_two(*arguments: Any) -> None:
    import torch._dynamo  # noqa: F401 - sharing weights does: once, and not in each of them

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]


def files_of(path: Path) -> set[Path]:
    return {found.relative_to(path) for found in path.rglob("*") if found.is_file()}


MODELS = ["causal_lm", "causal_lm, adapter", "magpie", "dit", "unet, adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_every_family_learns_the_same_with_weights_that_are_shared_out(model, tmp_path):
    for parallel in ("ddp", "fsdp"):
        work_in_two(tmp_path, parallel, model)
    one, two = (load_latest(tmp_path / p / "checkpoints").tensors for p in ("ddp", "fsdp"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    saved = files_of(tmp_path / "ddp")
    assert files_of(tmp_path / "fsdp") == saved
    for path in saved:
        ours, theirs = tmp_path / "fsdp" / path, tmp_path / "ddp" / path
        if path.suffix == ".safetensors":
            mine, other = load_file(ours), load_file(theirs)
            assert mine.keys() == other.keys()
            for name in other:
                torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=2e-5, msg=name)
        elif path.suffix == ".json" and path.name != "state.json":
            assert ours.read_text() == theirs.read_text()


TWO = Place(0, 2, torch.device("cpu"))
"""The first of two processes, of which nothing is asked before it refuses."""


@pytest.mark.parametrize(
    ("kind", "student", "changes", "message"),
    [
        ("adapter", {"adapter": True}, {}, "asks the student without its adapter"),
        ("forward", {}, {"previews": {"every": 2}}, "previews, which one process draws"),
    ],
)
def test_what_one_process_would_do_alone_is_refused(tmp_path, kind, student, changes, message):
    contrast = {"contrast": AdapterContrast(kind="adapter")} if kind == "adapter" else {}
    store = write_store(tmp_path / "store", Written(**contrast))
    config = config_of({"guidance_scale": 0.5}, optimizer={"parallel": "fsdp"}, **changes)
    with pytest.raises(UserError, match=f"parallel is fsdp.*{message}.*parallel: ddp"):
        distil(
            FakeDenoiser(**student), store, config, tmp_path / "student",
            seed=5, identity="i", place=TWO, stop=StopRequest(),
        )  # fmt: skip


def test_weights_that_are_not_plain_numbers_are_refused_by_name():
    module = torch.nn.Linear(4, 4)
    module.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = SimpleNamespace(module=module, blocks=())
    config = CONFIG.model_copy(update={"parallel": "fsdp"})
    with pytest.raises(UserError, match=r"weight is a Tensor of torch.int8: set .*parallel: ddp"):
        attach(model, config, TWO)
