"""The one place where configuration, dataset, family and store meet.

Every stage is its own process: what is built for one stage is never in memory with another's.
Stage one never builds a student, and stage two never loads a teacher.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.exclusion import alone
from pipeline.folders import RunFolders, system_name
from pipeline.inspection import audit_lines
from pipeline.progress import stage_identity
from pipeline.record import own_usage
from pipeline.results import write_report
from stages.architecture import Architecture
from stages.audit import audit, audit_samples, predictions
from stages.config import EvaluateConfig, RolloutConfig, TrainConfig
from stages.dataset import Dataset, read_header
from stages.distributed import Place, choose_device, peak_device_bytes, place
from stages.draw import draw_codes, draw_origin, draw_settings, read_draws
from stages.errors import UserError
from stages.evaluate import evaluate
from stages.family import Family, Sample, load_family
from stages.fit import fit
from stages.interruption import StopRequest
from stages.measure import Contender
from stages.prepare import prepare
from stages.quantization import Quantized, quantize_family
from stages.replay import Replay, open_replay
from stages.rollout import rollout
from stages.rollout_plan import create_store
from stages.saved_model import saved_family
from stages.train import train
from store import PredictionStore
from store.schema import DTypeName, Fast, Manifest, Quantization, changed_fields

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Section = TypeVar("Section")


class Assembly:
    """The stages of one run, as one process does its part of them."""

    def __init__(self, config: RunConfig, stop: StopRequest, task: int = 0, tasks: int = 1) -> None:
        self._config, self._stop = config, stop
        self._task, self._tasks = task, tasks
        self._folders = RunFolders(config)
        self._started = time.monotonic()
        self.peak_device_bytes = 0
        """Most memory that the stage held on the accelerator."""

    def run(self, stage: str) -> bool:
        """Do a stage (`train:NAME` for a student); False when stopped with more to do."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        name, _, student = stage.partition(":")
        match name:
            case "prepare":
                return self._prepare()
            case "fit":
                return self._fit()
            case "draw":
                return self._draw()
            case "rollout":
                return self._rollout()
            case "train":
                return self._train(student)
            case "evaluate":
                return self._evaluate()
            case _:
                raise UserError(f"there is no stage {stage!r}")

    def _prepare(self) -> bool:
        config = _given(self._config.prepare, "prepare")
        prepare(config, self._folders.dataset, self._folders.corpus)
        return True

    def _fit(self) -> bool:
        config, teacher = _given(self._config.fit, "fit"), _given(self._config.teacher, "teacher")
        model = teacher.model
        if model is None:
            raise UserError("the configuration has no section 'teacher.model' that could be fitted")
        dataset = Dataset.open(self._folders.dataset)
        with place(config.optimizer.device) as here:
            facts = dataset.facts.model_dump(mode="json")
            family = load_family(model.family).build(model, facts, seed=self._config.seed)
            family.adopt_codebooks(dataset.audio_codec().code_vectors())
            family.module.to(here.device)
            finished = fit(
                family,
                dataset.samples("train"),
                dataset.samples("dev"),
                config,
                self._folders.teacher,
                seed=self._config.seed,
                identity=stage_identity(self._config, "fit"),
                place=here,
                stop=self._stop,
            )
            self.peak_device_bytes = peak_device_bytes(here.device)
        return finished

    def _draw(self) -> bool:
        config, device, dataset = self._rollout_inputs()
        student = _load(_given(config.student, "rollout.student"), device, config.precision)
        finished = draw_codes(
            student, dataset.samples(config.split), config, self._folders.draws,
            seed=self._config.seed, task=self._task, tasks=self._tasks, stop=self._stop,
        )  # fmt: skip
        self.peak_device_bytes = peak_device_bytes(device)
        return finished

    def _rollout(self) -> bool:
        config, device, dataset = self._rollout_inputs()
        # One process audits; those that start beside it wait here, and find its store.
        with alone(self._folders.stages / "audit.lock") if config.audited else nullcontext():
            full = self._unquantized(config, dataset, device)
            teacher, quantized = self._rollout_teacher(config, dataset, device)
            replay = self._replay(config, teacher, dataset)
            samples = dataset.samples(config.split if replay is None else replay.manifest.split)
            origin: dict[str, str] = {}
            if config.source == "student":
                settings = draw_settings(config, teacher, samples, self._config.seed)
                origin = draw_origin(self._folders.draws, settings)
            store = create_store(
                self._folders.store,
                config,
                teacher,
                samples,
                facts=dataset.facts,
                dataset_fingerprint=dataset.header.fingerprint,
                seed=self._config.seed,
                student_fingerprint=origin.get("student", ""),
                replay=replay,
                quantized=quantized,
                quantization=_audited(config, dataset, teacher, quantized, full),
            )
        shards = [shard for shard in store.missing() if shard % self._tasks == self._task]
        finished = rollout(
            teacher,
            store,
            {sample["sample_id"]: sample for sample in samples},
            shards,
            batch_size=config.batch_size,
            stop=self._stop,
            draws=read_draws(self._folders.draws, shards, origin) if origin else replay,
        )
        self.peak_device_bytes = peak_device_bytes(device)
        return finished

    def _unquantized(
        self, config: RolloutConfig, dataset: Dataset, device: torch.device
    ) -> list[Tensor] | None:
        """Return what the teacher predicts in fp32 for the audit; None where there is none to do.

        Its model is gone when this returns, so that it and the quantized one are never together in
        memory. A store that is there has been audited.
        """
        chosen = _audit_samples(config, dataset)
        if not chosen or (self._folders.store / "manifest.json").exists():
            return None
        logger.info("audit: scoring %d recordings in fp32", len(chosen))
        teacher = self._teacher(dataset, device, "fp32")
        found = predictions(teacher, chosen, config.guidance.scale)
        self.peak_device_bytes = peak_device_bytes(device)
        del teacher
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _rollout_teacher(
        self, config: RolloutConfig, dataset: Dataset, device: torch.device
    ) -> tuple[Family, Quantized | None]:
        """Load the teacher as stage one has it: quantized on its way to the device, if at all."""
        if config.quantization is None:
            return self._teacher(dataset, device, config.precision), None
        teacher = self._teacher(dataset, torch.device("cpu"), config.precision)
        return teacher, quantize_family(teacher, config.quantization, device=device)

    def _replay(self, config: RolloutConfig, teacher: Family, dataset: Dataset) -> Replay | None:
        if config.replay is None:
            return None
        fingerprint = dataset.header.fingerprint
        return open_replay(config.replay, teacher, fingerprint, self._folders.store)

    def _rollout_inputs(self) -> tuple[RolloutConfig, torch.device, Dataset]:
        config = _given(self._config.rollout, "rollout")
        device = choose_device(config.device)
        return config, device, Dataset.open(self._folders.dataset)

    def _train(self, name: str) -> bool:
        config = self._config.students[name]
        store = PredictionStore.open(self._folders.store, cached_shards=config.buffer_shards)
        self._require_same_dataset(store)
        with place(config.optimizer.device) as here:
            family = self._student(config, store, here)
            finished = train(
                family,
                store,
                config,
                self._folders.student(name),
                seed=self._config.seed,
                identity=stage_identity(self._config, f"train:{name}"),
                place=here,
                stop=self._stop,
            )
            self.peak_device_bytes = peak_device_bytes(here.device)
        return finished

    def _require_same_dataset(self, store: PredictionStore) -> None:
        """Refuse a store of another dataset than the run's; a store alone needs none."""
        folder = self._folders.dataset
        if not (folder / "dataset.json").exists():
            return
        ours, stored = read_header(folder).fingerprint, store.manifest.fingerprints.dataset
        if ours != stored:
            raise UserError(
                f"the store {store.path} was made from the dataset {stored}, but the dataset of "
                f"this run ({folder}) is {ours}: roll out this dataset, or name the store's"
            )

    def _student(self, config: TrainConfig, store: PredictionStore, here: Place) -> Family:
        """Build a student from the store's manifest; weights as `init` says."""
        manifest = store.manifest
        if config.model.family != manifest.family:
            raise UserError(
                f"the student's family is {config.model.family!r}, but the store was written by "
                f"{manifest.family!r} (manifest.json): use the store's family"
            )
        family_class = load_family(config.model.family)
        if config.init.kind == "checkpoint":
            student = _load(_given(config.init.path, "init.path"), here.device, "fp32")
            different = changed_fields(student.config, config.model)
            if different:
                raise UserError(
                    f"init.path {config.init.path} holds a model of another architecture than the "
                    f"section model ({_differences(different)}): give the checkpoint's"
                )
            return student
        family = family_class.build(config.model, manifest.conditioning, seed=self._config.seed)
        if config.init.kind == "teacher":
            given = self._config.teacher and self._config.teacher.pretrained
            family.inherit(given.path if given else self._folders.teacher, config.init.layers)
        family.module.to(here.device)
        return family

    def _evaluate(self) -> bool:
        config = _given(self._config.evaluate, "evaluate")
        device = choose_device(config.device)
        dataset = Dataset.open(self._folders.dataset)
        samples = {sample["sample_id"]: sample for sample in dataset.samples(config.split)}
        reference = self._reference(config, device, dataset, samples)
        if reference is None:
            return False
        result = evaluate(
            self._contenders(dataset, device, reference.manifest),
            reference,
            samples,
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
        write_report(self._config, reference, result, time.monotonic() - self._started, usage)
        return True

    def _reference(
        self,
        config: EvaluateConfig,
        device: torch.device,
        dataset: Dataset,
        samples: Mapping[str, Sample],
    ) -> PredictionStore | None:
        """Return the complete store of the guided teacher on held-out samples; None if stopped."""
        settings = _given(self._config.rollout, "rollout").model_copy(
            update={
                "source": "teacher",
                "student": None,
                "replay": None,
                "split": config.split,
                "samples": config.samples,
                "variations": 1,
                "first_variation": 0,
                "target": config.target,
                "profile": Fast(),  # the measure itself must lose nothing
                "rollouts_per_shard": 4 * config.batch_size,
                "batch_size": config.batch_size,
            }
        )
        path = self._folders.report / "reference"
        teacher, quantized = self._rollout_teacher(settings, dataset, device)
        store = create_store(
            path,
            settings,
            teacher,
            list(samples.values()),
            facts=dataset.facts,
            dataset_fingerprint=dataset.header.fingerprint,
            seed=config.seed,
            quantized=quantized,
            quantization=None if quantized is None else quantized.record,
        )
        finished = rollout(
            teacher,
            store,
            samples,
            store.missing(),
            batch_size=settings.batch_size,
            stop=self._stop,
        )
        return PredictionStore.open(path) if finished else None

    def _contenders(
        self, dataset: Dataset, device: torch.device, manifest: Manifest
    ) -> list[Contender]:
        """Return what is compared: the teacher with and without guidance, and every student.

        A quantized teacher is the one that wrote the store; others are in fp32.
        """
        teacher = partial(self._teacher, dataset, device, "fp32")
        architecture = None
        if manifest.quantization is not None:
            settings = _given(self._config.rollout, "rollout")
            teacher = partial(self._quantized_teacher, settings, dataset, device)
            architecture = Architecture.model_validate(manifest.architecture)
        scale = manifest.guidance.scale
        systems = [
            Contender("teacher_guided", teacher, scale, architecture),
            Contender("teacher_unguided", teacher, 1.0, architecture),
        ]
        for name in self._config.students:
            load = partial(_load, self._folders.student(name), device, "fp32")
            systems.append(Contender(system_name(name), load, 1.0))
        return systems

    def _quantized_teacher(
        self, config: RolloutConfig, dataset: Dataset, device: torch.device
    ) -> Family:
        return self._rollout_teacher(config, dataset, device)[0]

    def _teacher(self, dataset: Dataset, device: torch.device, precision: str) -> Family:
        """Load the teacher from its folder, or from where it was trained."""
        given = _given(self._config.teacher, "teacher").pretrained
        if given is None:
            return _load(self._folders.teacher, device, precision)
        family = load_family(given.family)
        return family.pretrained(given, dataset.facts, device=str(device), dtype=DTYPES[precision])


def _load(folder: Path, device: torch.device, precision: str) -> Family:
    """Load a finished model of whatever family its folder says."""
    family = load_family(saved_family(folder))
    return family.load(folder, device=str(device), dtype=DTYPES[precision])


def _audit_samples(config: RolloutConfig, dataset: Dataset) -> list[Sample]:
    return audit_samples(dataset.samples(config.split)[: config.samples], config.audited)


def _audited(
    config: RolloutConfig,
    dataset: Dataset,
    teacher: Family,
    quantized: Quantized | None,
    full: list[Tensor] | None,
) -> Quantization | None:
    """Return the record of the teacher's precision, with what the audit finds; logs that."""
    if quantized is None and not config.audited:
        return None
    dtype: DTypeName = "bfloat16" if config.precision == "bf16" else "float32"
    record = Quantization(method="none", dtype=dtype) if quantized is None else quantized.record
    if full is None:
        return record
    found = audit(teacher, _audit_samples(config, dataset), config.guidance.scale, full)
    for line in audit_lines(found.model_dump()):
        logger.info("audit: %s", line)
    return record.model_copy(update={"audit": found})


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {saved!r}, not {ours!r}" for name, (saved, ours) in fields.items())


def _given(section: Section | None, name: str) -> Section:
    if section is None:
        raise UserError(f"the configuration has no section {name!r}, which this stage needs")
    return section
