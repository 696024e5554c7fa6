"""Comparing guided and unguided teacher with the students, from the same start noise."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from stages.diffusion import judge as judges
from stages.diffusion.dataset import ImageDataset, ImageDecoder
from stages.diffusion.draws import Sample
from stages.diffusion.frechet import (
    Array,
    class_spread,
    frechet_distance,
    image_features,
    uses_pixels,
)
from stages.diffusion.generate import (
    Gallery,
    ImageContender,
    Item,
    batches_of,
    generate,
    items_of,
    path_steps,
    to_look_at,
)
from stages.diffusion.images import to_uint8
from stages.diffusion.judge import DigitsJudge
from stages.diffusion.train_config import ImageEvaluateConfig
from stages.interruption import StopRequest
from stages.metrics import Bootstrap, Ratio, comparisons, ratio
from stages.publish import claim, publish_file, replace_file
from stages.report_schema import (
    Comparison,
    Images,
    ImageSample,
    JudgeUse,
    Metric,
    SolverPath,
    System,
)
from stages.sampling import keyed_generator

IMAGES = "images"
"""Folder of the pictures, below the report's."""
REFERENCE = "reference"
"""Folder of the samples' own images, beside those of the systems."""
GUIDED = "teacher_guided"
PAIRED = ("paired_mse", "accuracy", "log_probability")
"""Metrics whose differences between systems are reported with paired intervals."""
COSTS = ("parameters", "flops_per_timestep")
"""What a report says of a system's architecture."""


@dataclass(frozen=True)
class ImageEvaluation:
    """The parts of a report that this stage finds out."""

    systems: dict[str, System]
    comparisons: tuple[Comparison, ...]
    judges: tuple[JudgeUse, ...]
    images: Images
    samples: int
    """Images per system."""
    conditions: int
    """Different conditions among them."""


def evaluate_images(
    contenders: Sequence[ImageContender],
    dataset: ImageDataset,
    config: ImageEvaluateConfig,
    folder: Path,
    *,
    identity: str,
    stop: StopRequest,
) -> ImageEvaluation | None:
    """Let every system draw from the same noise, and compare what came out.

    The contender `teacher_guided` is what the others are compared with. One system is in memory at
    a time, and the decoder after all of them. Batches that were drawn are not drawn again;
    `identity` names what they depend on, and `UserError` refuses a folder of another. Returns None
    when `stop` was requested first.
    """
    claim(folder / "identity", identity)
    if config.judge is not None:
        judges.require_digits(dataset.facts)
    items = items_of(dataset, config)
    galleries = {c.name: Gallery(folder / "systems" / c.name) for c in contenders}
    for contender in contenders:
        if not generate(contender, dataset, items, config, galleries[contender.name], stop):
            return None
        gc.collect()
    album = Album(dataset, items, config, folder)
    for name, gallery in galleries.items():
        for steps in config.steps:
            if stop.requested:
                return None
            album.develop(name, gallery, steps)
    return _sum_up(album, galleries)


