"""Training a teacher by denoising the dataset's own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.config import LoaderConfig
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.facts import SIZES, ImageFacts
from stages.diffusion.losses import row_losses, weighting
from stages.diffusion.noise import noised, normal
from stages.diffusion.predictions import of_pair
from stages.diffusion.rows import CONDITION, of_one_kind, packed
from stages.diffusion.schedule import Schedule
from stages.diffusion.train_config import DenoisingFitConfig, DiffusionLossConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.host_memory import HostMemory
from stages.interruption import StopRequest
from stages.loader import Loader
from stages.optimization import Objective, attach, optimize
from stages.packed import Packed
from stages.sampling import keyed_generator
from store.order import Array, Order, rank_share
from store.side_tables import SideTable

DEV_LEVELS = 4
"""Noise levels, one of each quarter of the schedule, at which a dev image is tried."""
SQUARED_ERROR = DiffusionLossConfig()


class Images(Protocol):
    """A dataset of images, as far as a teacher is trained on it."""

    @property
    def facts(self) -> ImageFacts:
        """What a model must know of it."""

    def samples(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a split."""

    def table(self, name: str) -> SideTable:
        """Return a side table."""


def fit_denoiser(
    denoiser: Denoiser,
    dataset: Images,
    config: DenoisingFitConfig,
    folder: Path,
    *,
    seed: int,
    identity: str,
    place: Place,
    stop: StopRequest,
) -> bool:
    """Train `denoiser` on the images of a dataset and save it into `folder`.

    Of an image its variations take turns, epoch by epoch; its time, its noise and whether its
    condition is dropped are keyed by (seed, sample_id, epoch). Resumes from the newest checkpoint.
    Returns False when `stop` was requested first. Raises `UserError` for an empty train split, and
    for condition dropout where nothing stands for no condition.
    """
    network = attach(denoiser, config.optimizer, place)
    with closing(ImageLearner(denoiser, dataset, config, seed, place)) as learner:
        finished = optimize(
            denoiser.module,
            network,
            learner,
            config.optimizer,
            folder,
            seed=seed,
            identity=identity,
            place=place,
            stop=stop,
        )
    if finished and place.leads:
        denoiser.condition_dropout = config.condition_dropout if dataset.facts.conditions else None
        denoiser.save(folder)
    return finished


@dataclass(frozen=True)
class ImageBatch:
    """Noised images of a micro-batch, all of one shape.

    `arrays` are `x_t`, `x0` and `noise` [b, *shape], `t`, `alpha` and `sigma` [b] float64, `weight`
    [b] float32 and `condition.NAME` [b, ...].
    """

    arrays: Packed

    @property
    def weight(self) -> float:
        """Images, whatever they weigh: the loss is a mean over them."""
        return float(len(self.arrays["t"]))


