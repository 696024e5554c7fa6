"""Images of one system from keyed start noise, kept batch by batch: nothing is drawn twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from stages.architecture import Architecture
from stages.diffusion.asked_rows import ConditionRows
from stages.diffusion.dataset import ImageDataset
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Draw, Sample, draws_of
from stages.diffusion.noise import normal
from stages.diffusion.parts import Asked, Passes, ask, mixed
from stages.diffusion.schedule import Schedule
from stages.diffusion.solver import Predict, trajectory
from stages.diffusion.train_config import ImageEvaluateConfig
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.publish import replace_file
from store.schema import Record

PATH_STATES, PATH_IMAGES = 8, 64
"""Solver steps, and images, of which the latents on the way are kept: it bounds what lies on disk
(134 MB per system at 128×128×4)."""
LAYOUT = "2"
"""Version of the files of batches; others are drawn again."""


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
    guides_by: Literal["condition", "adapter", "model"] = "condition"
    """What the second pass goes without: the condition, the model's adapter, or the model, of
    which it is another one then."""
    load_other: Callable[[], Denoiser] | None = None
    """Loads that other model, which stays beside this one."""
    architecture: Architecture | None = None
    """Its size, where the model that is loaded does not know it, being quantized."""

    @property
    def passes(self) -> int:
        """Forward passes per solver step."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def needs_unconditional(self) -> bool:
        """Whether the second pass has the condition that stands for none."""
        return self.passes == 2 and self.guides_by == "condition"


@dataclass(frozen=True)
class Item:
    """One image that every system draws."""

    index: int
    """Its place, which with the seed is the key of its start noise."""
    sample: Sample
    """The sample whose condition it has."""
    draw: Draw
    """The variation whose condition it has."""
    shape: tuple[int, int, int]
    """Of its latent."""


def items_of(dataset: ImageDataset, config: ImageEvaluateConfig) -> list[Item]:
    """Take the conditions of the split in turn: its samples in order, then their next variations.

    Raises `UserError` for a split without samples.
    """
    samples = dataset.samples(config.split)
    if not samples:
        raise UserError(
            f"the dataset has no samples in the split {config.split!r} of evaluate.split: set "
            f"prepare.{config.split}_images, or choose another split"
        )
    items = []
    for index in range(config.samples):
        turn, place = divmod(index, len(samples))
        draws = draws_of(samples[place])
        draw = draws[turn % len(draws)]
        items.append(Item(index, samples[place], draw, dataset.facts.buckets[draw.bucket]))
    return items


