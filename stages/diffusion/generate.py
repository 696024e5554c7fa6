"""Images of one system from keyed start noise, kept batch by batch so that nothing is drawn twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from stages.architecture import Architecture
from stages.diffusion.config import ImageEvaluateConfig
from stages.diffusion.dataset import ImageDataset
from stages.diffusion.denoiser import Conditions, Denoiser
from stages.diffusion.noise import normal
from stages.diffusion.schedule import Schedule
from stages.diffusion.solver import Predict, trajectory
from stages.guidance import guide
from stages.interruption import StopRequest
from stages.publish import replace_file
from store.schema import Record

UNCONDITIONAL = 0
"""Row of the table `conditions` that stands for no condition."""


@dataclass(frozen=True)
class ImageContender:
    """A system to be measured; its model is loaded when its turn comes and freed after it."""

    name: str
    """Name in the report."""
    load: Callable[[], Denoiser]
    """Loads the model."""
    guidance_scale: float = 1.0
    """Scale of guidance in two passes; 1 for a single pass."""
    told_scale: float | None = None
    """Scale that a model with `takes_scale` is told; None is the family's own default."""
    without_adapter: bool = False
    """Guide away from the model without its adapter, instead of without the condition."""
    load_other: Callable[[], Denoiser] | None = None
    """Guide away from another model, which is loaded beside this one."""
    architecture: Architecture | None = None
    """Its size, where the model that is loaded does not know it, being quantized."""

    @property
    def passes(self) -> int:
        """Forward passes per solver step."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(frozen=True)
class Item:
    """One image that every system draws."""

    index: int
    """Its place, which with the seed is the key of its start noise."""
    sample: Mapping[str, Any]
    """The sample whose condition it has."""
    condition: int
    """Row of the table `conditions`; −1 for an unconditional dataset."""
    shape: tuple[int, int, int]
    """Of its latent."""


def items_of(dataset: ImageDataset, config: ImageEvaluateConfig) -> list[Item]:
    """Take the conditions of the split in turn: its samples in order, then their next captions."""
    samples = dataset.samples(config.split)
    items = []
    for index in range(config.samples):
        turn, place = divmod(index, len(samples))
        conditions = samples[place]["conditions"]
        shape = dataset.facts.buckets[samples[place]["bucket"]]
        items.append(Item(index, samples[place], conditions[turn % len(conditions)], shape))
    return items


class SystemFacts(Record):
    """What is known of a system once its model was loaded."""

    passes: int
    """Forward passes per solver step."""
    architecture: Architecture | None
    """Size and cost of the model; null where it is not known."""


@dataclass(frozen=True)
class Gallery:
    """The latents that one system drew, below the folder of a report."""

    folder: Path

    def facts(self) -> SystemFacts:
        """Read what is known of the system."""
        return SystemFacts.model_validate_json((self.folder / "system.json").read_bytes())

    def note(self, facts: SystemFacts) -> None:
        """Write what is known of the system."""
        replace_file(self.folder / "system.json", facts.model_dump_json().encode())

    def batch(self, steps: int, number: int) -> Path:
        """Return the file of one batch at a count of solver steps."""
        return self.folder / f"steps_{steps}" / f"{number:05d}.safetensors"

    def latents(self, steps: int) -> list[np.ndarray]:
        """Read the final latents [c, h, w] float32 of all items, in their order."""
        found: dict[int, np.ndarray] = {}
        for path in self._files(steps):
            with safe_open(path, "np") as file:
                found |= {int(index): file.get_tensor(index) for index in file.keys()}  # noqa: SIM118
        return [found[index] for index in sorted(found)]

    def seconds(self, steps: int) -> float:
        """Return the seconds that the solver took for all items."""
        total = 0.0
        for path in self._files(steps):
            with safe_open(path, "np") as file:
                total += float(file.metadata()["seconds"])
        return total

    def _files(self, steps: int) -> list[Path]:
        return sorted(self.batch(steps, 0).parent.glob("*.safetensors"))


def generate(
    contender: ImageContender,
    dataset: ImageDataset,
    items: Sequence[Item],
    config: ImageEvaluateConfig,
    gallery: Gallery,
    stop: StopRequest,
) -> bool:
    """Draw every item at every count of solver steps, leaving out what the gallery holds.

    All systems begin with the same noise, whatever the batches. Returns False when `stop` was
    requested first; the model is loaded only where something is missing.
    """
    missing = [
        (steps, number, batch)
        for steps in config.steps
        for number, batch in enumerate(batches_of(items, config.batch_size))
        if not gallery.batch(steps, number).exists()
    ]
    if not missing:
        return True
    painter = Painter(contender, dataset, config.seed)
    gallery.note(SystemFacts(passes=contender.passes, architecture=painter.architecture))
    painter.warm_up(missing[0][2])
    for steps, number, batch in tqdm(missing, contender.name, unit="batch", disable=None):
        if stop.requested:
            return False
        started = time.perf_counter()
        latents = painter.draw(batch, steps)
        seconds = time.perf_counter() - started
        named = {str(item.index): latent for item, latent in zip(batch, latents, strict=True)}
        content = save(named, metadata={"seconds": repr(seconds)})
        replace_file(gallery.batch(steps, number), content)
    return True


def batches_of(items: Sequence[Item], batch_size: int) -> list[tuple[Item, ...]]:
    """Put items of one shape together, in batches of at most `batch_size`."""
    shapes = dict.fromkeys(item.shape for item in items)
    return [
        batch
        for shape in shapes
        for batch in batched([item for item in items if item.shape == shape], batch_size)
    ]


class Painter:
    """One system's model at work."""

    def __init__(self, contender: ImageContender, dataset: ImageDataset, seed: int) -> None:
        self._contender, self._dataset, self._seed = contender, dataset, seed
        self._denoiser = contender.load()
        self._other = None if contender.load_other is None else contender.load_other()
        for model in filter(None, (self._denoiser, self._other)):
            model.module.eval()
        self._schedule = Schedule(self._denoiser.schedule)
        self._device = next(self._denoiser.module.parameters()).device

    @cached_property
    def architecture(self) -> Architecture | None:
        """What the model costs."""
        return self._contender.architecture or self._denoiser.architecture()

    @torch.inference_mode()
    def draw(self, batch: Sequence[Item], steps: int) -> np.ndarray:
        """Return the final latents [b, c, h, w] float32 of items of one shape."""
        noise = np.stack([normal(i.shape, "start", self._seed, i.index) for i in batch])
        predict = self._predict(batch)
        times = self._schedule.solver_times(steps)
        x = torch.from_numpy(noise).to(self._device)
        for state in trajectory(predict, x, times, self._schedule):
            x = state.x
        latents: np.ndarray = x.cpu().numpy()
        return latents

    @torch.inference_mode()
    def warm_up(self, batch: Sequence[Item]) -> None:
        """Predict once untimed: first calls allocate and choose kernels."""
        x = torch.zeros((len(batch), *batch[0].shape), device=self._device)
        last = float(self._schedule.solver_times(1)[0])
        t = torch.full((len(batch),), last, dtype=torch.float64, device=self._device)
        self._predict(batch)(x, t)

    def _predict(self, batch: Sequence[Item]) -> Predict:
        contender, denoiser = self._contender, self._denoiser
        scale = self._told(len(batch))
        conditions = self._conditions(batch, [item.condition for item in batch])
        if contender.guidance_scale == 1:
            return lambda x, t: denoiser.predict(x, t, conditions, scale)
        without, dropped, off = self._contrast(batch, conditions)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            cond = denoiser.predict(x, t, conditions, scale)
            with off():
                uncond = without.predict(x, t, dropped, scale)
            return guide(cond, uncond, contender.guidance_scale)

        return guided

    def _contrast(
        self, batch: Sequence[Item], conditions: Conditions
    ) -> tuple[Denoiser, Conditions, Callable[[], AbstractContextManager[None]]]:
        """Return the model and the conditions that guidance leads away from."""
        if self._other is not None:
            return self._other, conditions, nullcontext
        if self._contender.without_adapter:
            return self._denoiser, conditions, self._denoiser.adapter_off
        return self._denoiser, self._conditions(batch, [UNCONDITIONAL] * len(batch)), nullcontext

    def _told(self, count: int) -> Tensor | None:
        told = self._contender.told_scale
        return None if told is None else torch.full((count,), told, device=self._device)

    def _conditions(self, batch: Sequence[Item], rows: Sequence[int]) -> Conditions:
        """Stack rows of the table `conditions`, and what the network is told of sizes."""
        table, latents = self._dataset.table("conditions"), self._dataset.table("latents")
        tensors = [dict(table[row]) for row in rows] if self._dataset.facts.conditions else []
        for item, row in zip(batch, tensors, strict=False):
            known = latents[item.sample["latents"][0]]
            row |= {name: known[name] for name in ("time_ids",) if name in known}
        return {
            name: torch.from_numpy(np.stack([row[name] for row in tensors])).to(self._device)
            for name in (tensors[0] if tensors else ())
        }


def grouped(items: Sequence[Item], count: int) -> Iterator[Item]:
    """Yield `count` items for people to look at: one of each condition, then what comes next."""
    first = {item.condition: item for item in reversed(items)}
    ahead = sorted(first.values(), key=lambda item: (item.sample["label"], item.index))
    rest = [item for item in items if first[item.condition] is not item]
    yield from [*ahead, *rest][:count]