class NoisedImages:
    """Makes rows of the images of one split."""

    def __init__(
        self,
        dataset: Images,
        split: str,
        schedule: Schedule,
        config: DenoisingFitConfig,
        seed: int,
    ) -> None:
        self.samples = dataset.samples(split)
        shapes = dataset.facts.buckets
        self.shapes = [shapes.index(shapes[sample["bucket"]]) for sample in self.samples]
        """Number of the shape of each sample's latents."""
        self._schedule, self._config, self._seed = schedule, config, seed
        self._latents, conditional = dataset.table("latents"), bool(dataset.facts.conditions)
        self._conditions = dataset.table("conditions") if conditional else None
        self._memory = HostMemory()

    def train_batch(self, part: Array) -> ImageBatch:
        """Return images of one shape; `part` is [b, 2]: place of the sample, epoch."""
        return self._batch([self._train_row(place, epoch) for place, epoch in part.tolist()])

    def dev_batch(self, places: Sequence[int], level: int) -> ImageBatch:
        """Return images of one shape with their conditions, at a noise level that never changes."""
        return self._batch([self._dev_row(place, level) for place in places])

    def _train_row(self, place: int, epoch: int) -> dict[str, np.ndarray]:
        sample = self.samples[place]
        images, texts = sample["latents"], sample["conditions"]
        key = (self._seed, sample["sample_id"], epoch)
        (t,) = self._schedule.draw(self._config.timesteps, 1, "fit", *key)
        dropped = keyed_generator("condition", *key).random() < self._config.condition_dropout
        text = 0 if dropped else int(texts[epoch // len(images) % len(texts)])
        return self._row(sample, int(images[epoch % len(images)]), text, t, "fit", *key)

    def _dev_row(self, place: int, level: int) -> dict[str, np.ndarray]:
        sample = self.samples[place]
        key = (self._seed, sample["sample_id"])
        t = self._schedule.draw(self._config.timesteps, DEV_LEVELS, "dev", *key)[level]
        first = int(sample["latents"][0]), int(sample["conditions"][0])
        return self._row(sample, *first, t, "dev", *key, level)

    def _row(
        self, sample: Mapping[str, Any], latent: int, condition: int, t: float, *key: object
    ) -> dict[str, np.ndarray]:
        image = self._latents[latent]
        x0, noise = image["latent"], normal(image["latent"].shape, *key)
        alpha, sigma = self._schedule.at(np.array(t))
        told = dict(self._conditions[condition]) if self._conditions is not None else {}
        if SIZES in image:
            told[SIZES] = image[SIZES]
        return {
            "x_t": noised(x0, noise, float(alpha), float(sigma)),
            "x0": x0,
            "noise": noise,
            "t": np.array(t),
            "alpha": np.array(alpha),
            "sigma": np.array(sigma),
            "weight": np.array(sample["weight"], np.float32),
        } | {f"{CONDITION}{name}": values for name, values in told.items()}

    def _batch(self, rows: Sequence[Mapping[str, np.ndarray]]) -> ImageBatch:
        return ImageBatch(packed({}, rows, self._memory))


class ImageLearner:
    """The error of what is predicted of noised images, with condition dropout."""

    def __init__(
        self,
        denoiser: Denoiser,
        dataset: Images,
        config: DenoisingFitConfig,
        seed: int,
        place: Place,
    ) -> None:
        _require_unconditional(dataset.facts, config)
        self._denoiser, self._config, self._place = denoiser, config, place
        schedule = Schedule(denoiser.schedule)
        self._train = NoisedImages(dataset, "train", schedule, config, seed)
        self._dev = NoisedImages(dataset, "dev", schedule, config, seed)
        if not self._train.samples:
            raise UserError("the train split of the dataset is empty: prepare one with images")
        size = config.optimizer.batch_size
        # What the order keeps together is what is alike in length.
        alike = 1 + np.array(self._train.shapes)
        self._order = Order.of([alike], seed)
        self._loader: Loader[list[ImageBatch]] = Loader(self._read, LoaderConfig(), size)

    def batches(self, position: int) -> Sequence[ImageBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._loader[position]

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._loader.close()

    def _read(self, position: int) -> list[ImageBatch]:
        size, place = self._config.optimizer.batch_size, self._place
        places = self._order.take(position, size)[:, 1]
        share = np.column_stack([places, self._order.epochs(position, size)])
        share = rank_share(share, place.rank, place.world_size)
        shapes = np.array(self._train.shapes)[share[:, 0]]
        most = self._config.optimizer.micro_batch_size
        return [self._train.train_batch(share[part]) for part in of_one_kind(shapes.tolist(), most)]

    def objective(self, step: int, batch: ImageBatch) -> Objective:
        """Return the weighted squared error of a micro-batch; the log shows it without weights."""
        arrays, kind = batch.arrays.to(self._place.device), self._denoiser.schedule.prediction
        losses = self._losses(arrays)
        config = self._config
        weights = weighting(
            arrays["alpha"], arrays["sigma"], kind, config.weighting, config.weighting_number
        )
        return Objective((arrays["weight"] * weights * losses).sum(), {"mse": losses.sum()})

    def _losses(self, arrays: Packed) -> Tensor:
        """Squared error [b] of what is predicted."""
        levels = arrays["alpha"], arrays["sigma"]
        kind = self._denoiser.schedule.prediction
        target = of_pair(arrays["x0"], arrays["noise"], *levels, kind)
        conditions = {
            name.removeprefix(CONDITION): arrays[name]
            for name in arrays.fields
            if name.startswith(CONDITION)
        }
        prediction = self._denoiser.predict(arrays["x_t"], arrays["t"], conditions)
        return row_losses(prediction, target, SQUARED_ERROR)

    def validate(self) -> Mapping[str, float]:
        """Return the squared error on the dev split, of the same noise at every checkpoint."""
        if not self._dev.samples:
            return {}
        total, count = 0.0, 0
        self._denoiser.module.eval()
        with torch.no_grad():
            for part in of_one_kind(self._dev.shapes, self._config.optimizer.batch_size):
                for level in range(DEV_LEVELS):
                    batch = self._dev.dev_batch(part, level)
                    total += float(self._losses(batch.arrays.to(self._place.device)).sum())
                    count += len(part)
        self._denoiser.module.train()
        return {"dev_mse": total / count}


def _require_unconditional(facts: ImageFacts, config: DenoisingFitConfig) -> None:
    if config.condition_dropout and facts.conditions and facts.unconditional == "none":
        raise UserError(
            f"fit.condition_dropout is {config.condition_dropout}, but the dataset has no row that "
            "stands for no condition: set it to 0, or prepare the dataset again"
        )
