"""The training loop of `fit` and `train`: one optimizer step after another, resumable exactly."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.checkpoint import Checkpoint, load_checkpoint, newest_whole, save_checkpoint
from stages.config import OptimizerConfig
from stages.distributed import Place, computes_bf16
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.sampling import keyed_seed
from stages.sharded import gather, is_sharded, like, reshard, shard, whole
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
        """Return what is reported at every checkpoint.

        Called on the leading process only, or, where weights are shared out, on all at once; they
        then must all do the same.
        """


class Model(Protocol):
    """A model, seen from the loop: a family or a denoiser, which calls `network`."""

    @property
    def module(self) -> nn.Module:
        """The bare network."""

    network: nn.Module
    """What it calls: the module, or its compiled or data-parallel form."""
    blocks: tuple[str, ...]
    """Patterns of the names of parts that a pass calls as modules, each whole."""


def attach(family: Model, config: OptimizerConfig, place: Place) -> nn.Module:
    """Let `family` call a compiled or data-parallel form of its module, and return it.

    Where weights are shared out, the parameters of the module itself become others, once and for
    all; raises `UserError` for a module that cannot have that.
    """
    network: nn.Module = family.module
    if config.parallel == "fsdp" and place.world_size > 1:
        if not is_sharded(network):
            shard(network, family.blocks, place.world_size, place.device)
        return network
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
    store: str = "",
) -> bool:
    """Train `module` to the configured step, from the newest whole checkpoint in `folder` if any.

    `network` is what `learner` calls: `module` itself or its data-parallel form; `prepare`, called
    before every step with its number, may return another from then on. `identity` names
    everything that a checkpoint depends on, and `store` is the hash of the manifest of what is
    learned from; others are refused with `UserError`, and so are more processes than sequences of
    a batch, which would wait for each other. The random state of a step is keyed by (seed, step,
    rank), so that a resumed run ends with the same weights. Returns False when `stop` was
    requested first; a checkpoint then holds the state. Once it is finished the leading process
    has all weights, also where they were shared out.
    """
    if place.world_size > config.batch_size:
        raise UserError(
            f"optimizer.batch_size is {config.batch_size}, fewer sequences than the "
            f"{place.world_size} processes that share them: raise it, or lower "
            "optimizer.processes"
        )
    state = TrainingState(module, config, place, identity, store)
    state.restore(folder / "checkpoints")
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

        passes_of_others = _passes_of_others(module, len(batches), place)
        for batch in batches:
            with _synchronised(network, batch is batches[-1]), _cast(config, place):
                objective = learner.objective(state.step, batch)
                # Data parallelism averages gradients; the loss is a mean over the global batch.
                share = objective.total * (place.world_size / max(weight, 1e-9))
                torch.autograd.backward(share)
            report.add({**objective.terms, "total": objective.total})
        for _ in range(passes_of_others):
            with _cast(config, place):
                torch.autograd.backward(0.0 * learner.objective(state.step, batches[-1]).total)
        gradient_norm = state.update(learning_rate(config, state.step))
        report.step(state.step, local_weight, gradient_norm)

        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            # The log first: what it holds beyond the newest checkpoint is dropped on resuming.
            if place.leads or is_sharded(module):
                report.validation(state.step, learner.validate())
                reshard(module)
            state.save(folder / "checkpoints")

    report.close()
    if state.step == config.steps:
        state.adopt_average()
        if is_sharded(module):
            gather(module, leads=place.leads)
        return True
    state.save(folder / "checkpoints")
    return False


def _passes_of_others(module: nn.Module, own: int, place: Place) -> int:
    """Return the passes of a step that others have left when this process has done its `own`.

    Where weights are shared out, nobody can do a pass without the others, and of a batch that does
    not divide evenly some processes have more micro-batches.
    """
    return place.most(own) - own if is_sharded(module) else 0


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

    def __init__(
        self, module: nn.Module, config: OptimizerConfig, place: Place, identity: str, store: str
    ) -> None:
        self.module = module
        self.config = config
        self._place, self._identity, self._store = place, identity, store
        self.step = 0
        self.position = 0
        # What is frozen already, such as the model under adapters, belongs to no checkpoint.
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names: dict[Tensor, str] = {p: name for name, p in trained.items()}
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(trained.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=place.device.type in ("cpu", "cuda"),
        )
        self._average: dict[str, Tensor] = {}
        if config.ema_decay is not None:
            self._average = {name: p.detach().clone() for name, p in trained.items()}

    def update(self, rate: float) -> float:
        """Take one optimizer step with the gradients at hand; return their norm before clipping.

        Raises FloatingPointError when the gradient is not finite; the weights are then untouched.
        """
        norm = whole(nn.utils.clip_grad_norm_(list(self._names), self.config.clip_norm))
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

    def save(self, folder: Path) -> None:
        """Let the leading process publish a checkpoint below `folder`; every process must call."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._tensors():
            full = whole(tensor)
            if self._place.leads:
                # What is gathered would not all fit on the device.
                tensors[name] = (full if full is tensor else full.cpu()).contiguous()
        if self._place.leads:
            checkpoint = Checkpoint(self.step, self.position, self._identity, self._store, tensors)
            save_checkpoint(folder, checkpoint, self.config.keep_checkpoints)
        self._place.barrier()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint holds, by name."""
        for parameter, name in self._names.items():
            yield f"model.{name}", parameter.detach()
        for name, average in self._average.items():
            yield f"average.{name}", average
        for parameter, moments in self._optimizer.state.items():
            for kind, tensor in moments.items():
                yield f"optimizer.{kind}.{self._names[parameter]}", tensor

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Continue from the newest whole checkpoint below `folder`, if there is one.

        Raises `UserError` when it was trained on another store or under another identity.
        """
        step = self._newest(folder)
        if step is None:
            return
        checkpoint = load_checkpoint(folder, step)
        self._require_ours(folder, checkpoint)
        for parameter, name in self._names.items():
            parameter.copy_(like(checkpoint.tensors[f"model.{name}"], parameter))
            if name in self._average:
                average = checkpoint.tensors[f"average.{name}"]
                self._average[name].copy_(like(average, parameter))
            # A fused optimizer counts its steps where the weights are, the others on the host.
            counted = parameter.device if self._optimizer.defaults["fused"] else "cpu"
            moments = {
                kind: checkpoint.tensors[f"optimizer.{kind}.{name}"]
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{kind}.{name}" in checkpoint.tensors
            }
            self._optimizer.state[parameter] = {
                kind: moment.to(counted) if kind == "step" else like(moment, parameter)
                for kind, moment in moments.items()
            }
        self.step, self.position = checkpoint.step, checkpoint.position

    def _newest(self, folder: Path) -> int | None:
        """Return the step of which all processes continue; what the leading one sees counts."""
        step = newest_whole(folder) if self._place.leads else None
        (known,) = self._place.totals(-1.0 if step is None and self._place.leads else step or 0.0)
        return None if known < 0 else int(known)

    def _require_ours(self, folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.store != self._store:
            raise UserError(
                f"{folder} holds a checkpoint of step {checkpoint.step} that was trained on "
                f"another store (manifest {checkpoint.store[:12] or 'none'}) than the present one "
                f"(manifest {self._store[:12] or 'none'}): continue with that store, give this run "
                "another name, or move the folder away"
            )
        if checkpoint.identity != self._identity:
            raise UserError(
                f"{folder} holds a checkpoint of step {checkpoint.step} that was trained with "
                "other settings or data: continue with the settings it was started with, give "
                "this run another name, or move the folder away"
            )


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
    """Progress bar and log of a run: means of the loss terms, rate, time spent on data."""

    def __init__(self, path: Path, config: OptimizerConfig, place: Place, step: int) -> None:
        self._config, self._place = config, place
        self._log = TrainingLog(path, step, config.tensorboard) if place.leads else None
        self._bar = tqdm(
            desc=path.parent.name, total=config.steps, initial=step, unit="step",
            disable=None if place.leads else True, dynamic_ncols=True,
        )  # fmt: skip
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
            self._bar.set_postfix_str(postfix(means, self._waited_s / elapsed_s))
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


def postfix(means: Mapping[str, float], waited: float) -> str:
    """Return what a progress bar shows behind the rate, the most telling first.

    A narrow terminal cuts what comes last: the terms of which the total is made.
    """
    shown = [f"{name} {value:.4g}" for name, value in means.items() if name != "total"]
    return ", ".join([f"total {means['total']:.4g}", f"data wait {waited:.0%}", *shown])


class _Stopwatch(AbstractContextManager[None]):
    def __init__(self, report: Report) -> None:
        self._report = report

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._report.waited(time.perf_counter() - self._start)
