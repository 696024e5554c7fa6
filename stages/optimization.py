"""The training loop of `fit` and `train`: one optimizer step after another, resumable exactly."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.checkpoint import Checkpoint, load_latest, save_checkpoint
from stages.config import OptimizerConfig
from stages.distributed import Place, computes_bf16
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.sampling import keyed_seed
from stages.training_log import TrainingLog


class Weighted(Protocol):
    """A micro-batch, seen from the loop: all it needs to know is how much the batch counts."""

    @property
    def weight(self) -> float:
        """By what its sums are divided: weights of its predictions, or a number of rollouts."""


Batch = TypeVar("Batch", bound=Weighted)


@dataclass(frozen=True)
class Objective:
    """What one micro-batch contributes to the loss."""

    total: Tensor
    """Scalar to differentiate: a sum, not yet divided by the weight of the batch."""
    terms: Mapping[str, Tensor]
    """What the log shows means of beside the total: its parts and other scalars, summed alike."""


class Learner(Protocol[Batch]):
    """What differs between fitting a teacher and training a student."""

    def batches(self, position: int) -> Sequence[Batch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""

    def objective(self, step: int, batch: Batch) -> Objective:
        """Return the loss of one micro-batch at optimizer step `step`."""

    def validate(self) -> Mapping[str, float]:
        """Return what is reported at every checkpoint; called on the leading process only."""


class Model(Protocol):
    """A model, seen from the loop: a family or a denoiser, which calls `network`."""

    @property
    def module(self) -> nn.Module:
        """The bare network."""

    network: nn.Module
    """What it calls: the module, or its compiled or data-parallel form."""


def attach(family: Model, config: OptimizerConfig, place: Place) -> nn.Module:
    """Let `family` call a compiled or data-parallel form of its module, and return it."""
    network: nn.Module = family.module
    if config.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    network = place.parallel(network)
    family.network = network
    return network


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the rate of optimizer step `step` (from 0): linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    floor = config.final_learning_rate_share
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimize(
    module: nn.Module,
    network: nn.Module,
    learner: Learner[Batch],
    config: OptimizerConfig,
    folder: Path,
    *,
    seed: int,
    identity: str,
    place: Place,
    stop: StopRequest,
    prepare: Callable[[int], nn.Module] | None = None,
) -> bool:
    """Train `module` to the configured step, from the newest checkpoint in `folder` if any.

    `network` is what `learner` calls: `module` itself or its data-parallel form; `prepare`, called
    before every step with its number, may return another from then on. `identity` names
    everything that a checkpoint depends on; another one is refused with `UserError`, and so are
    more processes than sequences of a batch, which would wait for each other. The random state of
    a step is keyed by (seed, step, rank), so that a resumed run ends with the same weights.
    Returns False when `stop` was requested first; a checkpoint then holds the state.
    """
    if place.world_size > config.batch_size:
        raise UserError(
            f"optimizer.batch_size is {config.batch_size}, fewer sequences than the "
            f"{place.world_size} processes that share them: raise it, or lower "
            "optimizer.processes"
        )
    state = TrainingState(module, config, place.device)
    state.restore(folder / "checkpoints", identity)
    report = Report(folder / "log.jsonl", config, place, state.step)
    module.train()

    while state.step < config.steps:
        if prepare is not None:
            network = prepare(state.step)
        torch.manual_seed(keyed_seed(seed, "step", state.step, place.rank))
        with report.waiting():
            batches = learner.batches(state.position)
        local_weight = sum(batch.weight for batch in batches)
        weight, stopping = place.totals(local_weight, float(stop.requested))
        if stopping:
            break

        for batch in batches:
            with _synchronised(network, batch is batches[-1]), _cast(config, place):
                objective = learner.objective(state.step, batch)
                # Data parallelism averages gradients; the loss is a mean over the global batch.
                share = objective.total * (place.world_size / max(weight, 1e-9))
                torch.autograd.backward(share)
            report.add({**objective.terms, "total": objective.total})
        gradient_norm = state.update(learning_rate(config, state.step))
        report.step(state.step, local_weight, gradient_norm)

        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            if place.leads:
                # The log first: what it holds beyond the newest checkpoint is dropped on resuming.
                report.validation(state.step, learner.validate())
                save_checkpoint(folder / "checkpoints", state.checkpoint(identity))
            place.barrier()

    report.close()
    if state.step == config.steps:
        state.adopt_average()
        return True
    if place.leads:
        save_checkpoint(folder / "checkpoints", state.checkpoint(identity))
    place.barrier()
    return False


def _synchronised(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients with the other processes only after the last micro-batch of a step."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        return network.no_sync()
    return nullcontext()


def _cast(config: OptimizerConfig, place: Place) -> torch.autocast:
    wanted = config.precision == "auto" and computes_bf16(place.device)
    enabled = wanted or config.precision == "bf16"
    return torch.autocast(place.device.type, torch.bfloat16, enabled=enabled)


class TrainingState:
    """Weights, moments and counters of a run: what a checkpoint holds."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, device: torch.device) -> None:
        self.module = module
        self.config = config
        self.step = 0
        self.position = 0
        # What is frozen already, such as the model under adapters, belongs to no checkpoint.
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names: dict[Tensor, str] = {p: name for name, p in trained.items()}
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(trained.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=device.type in ("cpu", "cuda"),
        )
        self._average: dict[str, Tensor] = {}
        if config.ema_decay is not None:
            self._average = {name: p.detach().clone() for name, p in trained.items()}

    def update(self, rate: float) -> float:
        """Take one optimizer step with the gradients at hand; return their norm before clipping.

        Raises FloatingPointError when the gradient is not finite; the weights are then untouched.
        """
        norm = nn.utils.clip_grad_norm_(list(self._names), self.config.clip_norm)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient of optimizer step {self.step} is not finite: the learning rate "
                f"({self.config.learning_rate}) may be too high, or a target damaged; the newest "
                "checkpoint is from before"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        self.position += self.config.batch_size
        return float(norm)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.config.ema_decay is not None:
            for parameter, name in self._names.items():
                self._average[name].lerp_(parameter, 1 - self.config.ema_decay)

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Replace the weights by their moving average, where one is kept."""
        for parameter, name in self._names.items():
            if name in self._average:
                parameter.copy_(self._average[name])

    def checkpoint(self, identity: str) -> Checkpoint:
        """Return the state as tensors by name and three values."""
        tensors = {f"model.{name}": p.detach() for p, name in self._names.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self._average.items()}
        for parameter, moments in self._optimizer.state.items():
            for kind, tensor in moments.items():
                tensors[f"optimizer.{kind}.{self._names[parameter]}"] = tensor
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return Checkpoint(self.step, self.position, identity, tensors)

    @torch.no_grad()
    def restore(self, folder: Path, identity: str) -> None:
        """Continue from the newest checkpoint below `folder`, if there is one.

        Raises `UserError` when it was written under another identity.
        """
        checkpoint = load_latest(folder)
        if checkpoint is None:
            return
        if checkpoint.identity != identity:
            raise UserError(
                f"{folder} holds a checkpoint of step {checkpoint.step} that was trained with "
                "other settings or data: continue with the settings it was started with, give "
                "this run another name, or move the folder away"
            )
        # A fused optimizer counts its steps where the weights are, the others on the host.
        fused = self._optimizer.defaults["fused"]
        for parameter, name in self._names.items():
            parameter.copy_(checkpoint.tensors[f"model.{name}"])
            if name in self._average:
                self._average[name].copy_(checkpoint.tensors[f"average.{name}"])
            self._optimizer.state[parameter] = {
                kind: checkpoint.tensors[f"optimizer.{kind}.{name}"].to(
                    "cpu" if kind == "step" and not fused else parameter.device
                )
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{kind}.{name}" in checkpoint.tensors
            }
        self.step, self.position = checkpoint.step, checkpoint.position


def _parameter_groups(
    trained: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Split the parameters: matrices decay, vectors (biases, norms) do not."""
    parameters = list(trained)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Report:
    """Progress bar and JSON log of a run: means of the loss terms, rate, time spent on data."""

    def __init__(self, path: Path, config: OptimizerConfig, place: Place, step: int) -> None:
        self._config, self._place = config, place
        self._log = TrainingLog(path, step) if place.leads else None
        hidden = None if place.leads else True
        self._bar = tqdm(total=config.steps, initial=step, unit="step", disable=hidden)
        self._sums: dict[str, float] = defaultdict(float)
        self._since, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time inside the block as waiting for data."""
        return _Stopwatch(self)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the loss terms of one micro-batch."""
        for name, term in terms.items():
            self._sums[name] += float(term.detach())

    def step(self, step: int, weight: float, gradient_norm: float) -> None:
        """Note that an optimizer step is done; write a line where one is due."""
        self._bar.update()
        self._sums["weight"] += weight
        self._steps += 1
        if step % self._config.log_every and step != self._config.steps:
            return
        names = sorted(self._sums)
        totals = dict(zip(names, self._place.totals(*(self._sums[n] for n in names)), strict=True))
        weight = max(totals.pop("weight"), 1e-9)
        elapsed_s = time.perf_counter() - self._since
        if self._log is not None:
            means = {name: total / weight for name, total in totals.items()}
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            self._log.write(
                step,
                **means,
                learning_rate=learning_rate(self._config, step - 1),
                gradient_norm=gradient_norm,
                steps_per_s=self._steps / elapsed_s,
                data_wait_share=self._waited_s / elapsed_s,
            )
        self._sums.clear()
        self._since, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured on held-out data at a checkpoint."""
        if self._log is not None and values:
            self._log.write(step, **values)

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited_s += seconds

    def close(self) -> None:
        """Take the progress bar off the screen's last line."""
        self._bar.close()


class _Stopwatch(AbstractContextManager[None]):
    def __init__(self, report: Report) -> None:
        self._report = report

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._report.waited(time.perf_counter() - self._start)
