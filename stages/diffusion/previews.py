"""Images at fixed seeds: the teacher's, rendered once, and a student's while it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from stages.diffusion.asked_rows import ConditionRows, Rows, moved
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.draws import Sample, draws_of
from stages.diffusion.facts import ImageFacts
from stages.diffusion.images import to_uint8
from stages.diffusion.noise import normal
from stages.diffusion.parts import Asked, Passes, ask, mixed
from stages.diffusion.record_config import Contrast, PreviewConfig, UnconditionalContrast
from stages.diffusion.schedule import Schedule
from stages.diffusion.solver import Predict, trajectory
from stages.diffusion.train_config import StudentPreviews
from stages.errors import UserError
from stages.publish import publish_folder, replace_file

LATENTS = "latents.safetensors"
"""File of the teacher's previews: start noise, conditions and final latents by image."""
GRID = "grid.png"
NOISE, CONDITION, GUIDED, UNGUIDED = "noise", "condition", "guided", "unguided"
"""Parts of it, before the number of an image and, of conditions, the name of the tensor."""
FACTS = "previews"
"""Entry of its metadata: one, because the file keeps several in no order."""
LEAST_SIDE = 64
"""Pixels of a side of an image in a grid, at least."""
MARGIN = 2
"""Pixels between two images of a grid."""
UNCONDITIONAL = UnconditionalContrast()


class Decoder(Protocol):
    """What makes images of latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [b, c, h, w] to images [b, C, H, W] in [−1, 1] float32."""
        ...

    def free(self) -> None:
        """Let go of what is loaded."""
        ...


class Images(Protocol):
    """A dataset of images, as far as previews are rendered of it."""

    @property
    def facts(self) -> ImageFacts:
        """What a model must know of it."""
        ...

    def samples(self, split: str) -> Sequence[Sample]:
        """Return the rows of a split."""
        ...

    def table(self, name: str) -> Rows:
        """Return a side table."""
        ...

    def decoder(self, device: str) -> Decoder | None:
        """Return what makes images of its latents on a device, where that is at hand."""
        ...


@torch.inference_mode()
def render(
    denoiser: Denoiser,
    dataset: Images,
    config: PreviewConfig,
    scale: float,
    path: Path,
    *,
    contrast: Contrast = UNCONDITIONAL,
) -> None:
    """Render the teacher's previews into the folder `path`, whole or not at all, and once.

    Of the first samples of `config.split`, each in its first variation, there are the final latents
    guided at `scale` and, where that takes a second pass, unguided, from start noise that depends
    on the seed and the sample alone. The second pass is that of `contrast`; a model without one,
    or of which the difference is to another model, is what it is. With a decoder, on the denoiser's
    device, there is a picture of them, a row for each way. Raises `UserError` for a split without
    samples.
    """
    if path.exists():
        return
    samples = dataset.samples(config.split)[: config.samples]
    if not samples:
        raise UserError(
            f"the split {config.split!r} of rollout.previews.split has no samples: prepare some "
            f"(prepare.{config.split}_images), or choose another split"
        )
    denoiser.module.eval()
    device = _device(denoiser)
    second: Passes = "one" if scale == 1 else _second_pass(denoiser, dataset.facts, contrast)
    ways = {GUIDED: 1.0} if second == "one" else {GUIDED: scale, UNGUIDED: 1.0}
    conditions = dataset.table("conditions") if dataset.facts.conditions else None
    rows = ConditionRows(dataset.table("latents"), conditions)
    tensors: dict[str, np.ndarray] = {}
    for number, sample in enumerate(samples):
        draw = draws_of(sample)[0]
        shape = dataset.facts.buckets[draw.bucket]
        noise = normal(shape, "preview", config.seed, sample["sample_id"])
        tensors[f"{NOISE}/{number}"] = noise
        for way, at in ways.items():
            scales, t = np.array([at], np.float32), np.zeros(1)
            passes: Passes = "one" if at == 1 else second
            without = passes == "unconditional"
            asked = rows.asked(noise[None], t, [draw], scales, unconditional=without)
            predict = _guided(denoiser, asked.to(device), passes)
            tensors[f"{way}/{number}"] = _solved(denoiser, predict, noise, config.steps)
        told = {**asked.conditions, **asked.sizes}
        tensors |= {f"{CONDITION}/{number}/{name}": told[name][0, ...] for name in told}
    ids = [sample["sample_id"] for sample in samples]
    embedded = denoiser.embedded_guidance
    shown = ways[GUIDED] if embedded is None else embedded
    facts = {"sample_ids": ids, "steps": config.steps, "scale": shown}
    latents = {way: [tensors[f"{way}/{n}"] for n in range(len(samples))] for way in ways}
    with publish_folder(path) as draft:
        (draft / LATENTS).write_bytes(save(tensors, metadata={FACTS: json.dumps(facts)}))
        decoder = dataset.decoder(str(device))
        if decoder is not None:
            with _away(denoiser):
                (draft / GRID).write_bytes(grid(latents, decoder))