class Album:
    """What was drawn, as images: their features, and some pictures for people."""

    def __init__(
        self,
        dataset: ImageDataset,
        items: Sequence[Item],
        config: ImageEvaluateConfig,
        folder: Path,
    ) -> None:
        """Look at the images of `items` in `folder`; nothing is decoded before it is asked for."""
        self.dataset, self.items, self.config, self.folder = dataset, items, config, folder
        facts = dataset.facts
        decoded = [(h * facts.downsample, w * facts.downsample) for _, h, w in facts.buckets]
        channels = facts.latent_channels if facts.encoder == "pixels" else 3
        self.pixels = uses_pixels([(*size, channels) for size in decoded])
        self.shown = to_look_at(items, config.images)

    @cached_property
    def _decoder(self) -> ImageDecoder:
        return self.dataset.decoder(self.config.device)

    def develop(self, name: str, gallery: Gallery, steps: int) -> None:
        """Decode what a system drew; of the leading count of steps some pictures are kept."""
        path = self._features_file(name, steps)
        if path.exists():
            return
        latents = gallery.latents(steps)
        features: list[Array] = [np.empty(0)] * len(self.items)
        leading = steps == self.config.steps[0]
        shown = {item.index for item in self.shown} if leading else set()
        batches = batches_of(self.items, self.config.batch_size)
        for batch in tqdm(batches, f"{name}, decoding", unit="batch", disable=None):
            decoded = self._decoded(np.stack([latents[item.index] for item in batch]))
            for item, image in zip(batch, decoded, strict=True):
                features[item.index] = image_features([image], pixels=self.pixels)[0]
                if item.index in shown:
                    write_png(self.folder / _picture(name, item.index), image)
        replace_file(path, save({"features": np.stack(features)}))

    def _features_file(self, name: str, steps: int) -> Path:
        return self.folder / "systems" / name / f"steps_{steps}.safetensors"

    def _decoded(self, latents: np.ndarray) -> NDArray[np.uint8]:
        with torch.inference_mode():
            return to_uint8(self._decoder.decode(torch.from_numpy(latents)))

    def features(self, name: str, steps: int) -> Array:
        """Features [N, D] of what a system drew."""
        with safe_open(self._features_file(name, steps), "np") as file:
            found: Array = file.get_tensor("features")
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels [N] that the items ask for; −1 for none."""
        return np.array([item.sample["label"] for item in self.items])

    @cached_property
    def references(self) -> Sequence[Sample]:
        """Samples of the split, whose own images the Fréchet distance is to."""
        return self.dataset.samples(self.config.split)

    @cached_property
    def reference_features(self) -> Array:
        """Features [M, D] of the reference images."""
        images = map(self.own_image, self.references)
        return np.stack([image_features([image], pixels=self.pixels)[0] for image in images])

    def own_image(self, sample: Sample) -> NDArray[np.uint8]:
        """Return the image [H, W, C] that a sample has; of the train split it is decoded."""
        if self.config.split != "train":
            return self.dataset.reference(sample["sample_id"])
        latent = self.dataset.table("latents")[sample["latents"][0]]["latent"]
        image: NDArray[np.uint8] = self._decoded(latent[None].astype(np.float32))[0]
        return image

    def trained_judge(self) -> DigitsJudge:
        """Train the judge on the images of the train split."""
        samples = self.dataset.samples("train")
        table = self.dataset.table("latents")
        latents = np.stack([table[sample["latents"][0]]["latent"] for sample in samples])
        images = self._decoded(latents.astype(np.float32))
        labels = np.array([sample["label"] for sample in samples])
        return DigitsJudge.trained(image_features(list(images), pixels=True), labels)

    def samples(self, systems: Sequence[str]) -> tuple[ImageSample, ...]:
        """Return the pictures for people, beside the samples' own images."""
        return tuple(self._sample(item, systems) for item in self.shown)

    def _sample(self, item: Item, systems: Sequence[str]) -> ImageSample:
        sample, reference = item.sample, _picture(REFERENCE, item.index)
        write_png(self.folder / reference, self.own_image(sample))
        label = sample["label"]
        name = self.dataset.facts.classes[label] if label >= 0 else ""
        return ImageSample(
            sample_id=sample["sample_id"],
            text=sample["text"] or name,
            reference=reference,
            files={system: _picture(system, item.index) for system in systems},
        )


