"""The one place where configuration, dataset, family and store meet.

Every stage is its own process: what is built for one stage is never in memory with another's.
Stage one never builds a student, and stage two never loads a teacher.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.exclusion import alone
from pipeline.folders import RunFolders, system_name
from pipeline.progress import stage_identity
from pipeline.record import own_usage
from pipeline.results import write_report
from pipeline.run_config import RunConfig, given
from pipeline.teachers import Teachers, load_model, teacher_path
from stages.architecture import Architecture
from stages.background_writer import Drawn
from stages.code_drift import code_differences, code_drift, require_same_codes
from stages.config import EvaluateConfig, RolloutConfig, TrainConfig
from stages.dataset import Dataset, read_header
from stages.distributed import Place, choose_device, peak_device_bytes, place
from stages.draw import (
    draw_codes,
    draw_origin,
    draw_plan,
    draw_settings,
    read_draws,
    read_refused,
)
from stages.drift import AuditChoice, AuditedStore, Progress, audited, chosen_keys
from stages.drift_limits import limits_of
from stages.errors import UserError
from stages.estimate import Estimate, estimated, missing_of, time_batches, trial_plan
from stages.evaluate import evaluate
from stages.family import Family, Sample, load_family
from stages.fit import fit
from stages.free_space import Lengths, refuse_small_disk
from stages.interruption import StopRequest
from stages.measure import Contender
from stages.prepare import prepare
from stages.replay import Replay, open_replay
from stages.rollout import GivenCodes, predict, rollout
from stages.rollout_plan import create_store, lay_out
from stages.sharing import EVERYTHING, Share
from stages.train import require_same_dataset, train
from store import PredictionStore
from store.object_url import ObjectUrl
from store.plan import Key
from store.rejected import Rejected
from store.remote import store_exists
from store.schema import Fast, Manifest, changed_fields


class Assembly:
    """The stages of one run, as one process does its part of them."""

    def __init__(self, config: RunConfig, stop: StopRequest, share: Share = EVERYTHING) -> None:
        self._config, self._stop, self._share = config, stop, share
        self._folders = RunFolders(config)
        self._started = time.monotonic()
        self.peak_device_bytes = 0
        """Most memory that the stage held on the accelerator."""

    def run(self, stage: str) -> bool:
        """Do a stage (`train:NAME` for a student, `rollout:NAME` for a round).

        Returns False when it was stopped with more to do.
        """
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        name, _, part = stage.partition(":")
        match name:
            case "prepare":
                return self._prepare()
            case "fit":
                return self._fit()
            case "draw":
                return self._draw(part or None)
            case "rollout":
                return self._rollout(part or None)
            case "train":
                return self._train(part)
            case "evaluate":
                return self._evaluate()
            case _:
                raise UserError(f"there is no stage {stage!r}")

    def _prepare(self) -> bool:
        config = given(self._config.prepare, "prepare")
        prepare(config, self._folders.dataset, self._folders.corpus)
        return True

    def _fit(self) -> bool:
        config, teacher = given(self._config.fit, "fit"), given(self._config.teacher, "teacher")
        model = teacher.model
        if model is None:
            raise UserError("the configuration has no section 'teacher.model' that could be fitted")
        dataset = Dataset.open(self._folders.dataset)
        with place(config.optimizer.device) as here:
            facts = dataset.facts.model_dump(mode="json")
            family = load_family(model.family).build(
                model, facts, seed=self._config.seed, device=str(here.device)
            )
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

    def _draw(self, round_name: str | None) -> bool:
        config, device, dataset = self._rollout_inputs(round_name)
        student = load_model(given(config.student, "rollout.student"), device, config.precision)
        finished = draw_codes(
            student, dataset.samples(config.split), config, self._folders.draws_of(round_name),
            seed=self._config.seed, task=self._share.task, tasks=self._share.tasks, stop=self._stop,
        )  # fmt: skip
        self.peak_device_bytes = peak_device_bytes(device)
        return finished

    def _rollout(self, round_name: str | None) -> bool:
        config, device, dataset = self._rollout_inputs(round_name)
        path, draws = self._folders.store_of(round_name), self._folders.draws_of(round_name)
        teachers = Teachers(self._config, dataset, device)
        # One process audits; those that start beside it wait here, and find its store.
        with alone(self._folders.lock_of(path)) if config.audited else nullcontext():
            full = teachers.in_full(config, path, round_name)
            teacher, quantized = teachers.for_rollout(config, round_name)
            replay = self._replay(config, teacher, dataset, path)
            samples = dataset.samples(config.split if replay is None else replay.manifest.split)
            origin: dict[str, str] = {}
            refused: Rejected = ()
            drawn: list[list[Key]] = []
            if config.source == "student":
                refused = read_refused(draws)
                drawn = draw_plan(config, teacher, samples, self._config.seed, refused)
                origin = draw_origin(draws, draw_settings(config, drawn, self._config.seed))
            laid = lay_out(
                config,
                teacher,
                samples,
                facts=dataset.facts,
                dataset_fingerprint=dataset.header.fingerprint,
                seed=self._config.seed,
                student_fingerprint=origin.get("student", ""),
                replay=replay,
                refused=refused,
                quantized=quantized,
                quantization=teachers.audited(config, teacher, quantized, full),
            )
            store = create_store(path, teacher, laid)
        if config.disk_check:
            refuse_small_disk(store, _lengths(config, teacher, samples, replay), config.free_floor)
        share = self._share
        codes: Mapping[Key, GivenCodes] | None = replay
        if origin:
            # Of what the student draws a process has its own part; others may not be ready yet.
            share = replace(share, static=True)
            wanted = (key for shard in share.own(store.missing()) for key in store.plan[shard])
            codes = read_draws(draws, wanted, drawn, origin)
        write = partial(
            rollout,
            teacher,
            store,
            {sample["sample_id"]: sample for sample in samples},
            batch_size=config.batch_size,
            stop=self._stop,
            draws=codes,
            free_floor=config.free_floor,
        )
        finished = share.write(store, write, self._stop)
        self.peak_device_bytes = peak_device_bytes(device)
        return finished

    def estimate(self, round_name: str | None) -> Estimate:
        """Say what a round of stage one will take, by a few batches; nothing is written.

        What a student has not drawn yet is timed on the recordings' own codes, which take the
        teacher as long to score.
        """
        config, device, dataset = self._rollout_inputs(round_name)
        path = self._folders.store_of(round_name)
        teachers = Teachers(self._config, dataset, device)
        teacher, quantized = teachers.for_rollout(config, round_name)
        replay = self._replay(config, teacher, dataset, path)
        samples = dataset.samples(config.split if replay is None else replay.manifest.split)
        laid = lay_out(
            config,
            teacher,
            samples,
            facts=dataset.facts,
            dataset_fingerprint=dataset.header.fingerprint,
            seed=self._config.seed,
            replay=replay,
            quantized=quantized,
            quantization=teachers.audited(config, teacher, quantized, None),
        )
        manifest, missing = laid.manifest, missing_of(path, laid.plan)
        if manifest.source == "student":
            manifest = manifest.model_copy(update={"source": "dataset"})
        by_id = {sample["sample_id"]: sample for sample in samples}
        lengths = _lengths(config, teacher, samples, replay)
        teacher.module.eval()
        trial = trial_plan(manifest, laid.plan, missing, config.batch_size)
        timed = None
        if trial is not None:

            def predicted(shards: Iterable[int]) -> Iterator[Drawn]:
                for shard in shards:
                    yield from predict(teacher, manifest, trial[shard], by_id, replay)

            with torch.inference_mode():
                timed = time_batches(manifest, trial, lengths, predicted)
        return estimated(
            manifest,
            laid.plan,
            missing,
            lengths,
            timed,
            rejected=len(laid.rejected),
            processes=config.processes,
            path=path,
            free_floor=config.free_floor,
        )

    def audit(
        self, round_name: str | None, choice: AuditChoice, progress: Progress
    ) -> AuditedStore:
        """Ask the teacher of a round again for some rollouts of its store; nothing is written."""
        config, device, dataset = self._rollout_inputs(round_name)
        store = PredictionStore.open(self._folders.store_of(round_name))
        keys = chosen_keys(list(store.keys()), choice.fraction, choice.seed)
        teacher, quantized = Teachers(self._config, dataset, device).for_rollout(config, round_name)
        require_same_codes(teacher, store)
        with progress(len(keys)) as bar:
            drifts = code_drift(teacher, store, keys, batch_size=config.batch_size, done=bar.update)
        differences = code_differences(store, teacher, quantized, dataset)
        limits = limits_of(store.manifest, config.precision, quantized=quantized is not None)
        return audited(store, keys, choice, drifts, differences, limits)

    def _replay(
        self, config: RolloutConfig, teacher: Family, dataset: Dataset, path: Path | ObjectUrl
    ) -> Replay | None:
        if config.replay is None:
            return None
        return open_replay(config.replay, teacher, dataset.header.fingerprint, path)

    def _rollout_inputs(
        self, round_name: str | None
    ) -> tuple[RolloutConfig, torch.device, Dataset]:
        config = given(self._config.rollout_of(round_name), "rollout")
        device = choose_device(config.device)
        return config, device, Dataset.open(self._folders.dataset)

    def _train(self, name: str) -> bool:
        config = self._config.students[name]
        store = self._store(config)
        if (self._folders.dataset / "dataset.json").exists():
            require_same_dataset(store, read_header(self._folders.dataset).fingerprint)
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

    def _store(self, config: TrainConfig) -> PredictionStore:
        """Open the store that a student learns from."""
        path = self._folders.store_of(config.round)
        if config.round is not None and not store_exists(path):
            raise UserError(
                f"{path} is not there yet, which the round {config.round!r} makes: `foretell run` "
                f"does all stages in order, and `foretell rollout --round {config.round}` this one"
            )
        return PredictionStore.open(path, cached_shards=config.buffer_shards)

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
            student = load_model(given(config.init.path, "init.path"), here.device, "fp32")
            different = changed_fields(student.config, config.model)
            if different:
                raise UserError(
                    f"init.path {config.init.path} holds a model of another architecture than the "
                    f"section model ({_differences(different)}): give the checkpoint's"
                )
            return student
        family = family_class.build(
            config.model, manifest.conditioning, seed=self._config.seed, device=str(here.device)
        )
        if config.init.kind in ("teacher", "merged"):
            path, merged = teacher_path(self._config, config.round), config.init.kind == "merged"
            family.inherit(path, config.init.layers, merged=merged)
        family.module.to(here.device)
        return family

    def _evaluate(self) -> bool:
        config = given(self._config.evaluate, "evaluate")
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
        settings = given(self._config.rollout, "rollout").model_copy(
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
        teacher, quantized = Teachers(self._config, dataset, device).for_rollout(settings)
        laid = lay_out(
            settings,
            teacher,
            list(samples.values()),
            facts=dataset.facts,
            dataset_fingerprint=dataset.header.fingerprint,
            seed=config.seed,
            quantized=quantized,
            quantization=None if quantized is None else quantized.record,
        )
        store = create_store(path, teacher, laid)
        finished = rollout(
            teacher,
            store,
            samples,
            store.missing(),
            batch_size=settings.batch_size,
            stop=self._stop,
            free_floor=settings.free_floor,
        )
        return PredictionStore.open(path) if finished else None

    def _contenders(
        self, dataset: Dataset, device: torch.device, manifest: Manifest
    ) -> list[Contender]:
        """Return what is compared: the teacher with and without guidance, and every student.

        A quantized teacher is the one that wrote the store; others are in fp32.
        """
        teacher = partial(Teachers(self._config, dataset, device).speaking, manifest)
        architecture = None
        if manifest.quantization is not None:
            architecture = Architecture.model_validate(manifest.architecture)
        scale = manifest.guidance.scale
        systems = [
            Contender("teacher_guided", teacher, scale, architecture),
            Contender("teacher_unguided", teacher, 1.0, architecture),
        ]
        for name in self._config.students:
            load = partial(load_model, self._folders.student(name), device, "fp32")
            systems.append(Contender(system_name(name), load, 1.0))
        return systems


def _lengths(
    config: RolloutConfig, teacher: Family, samples: Sequence[Sample], replay: Replay | None
) -> Lengths:
    """Return how long rollouts are expected to become: as the recordings, or as given codes."""
    if replay is not None:
        longest = replay.longest()
    else:
        most = config.sampler.max_timesteps if config.source in ("teacher", "student") else None
        longest = {
            sample["sample_id"]: min(filter(None, (teacher.timesteps(sample), most)))
            for sample in samples
        }
    return lambda key: longest[key[0]]


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {saved!r}, not {ours!r}" for name, (saved, ours) in fields.items())