@dataclass(frozen=True)
class Previews:
    """What the teacher's previews began with and ended in."""

    sample_ids: tuple[str, ...]
    steps: int
    scale: float
    """Of guidance, by the second pass or told as a number; 1 for none."""
    noise: tuple[np.ndarray, ...]
    """[c, h, w] float32 of each image."""
    conditions: tuple[dict[str, np.ndarray], ...]
    """Encoded condition of each image, and what it is told of sizes."""
    latents: dict[str, list[np.ndarray]]
    """Final latents [c, h, w] float32 of each image, by how they were made."""

    @classmethod
    def read(cls, path: Path) -> Previews:
        """Read what `render` wrote into a folder."""
        with safe_open(path / LATENTS, "np") as file:
            facts = json.loads(file.metadata()[FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids = facts["sample_ids"]
        ways = [way for way in (GUIDED, UNGUIDED) if f"{way}/0" in tensors]
        numbers = range(len(ids))
        starts = [f"{CONDITION}/{number}/" for number in numbers]
        return cls(
            sample_ids=tuple(ids),
            steps=facts["steps"],
            scale=facts["scale"],
            noise=tuple(tensors[f"{NOISE}/{number}"] for number in numbers),
            conditions=tuple(
                {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
                for start in starts
            ),
            latents={way: [tensors[f"{way}/{number}"] for number in numbers] for way in ways},
        )


@dataclass(frozen=True)
class StudentGallery:
    """Draws a student's images while it learns, from the start noise of the teacher's."""

    teacher: Previews
    config: StudentPreviews
    folder: Path
    """Where latents and pictures of each step go; what is there is not drawn again."""
    decoder: Decoder | None = None

    @torch.inference_mode()
    def draw(self, denoiser: Denoiser, step: int) -> None:
        """Draw the images after so many optimizer steps, in one pass each, where some are due.

        The latents are those of the student's own schedule, which begins in the same noise.
        """
        path = self.folder / f"{step:08d}.safetensors"
        if step % self.config.every or path.exists():
            return
        device, scale = _device(denoiser), self.config.guidance_scale
        told = self.teacher.scale if scale is None else scale
        latents = []
        for noise, tensors in zip(self.teacher.noise, self.teacher.conditions, strict=True):
            conditions = {name: moved(values[None], device) for name, values in tensors.items()}
            predict = _told(denoiser, conditions, told)
            latents.append(_solved(denoiser, predict, noise, self.teacher.steps))
        if self.decoder is not None:
            shown = {**self.teacher.latents, "student": latents}
            replace_file(path.with_suffix(".png"), grid(shown, self.decoder))
        replace_file(path, save({str(number): latent for number, latent in enumerate(latents)}))


def _second_pass(denoiser: Denoiser, facts: ImageFacts, contrast: Contrast) -> Passes:
    """What guides one model away from itself; `one` where there is nothing."""
    if contrast.kind == "adapter":
        return "adapter"
    has_none = facts.unconditional == "none" or denoiser.takes_scale
    return "one" if has_none or contrast.kind == "model" else "unconditional"


def _guided(denoiser: Denoiser, asked: Asked, passes: Passes) -> Predict:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return mixed(*ask(denoiser, replace(asked, x=x, t=t), passes), asked.scale)

    return predict


def _told(denoiser: Denoiser, conditions: Mapping[str, Tensor], scale: float) -> Predict:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        number = torch.full((len(x),), scale, device=x.device) if denoiser.takes_scale else None
        return denoiser.predict(x, t, conditions, number).float()

    return predict


def _solved(denoiser: Denoiser, predict: Predict, noise: np.ndarray, steps: int) -> np.ndarray:
    """Final latent [*shape] float32 of one image; alone, so that no batch moves its last bits."""
    schedule = Schedule(denoiser.schedule)
    x = moved(noise[None], _device(denoiser))
    for state in trajectory(predict, x, schedule.solver_times(steps), schedule):
        x = state.x
    latent: np.ndarray = x[0].cpu().numpy()
    return latent


def _device(denoiser: Denoiser) -> torch.device:
    device: torch.device = next(denoiser.module.parameters()).device
    return device


@contextmanager
def _away(denoiser: Denoiser) -> Iterator[None]:
    """Keep a denoiser in the memory of the host inside the block, so that a decoder has room."""
    device = _device(denoiser)
    if device.type == "cpu":
        yield
        return
    with torch.inference_mode(False):
        denoiser.module.to("cpu")
    try:
        yield
    finally:
        with torch.inference_mode(False):
            denoiser.module.to(device)


def grid(latents: Mapping[str, Sequence[np.ndarray]], decoder: Decoder) -> bytes:
    """Decode latents [c, h, w] and lay them out, a row for each way; return a PNG file.

    Images of several sizes stand in cells of the largest, and tiny ones are enlarged whole times.
    """
    rows = [
        [to_uint8(decoder.decode(torch.from_numpy(latent[None])))[0] for latent in row]
        for row in latents.values()
    ]
    decoder.free()
    smallest = min(min(image.shape[:2]) for row in rows for image in row)
    times = -(-LEAST_SIDE // smallest)
    rows = [[image.repeat(times, 0).repeat(times, 1) for image in row] for row in rows]
    images = [image for row in rows for image in row]
    height, width = (MARGIN + max(image.shape[axis] for image in images) for axis in (0, 1))
    shape = (len(rows) * height, len(rows[0]) * width, images[0].shape[2])
    sheet = np.full(shape, 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = y * height, x * width
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    file = BytesIO()
    Image.fromarray(sheet.squeeze(-1) if sheet.shape[2] == 1 else sheet).save(file, "PNG")
    return file.getvalue()