def _picture(name: str, index: int) -> str:
    return f"{IMAGES}/{name}/{index:05d}.png"


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image [H, W, C], grey or RGB, whole or not at all."""
    with publish_file(path) as draft:
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(draft, "PNG")


def _sum_up(album: Album, galleries: Mapping[str, Gallery]) -> ImageEvaluation:
    config, items = album.config, album.items
    reason = None if config.judge is None else judges.missing_reason()
    judge = album.trained_judge() if config.judge is not None and reason is None else None
    draws = [str(item.index) for item in items]
    bootstrap = Bootstrap.over(draws, draws=config.bootstrap_draws, seed=config.seed)
    numbers: dict[int, dict[str, System]] = {}
    leading: dict[str, dict[str, Ratio]] = {}
    for steps in config.steps:
        found = {name: _ratios(name, steps, album, galleries, judge) for name in galleries}
        numbers[steps] = {
            name: _system(steps, name, album, galleries, found[name], bootstrap)
            for name in galleries
        }
        leading = leading or found
    first, *others = config.steps
    return ImageEvaluation(
        systems=numbers[first],
        comparisons=comparisons(leading, bootstrap, PAIRED),
        judges=_judge_uses(config, reason),
        images=Images(
            solver_steps=first,
            other_steps={steps: numbers[steps] for steps in others},
            features="pixels" if album.pixels else "areas",
            references=len(album.references),
            reference=_reference(album, judge),
            path=_path(first, galleries, config),
            samples=album.samples(list(galleries)),
        ),
        samples=len(items),
        conditions=len({item.draw.condition for item in items}),
    )


def _path(
    steps: int, galleries: Mapping[str, Gallery], config: ImageEvaluateConfig
) -> SolverPath | None:
    """Return how far every system is from the guided teacher on its way to the first images."""
    if GUIDED not in galleries:
        return None
    guided = galleries[GUIDED].paths(steps)
    draws = [str(index) for index in range(len(guided))]
    bootstrap = Bootstrap.over(draws, draws=config.bootstrap_draws, seed=config.seed)
    systems = {}
    for name, gallery in galleries.items():
        pairs = zip(gallery.paths(steps), guided, strict=True)
        squares = np.stack([_state_errors(ours, theirs) for ours, theirs in pairs])
        systems[name] = tuple(bootstrap.metric(ratio(errors)) for errors in squares.T)
    return SolverPath(steps=path_steps(steps), images=len(guided), systems=systems)


def _state_errors(ours: np.ndarray, theirs: np.ndarray) -> Array:
    """Mean squared error [S] of latents [S, c, h, w] on the way."""
    squares: Array = ((ours.astype(np.float64) - theirs) ** 2).mean((1, 2, 3))
    return squares


def _judge_uses(config: ImageEvaluateConfig, reason: str | None) -> tuple[JudgeUse, ...]:
    if config.judge is None:
        return ()
    measures = ("accuracy", "log_probability")
    return (JudgeUse(name=config.judge, measures=measures, reason=reason),)


def _ratios(
    name: str,
    steps: int,
    album: Album,
    galleries: Mapping[str, Gallery],
    judge: DigitsJudge | None,
) -> dict[str, Ratio]:
    """Return every metric of a system that has an interval, before it is summed."""
    found = {}
    if GUIDED in galleries:
        found["paired_mse"] = ratio(_squares(galleries[name], galleries[GUIDED], steps))
    if judge is not None:
        found |= _judged(judge, album.features(name, steps), album.labels)
    return found


def _judged(judge: DigitsJudge, features: Array, labels: NDArray[np.int64]) -> dict[str, Ratio]:
    return {
        "accuracy": ratio(judge.correct(features, labels)),
        "log_probability": ratio(judge.log_probability(features, labels)),
    }


def _squares(ours: Gallery, guided: Gallery, steps: int) -> list[float]:
    """Mean squared error of every final latent to the guided teacher's from the same noise."""
    pairs = zip(ours.latents(steps), guided.latents(steps), strict=True)
    return [float(((a.astype(np.float64) - b) ** 2).mean()) for a, b in pairs]


def _system(
    steps: int,
    name: str,
    album: Album,
    galleries: Mapping[str, Gallery],
    found: Mapping[str, Ratio],
    bootstrap: Bootstrap,
) -> System:
    facts, features = galleries[name].facts(), album.features(name, steps)
    values = {metric: bootstrap.metric(value) for metric, value in found.items()}
    plain: dict[str, float | None] = {
        "frechet": _frechet(features, album.reference_features),
        "class_spread": _spread(features, album.labels),
        "seconds_per_image": galleries[name].seconds(steps) / len(album.items),
        "passes": facts.passes,
    }
    if GUIDED in galleries:
        plain["frechet_to_guided"] = _frechet(features, album.features(GUIDED, steps))
    if facts.architecture is not None:
        plain |= {cost: getattr(facts.architecture, cost) for cost in COSTS}
        flops = facts.architecture.flops_per_timestep * facts.passes
        plain["total_flops_per_timestep"] = flops
    values |= {metric: Metric(value=value) for metric, value in plain.items() if value is not None}
    return System(**values)


def _reference(album: Album, judge: DigitsJudge | None) -> System:
    """Say what the reference images are like: how far apart two halves of them lie, for one."""
    features = album.reference_features
    labels = np.array([sample["label"] for sample in album.references])
    order = keyed_generator("halves", album.config.seed).permutation(len(features))
    plain = {
        "frechet": _frechet(features[order[::2]], features[order[1::2]]),
        "class_spread": _spread(features, labels),
    }
    values = {metric: Metric(value=value) for metric, value in plain.items() if value is not None}
    if judge is not None:
        judged = _judged(judge, features, labels)
        values |= {metric: Metric(value=value.value) for metric, value in judged.items()}
    return System(**values)


def _frechet(ours: Array, theirs: Array) -> float | None:
    return frechet_distance(ours, theirs) if min(len(ours), len(theirs)) > 1 else None


def _spread(features: Array, labels: NDArray[np.int64]) -> float | None:
    return class_spread(features, labels) if len(labels) and labels.min() >= 0 else None
