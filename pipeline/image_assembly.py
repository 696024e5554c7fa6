"""The one place where the configuration of a diffusion run, its dataset, models and store meet.

Every stage is its own process. Stage one never builds a student, stage two never a teacher, and
none of them has the encoders in memory beside a denoiser.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.diffusion_config import DiffusionRunConfig
from pipeline.exclusion import alone
from pipeline.folders import RunFolders, system_name
from pipeline.progress import stage_identity
from pipeline.record import own_usage
from pipeline.results import write_image_report
from pipeline.run_config import given
from stages.diffusion.dataset import ImageDataset, read_header
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.distil import distil
from stages.diffusion.evaluate import evaluate_images
from stages.diffusion.facts import ImageFacts, Recording
from stages.diffusion.fit import fit_denoiser
from stages.diffusion.generate import ImageContender
from stages.diffusion.holding import quantize_denoiser
from stages.diffusion.model_config import DiffusionTeacher
from stages.diffusion.prepare import prepare_images
from stages.diffusion.previews import Previews, StudentGallery, render
from stages.diffusion.record import record, rollout_rows, time_rows
from stages.diffusion.record_config import ModelContrast, RecordConfig
from stages.diffusion.record_plan import LaidOut, create_record_store, lay_out_records
from stages.diffusion.row_drift import predicted_keys, require_recorded, row_differences, row_drift
from stages.diffusion.train_config import DistilConfig, ImageEvaluateConfig
from stages.distributed import choose_device, peak_device_bytes, place
from stages.drift import AuditChoice, AuditedStore, Progress, audited, chosen_keys
from stages.drift_limits import limit_of
from stages.errors import UserError
from stages.estimate import Estimate, estimated, missing_of
from stages.family import load_denoiser
from stages.free_space import refuse_small_disk
from stages.interruption import StopRequest
from stages.quantization import Quantized
from stages.sharing import EVERYTHING, Share
from stages.train import require_same_dataset
from store import PredictionStore
from store.remote import store_exists
from store.schema import Manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Models(NamedTuple):
    """What stage one asks."""

    teacher: Denoiser
    quantized: Quantized | None
    """What the teacher was before it was quantized."""
    other: Denoiser | None
    """The second model of a contrast between two."""


class ImageAssembly:
    """The stages of one diffusion run, as one process does its part of them."""

    def __init__(
        self, config: DiffusionRunConfig, stop: StopRequest, share: Share = EVERYTHING
    ) -> None:
        self._config, self._stop, self._share = config, stop, share
        self._folders = RunFolders(config)
        self._started = time.monotonic()
        self.peak_device_bytes = 0
        """Most memory that the stage held on the accelerator."""

    def run(self, stage: str) -> bool:
        """Do a stage (`train:NAME` for a student); False when it was stopped with more to do."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        name, _, part = stage.partition(":")
        match name:
            case "prepare":
                prepare_images(given(self._config.prepare, "prepare"), self._folders.dataset)
                return True
            case "fit":
                return self._fit()
            case "rollout":
                return self._rollout()
            case "train":
                return self._train(part)
            case "evaluate":
                return self._evaluate()
            case _:
                raise UserError(f"there is no stage {stage!r}")

    def _fit(self) -> bool:
        config, teacher = given(self._config.fit, "fit"), given(self._config.teacher, "teacher")
        model = given(teacher.model, "teacher.model")
        dataset = ImageDataset.open(self._folders.dataset)
        with place(config.optimizer.device) as here:
            denoiser = load_denoiser().build(
                model, dataset.facts, seed=self._config.seed, device=str(here.device)
            )
            finished = fit_denoiser(
                denoiser,
                dataset,
                config,
                self._folders.teacher,
                seed=self._config.seed,
                identity=stage_identity(self._config, "fit"),
                place=here,
                stop=self._stop,
            )
            self.peak_device_bytes = peak_device_bytes(here.device)
        return finished

    def _rollout(self) -> bool:
        config, dataset, models = self._stage_one()
        laid = self._laid_out(config, dataset, models)
        store = create_record_store(self._folders.store, dataset, laid)
        if config.disk_check:
            rows = rollout_rows(config.rows)
            refuse_small_disk(store, lambda _key: rows, config.free_floor)

        def write(shards: Iterable[int]) -> bool:
            return record(
                models.teacher, store, dataset, shards, config, stop=self._stop, other=models.other
            )

        finished = self._share.write(store, write, self._stop)
        if finished and config.previews is not None:
            # Whichever worker is the first to see the end.
            with alone(self._folders.previews.with_name("previews.lock")):
                render(
                    models.teacher,
                    dataset,
                    config.previews,
                    config.guidance.scale,
                    self._folders.previews,
                    contrast=config.contrast,
                )
        self.peak_device_bytes = peak_device_bytes(choose_device(config.device))
        return finished

    def estimate(self) -> Estimate:
        """Say what stage one will take, by a few batches; nothing is written."""
        config, dataset, models = self._stage_one()
        laid = self._laid_out(config, dataset, models)
        path, rows = self._folders.store, rollout_rows(config.rows)
        missing = missing_of(path, laid.plan)
        return estimated(
            laid.manifest,
            laid.plan,
            missing,
            lambda _key: rows,
            time_rows(models.teacher, laid, missing, dataset, config, other=models.other),
            rejected=0,
            processes=config.processes,
            path=path,
            free_floor=config.free_floor,
        )

    def audit(self, choice: AuditChoice, progress: Progress) -> AuditedStore:
        """Ask the teacher again for some rollouts of the store; nothing is written."""
        config, dataset, models = self._stage_one()
        store = PredictionStore.open(self._folders.store)
        require_recorded(store, models.other)
        keys = chosen_keys(predicted_keys(store), choice.fraction, choice.seed)
        with progress(len(keys)) as bar:
            drift = row_drift(
                models.teacher, store, keys,
                batch_size=config.batch_size, other=models.other, done=bar.update,
            )  # fmt: skip
        differences = row_differences(
            store, *models, precision=config.precision,
            dataset_fingerprint=dataset.header.fingerprint,
        )  # fmt: skip
        limit = limit_of(store.manifest, config.precision, quantized=models.quantized is not None)
        return audited(store, keys, choice, [drift], differences, [limit])

    def _laid_out(self, config: RecordConfig, dataset: ImageDataset, models: _Models) -> LaidOut:
        return lay_out_records(
            config,
            models.teacher,
            dataset,
            seed=self._config.seed,
            quantized=models.quantized,
            other=models.other,
        )

    def _stage_one(self) -> tuple[RecordConfig, ImageDataset, _Models]:
        """Open what stage one needs, and load what it asks."""
        config = given(self._config.rollout, "rollout")
        dataset = ImageDataset.open(self._folders.dataset)
        teacher, quantized = self._teacher(config, dataset, choose_device(config.device))
        other = None
        if isinstance(config.contrast, ModelContrast):
            # On the CPU until its turn comes.
            other = self._pretrained(config.contrast.other, dataset, torch.device("cpu"), config)
        return config, dataset, _Models(teacher, quantized, other)

    def _teacher(
        self, config: RecordConfig, dataset: ImageDataset, device: torch.device
    ) -> tuple[Denoiser, Quantized | None]:
        """Load the teacher as stage one has it: quantized on its way to the device, if at all."""
        teacher = given(self._config.teacher, "teacher")
        first = device if config.quantization is None else torch.device("cpu")
        if teacher.pretrained is not None:
            denoiser = self._pretrained(teacher.pretrained, dataset, first, config)
        else:
            denoiser = load_denoiser().load(
                self._folders.teacher, device=str(first), dtype=DTYPES[config.precision]
            )
        if config.quantization is None:
            return denoiser, None
        before = denoiser.fingerprint(), denoiser.architecture()
        record = quantize_denoiser(denoiser, config.quantization, keep=config.keep, device=device)
        return denoiser, Quantized(record, *before)

    @property
    def _embedded_guidance(self) -> float | None:
        teacher = self._config.teacher
        given = teacher.pretrained if teacher else None
        return given.embedded_guidance if given else None

    def _pretrained(
        self,
        given: DiffusionTeacher,
        dataset: ImageDataset,
        device: torch.device,
        config: RecordConfig,
    ) -> Denoiser:
        dtype = DTYPES[config.precision]
        return load_denoiser().pretrained(given, dataset.facts, device=str(device), dtype=dtype)

    def _train(self, name: str) -> bool:
        config = self._config.students[name]
        store = PredictionStore.open(self._folders.store, cached_shards=config.buffer_shards)
        if (self._folders.dataset / "dataset.json").exists():
            require_same_dataset(store, read_header(self._folders.dataset).fingerprint)
        with place(config.optimizer.device) as here:
            student = self._student(config, store, str(here.device))
            finished = distil(
                student,
                store,
                config,
                self._folders.student(name),
                seed=self._config.seed,
                identity=stage_identity(self._config, f"train:{name}"),
                place=here,
                stop=self._stop,
                previews=self._gallery(name, config),
            )
            self.peak_device_bytes = peak_device_bytes(here.device)
        return finished

    def _student(self, config: DistilConfig, store: PredictionStore, device: str) -> Denoiser:
        """Build a student from the store's manifest; weights as `init` says."""
        manifest = store.manifest
        if manifest.family != "diffusion":
            raise UserError(
                f"the store {store.path} was written by the family {manifest.family!r} "
                "(manifest.json), which is no diffusion model: name a store of one"
            )
        weights, weights_config = self._weights(config)
        return load_denoiser().build(
            config.model,
            ImageFacts.of(manifest),
            seed=self._config.seed,
            schedule=Recording.of(manifest).schedule,
            weights=weights,
            weights_config=weights_config,
            device=device,
        )

    def _weights(self, config: DistilConfig) -> tuple[Path | None, Path | None]:
        """Return where a student's weights are copied from, and the configuration beside them."""
        match config.init.kind:
            case "fresh":
                return None, None
            case "checkpoint":
                return config.init.path, None
            case "pipeline":
                return given(config.model.pipeline, "model.pipeline"), config.model.pipeline_config
        teacher = given(self._config.teacher, "teacher").pretrained
        return (self._folders.teacher, None) if teacher is None else (teacher.path, teacher.config)

    def _gallery(self, name: str, config: DistilConfig) -> StudentGallery | None:
        """Return what draws a student's images beside the teacher's, where that is asked for."""
        if config.previews is None:
            return None
        if not self._folders.previews.exists():
            raise UserError(
                f"students.{name}.previews is given, but {self._folders.previews}, which stage one "
                "renders, is not there: give rollout.previews, or leave the student's out"
            )
        decoder = None
        if (self._folders.dataset / "dataset.json").exists():
            decoder = ImageDataset.open(self._folders.dataset).decoder(config.optimizer.device)
        teacher = Previews.read(self._folders.previews)
        folder = self._folders.student(name) / "previews"
        return StudentGallery(teacher, config.previews, folder, decoder)

    def _evaluate(self) -> bool:
        config = given(self._config.evaluate, "evaluate")
        device = choose_device(config.device)
        dataset = ImageDataset.open(self._folders.dataset)
        result = evaluate_images(
            self._contenders(config, dataset, device),
            dataset,
            config,
            self._folders.report,
            identity=stage_identity(self._config, "evaluate"),
            stop=self._stop,
        )
        self.peak_device_bytes = peak_device_bytes(device)
        if result is None:
            return False
        write_image_report(
            self._config,
            self._store_manifest(),
            result,
            time.monotonic() - self._started,
            own_usage(self.peak_device_bytes),
        )
        return True

    def _store_manifest(self) -> Manifest | None:
        path = self._folders.store
        return PredictionStore.open(path).manifest if store_exists(path) else None

    def _contenders(
        self, config: ImageEvaluateConfig, dataset: ImageDataset, device: torch.device
    ) -> Sequence[ImageContender]:
        """Return what is compared: the teacher with and without guidance, and every student.

        All compute in the precision in which the teacher was recorded.
        """
        recording = self._config.rollout or RecordConfig()
        contrast, told = recording.contrast, self._embedded_guidance
        scale = recording.guidance.scale if told is None else told
        scale = scale if config.guidance_scale is None else config.guidance_scale

        def teacher() -> Denoiser:
            return self._teacher(recording, dataset, device)[0]

        def student(name: str) -> Denoiser:
            folder, dtype = self._folders.student(name), DTYPES[recording.precision]
            return load_denoiser().load(folder, device=str(device), dtype=dtype)

        guided = ImageContender("teacher_guided", teacher, guidance_scale=scale)
        if told is not None:
            guided = ImageContender("teacher_guided", teacher, told_scale=scale)
        elif isinstance(contrast, ModelContrast):
            other = partial(self._pretrained, contrast.other, dataset, device, recording)
            guided = replace(guided, guides_by="model", load_other=other)
        elif contrast.kind == "adapter":
            guided = replace(guided, guides_by="adapter")
        return [
            guided,
            ImageContender("teacher_unguided", teacher, told_scale=None if told is None else 1.0),
            *(
                ImageContender(system_name(name), partial(student, name), told_scale=scale)
                for name in self._config.students
            ),
        ]