def path_steps(steps: int) -> tuple[int, ...]:
    """After which solver steps, of so many, the latents are kept: at most 8, the last of them."""
    return tuple(
        np.unique(np.linspace(1, steps, min(PATH_STATES, steps)).round().astype(int)).tolist()
    )


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
        return self._tensors(steps, "latent")

    def paths(self, steps: int) -> list[np.ndarray]:
        """Read the latents [S, c, h, w] float32 on the way, after `path_steps`, of the first items.

        They are there for the first count of solver steps.
        """
        return self._tensors(steps, "path")

    def _tensors(self, steps: int, kind: str) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for file_path in self._files(steps):
            with safe_open(file_path, "np") as file:
                names = [name.split(".") for name in file.keys()]  # noqa: SIM118
                found |= {int(i): file.get_tensor(f"{k}.{i}") for k, i in names if k == kind}
        return [found[index] for index in sorted(found)]

    def holds(self, steps: int, number: int) -> bool:
        """Whether a batch is there, in the layout of this version."""
        path = self.batch(steps, number)
        if not path.exists():
            return False
        with safe_open(path, "np") as file:
            return bool(file.metadata().get("layout") == LAYOUT)

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
    requested first; the model is loaded only where something is missing. Raises `UserError` for
    guidance that the dataset has nothing for, and for a system that draws what is not finite.
    """
    missing = [
        (steps, number, batch)
        for steps in config.steps
        for number, batch in enumerate(batches_of(items, config.batch_size))
        if not gallery.holds(steps, number)
    ]
    if not missing:
        return True
    if contender.needs_unconditional and dataset.facts.unconditional == "none":
        raise UserError(
            f"{contender.name} is to be guided at scale {contender.guidance_scale}, but the "
            "dataset has no conditions to leave out: set evaluate.guidance_scale to 1"
        )
    painter = Painter(contender, dataset, config.seed)
    gallery.note(SystemFacts(passes=contender.passes, architecture=painter.architecture()))
    painter.warm_up(missing[0][2])
    for steps, number, batch in tqdm(missing, contender.name, unit="batch", disable=None):
        if stop.requested:
            return False
        started = time.perf_counter()
        latents, path = painter.draw(batch, steps)
        seconds = time.perf_counter() - started
        _require_finite(contender.name, batch, latents)
        named = {f"latent.{i.index}": latent for i, latent in zip(batch, latents, strict=True)}
        if steps == config.steps[0]:
            named |= {
                f"path.{item.index}": states
                for item, states in zip(batch, path.cpu().numpy(), strict=True)
                if item.index < PATH_IMAGES
            }
        content = save(named, metadata={"seconds": repr(seconds), "layout": LAYOUT})
        replace_file(gallery.batch(steps, number), content)
    return True


def _require_finite(name: str, batch: Sequence[Item], latents: np.ndarray) -> None:
    lost = [item.index for item, x in zip(batch, latents, strict=True) if not np.isfinite(x).all()]
    if lost:
        raise UserError(
            f"{name} draws latents that are not finite (the first is image {lost[0]}): its "
            "training diverged, or its precision is too low for it; train it again with a lower "
            "learning rate, or leave it out"
        )


def batches_of(items: Sequence[Item], batch_size: int) -> list[Sequence[Item]]:
    """Put items of one shape together, in batches of at most `batch_size`."""
    batches: list[Sequence[Item]] = []
    for shape in dict.fromkeys(item.shape for item in items):
        alike = [item for item in items if item.shape == shape]
        batches += [alike[at : at + batch_size] for at in range(0, len(alike), batch_size)]
    return batches


class Painter:
    """One system's model at work."""

    def __init__(self, contender: ImageContender, dataset: ImageDataset, seed: int) -> None:
        """Load the model, and the other one that its guidance leads away from."""
        self._contender, self._seed = contender, seed
        self._denoiser = contender.load()
        self._other = None if contender.load_other is None else contender.load_other()
        for model in filter(None, (self._denoiser, self._other)):
            model.module.eval()
        self._schedule = Schedule(self._denoiser.schedule)
        self._device = next(self._denoiser.module.parameters()).device
        conditions = dataset.table("conditions") if dataset.facts.conditions else None
        self._rows = ConditionRows(dataset.table("latents"), conditions)

    def architecture(self) -> Architecture:
        """Return how large the model is and what it costs."""
        return self._contender.architecture or self._denoiser.architecture()

    @torch.inference_mode()
    def draw(self, batch: Sequence[Item], steps: int) -> tuple[np.ndarray, Tensor]:
        """Draw items of one shape.

        Returns their final latents [b, c, h, w] and, where the model is, those after `path_steps`
        [b, S, c, h, w], both float32.
        """
        times = self._schedule.solver_times(steps)
        asked = self._asked(batch, float(times[0]))
        kept, path, x = path_steps(steps), [], asked.x
        for state in trajectory(self._predict(asked), x, times, self._schedule):
            x = state.x
            if state.step in kept:
                path.append(x)
        return x.cpu().numpy(), torch.stack(path, 1)

    @torch.inference_mode()
    def warm_up(self, batch: Sequence[Item]) -> None:
        """Predict once untimed: first calls allocate and choose kernels."""
        asked = self._asked(batch, float(self._schedule.solver_times(1)[0]))
        self._predict(asked)(asked.x, asked.t)

    def _asked(self, batch: Sequence[Item], t: float) -> Asked:
        """Start noise with its conditions; every item's noise is its own, whatever the batch."""
        contender = self._contender
        return self._rows.asked(
            np.stack([normal(i.shape, "start", self._seed, i.index) for i in batch]),
            np.full(len(batch), t),
            [item.draw for item in batch],
            np.full(len(batch), contender.guidance_scale, np.float32),
            unconditional=contender.needs_unconditional,
        ).to(self._device)

    def _predict(self, asked: Asked) -> Predict:
        """Return what predicts along a trajectory with the conditions of its start."""
        contender = self._contender

        def predict(x: Tensor, t: Tensor) -> Tensor:
            here = replace(asked, x=x, t=t)
            if contender.passes == 1:
                return self._denoiser.predict(x, t, here.conditions, self._told(len(x)))
            return mixed(*self._branches(here), here.scale)

        return predict

    def _branches(self, asked: Asked) -> tuple[Tensor, Tensor | None]:
        """Predict [b, *shape] twice: with what guidance leads to, and with what it leads from."""
        passes: Passes = "adapter" if self._contender.guides_by == "adapter" else "unconditional"
        if self._other is None:
            return ask(self._denoiser, asked, passes)
        return ask(self._denoiser, asked, "one")[0], ask(self._other, asked, "one")[0]

    def _told(self, count: int) -> Tensor | None:
        told = self._contender.told_scale
        return None if told is None else torch.full((count,), told, device=self._device)


def to_look_at(items: Sequence[Item], count: int) -> list[Item]:
    """Choose `count` items for people: the first of each condition, by label, then the others."""
    first = {item.draw.condition: item for item in reversed(items)}
    ahead = sorted(first.values(), key=lambda item: (item.sample["label"], item.index))
    rest = [item for item in items if first[item.draw.condition] is not item]
    return [*ahead, *rest][:count]
