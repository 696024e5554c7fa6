"""The one place where the configuration of a diffusion run, its dataset, models and store meet.

Every stage is its own process. Stage one never builds a student, stage two never a teacher, and
none of them has the encoders in memory beside a denoiser.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.diffusion_config import DiffusionRunConfig
from pipeline.folders import RunFolders, system_name
from pipeline.progress import stage_identity
from pipeline.record import own_usage
from pipeline.results import write_image_report
from stages.diffusion.config import DiffusionTeacher, DistilConfig, ModelContrast, RecordConfig
from stages.diffusion.dataset import ImageDataset
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.distil import distil
from stages.diffusion.evaluate import ImageContender, evaluate_images
from stages.diffusion.facts import Recording
from stages.diffusion.fit import fit_denoiser
from stages.diffusion.prepare import prepare_images
from stages.diffusion.previews import render
from stages.diffusion.record import record
from stages.diffusion.record_plan import create_record_store
from stages.distributed import choose_device, peak_device_bytes, place
from stages.errors import UserError
from stages.family import load_denoiser
from stages.interruption import StopRequest
from store import PredictionStore

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Section = TypeVar("Section")


class ImageAssembly:
    """The stages of one diffusion run, as one process does its part of them."""

    def __init__(
        self, config: DiffusionRunConfig, stop: StopRequest, task: int = 0, tasks: int = 1
    ) -> None:
        self._config, self._stop = config, stop
        self._task, self._tasks = task, tasks
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
                prepare_images(_given(self._config.prepare, "prepare"), self._folders.dataset)
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
        config, teacher = _given(self._config.fit, "fit"), _given(self._config.teacher, "teacher")
        model = _given(teacher.model, "teacher.model")
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
        config = _given(self._config.rollout, "rollout")
        device = choose_device(config.device)
        dataset = ImageDataset.open(self._folders.dataset)
        teacher, quantization = self._teacher(config, dataset, device)
        other = None
        if isinstance(config.contrast, ModelContrast):
            # On the CPU until its turn comes.
            other = self._pretrained(config.contrast.other, dataset, torch.device("cpu"), config)
        store = create_record_store(
            self._folders.store,
            config,
            teacher,
            dataset,
            seed=self._config.seed,
            quantization=quantization,
            other=other,
        )
        shards = [shard for shard in store.missing() if shard % self._tasks == self._task]
        finished = record(teacher, store, dataset, shards, config, stop=self._stop, other=other)
        if finished and config.previews is not None and self._task == 0:
            render(teacher, dataset, config.previews, config.guidance.scale, self._folders.previews)
        self.peak_device_bytes = peak_device_bytes(device)
        return finished

    def _teacher(
        self, config: RecordConfig, dataset: ImageDataset, device: torch.device
    ) -> tuple[Denoiser, Quantization | None]:
        """Load the teacher as stage one has it: quantized on its way to the device, if at all."""
        teacher = _given(self._config.teacher, "teacher")
        first = device if config.quantization is None else torch.device("cpu")
        if teacher.pretrained is not None:
            denoiser = self._pretrained(teacher.pretrained, dataset, first, config)
        else:
            denoiser = load_denoiser().load(
                self._folders.teacher, device=str(first), dtype=DTYPES[config.precision]
            )
        if config.quantization is None:
            return denoiser, None
        return denoiser, quantize_denoiser(
            denoiser, config.quantization, keep=config.keep, device=device
        )

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
                previews=self._previews(config),
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
            ImageFacts.model_validate(manifest.conditioning),
            seed=self._config.seed,
            schedule=Recording.of(manifest.recording).schedule,
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
                return _given(config.model.pipeline, "model.pipeline"), config.model.pipeline_config
        teacher = _given(self._config.teacher, "teacher").pretrained
        return (self._folders.teacher, None) if teacher is None else (teacher.path, teacher.config)

    def _previews(self, config: DistilConfig) -> TeacherPreviews | None:
        """Return what a student's images stand beside, and what makes them visible."""
        if config.previews is None:
            return None
        return TeacherPreviews.open(
            self._folders.previews, ImageDataset.open(self._folders.dataset)
        )

    def _evaluate(self) -> bool:
        config = _given(self._config.evaluate, "evaluate")
        recording = _given(self._config.rollout, "rollout")
        device = choose_device(config.device)
        dataset = ImageDataset.open(self._folders.dataset)
        result = evaluate_images(
            self._contenders(dataset, recording, device),
            dataset,
            config,
            self._folders.report,
            identity=stage_identity(self._config, "evaluate"),
            stop=self._stop,
        )
        self.peak_device_bytes = peak_device_bytes(device)
        if result is None:
            return False
        usage = own_usage(self.peak_device_bytes)
        write_image_report(self._config, result, time.monotonic() - self._started, usage)
        return True

    def _contenders(
        self, dataset: ImageDataset, recording: RecordConfig, device: torch.device
    ) -> Sequence[ImageContender]:
        """Return what is compared: the teacher with and without guidance, and every student."""
        config = _given(self._config.evaluate, "evaluate")
        scale = config.guidance_scale or recording.guidance.scale

        def teacher() -> Denoiser:
            return self._teacher(recording, dataset, device)[0]

        def student(name: str) -> Denoiser:
            folder, dtype = self._folders.student(name), DTYPES[recording.precision]
            return load_denoiser().load(folder, device=str(device), dtype=dtype)

        return [
            ImageContender("teacher_guided", teacher, guidance_scale=scale),
            ImageContender("teacher_unguided", teacher),
            *(
                ImageContender(system_name(name), partial(student, name), told_scale=scale)
                for name in self._config.students
            ),
        ]


def _given(section: Section | None, name: str) -> Section:
    if section is None:
        raise UserError(f"the configuration has no section {name!r}, which this stage needs")
    return section
