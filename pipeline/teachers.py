"""Loading who teaches: the run's own teacher, or an earlier student, quantized if wanted."""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.folders import RunFolders
from pipeline.inspection_text import audit_lines
from pipeline.run_config import RunConfig
from stages.audit import audit, audit_samples, predictions
from stages.config import RolloutConfig
from stages.dataset import Dataset
from stages.errors import UserError
from stages.family import Family, Sample, load_family
from stages.quantization import Quantized, quantize_family
from stages.refusals import takes_recording
from stages.saved_model import saved_family
from store.object_url import ObjectUrl
from store.remote import store_exists
from store.schema import DTypeName, Manifest, Quantization

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path, device: torch.device, precision: str) -> Family:
    """Load a finished model of whatever family its folder says."""
    family = load_family(saved_family(folder))
    return family.load(folder, device=str(device), dtype=DTYPES[precision])


def teacher_path(config: RunConfig, round_name: str | None) -> Path:
    """Where the weights are of who teaches a round; None stands for the run's own teacher."""
    folders = RunFolders(config)
    if round_name is not None:
        return folders.student(config.rounds[round_name].teacher)
    given = config.teacher and config.teacher.pretrained
    return given.weights if given else folders.teacher


class Teachers:
    """Loads the teachers of a run for one stage, whose dataset and device are known."""

    def __init__(self, config: RunConfig, dataset: Dataset, device: torch.device) -> None:
        self._config, self._dataset, self._device = config, dataset, device

    def load(
        self, precision: str, round_name: str | None = None, device: torch.device | None = None
    ) -> Family:
        """Load a round's teacher from its folder, or the run's own from where it was trained."""
        if self._config.teacher is None:
            raise UserError("the configuration has no section 'teacher', which this stage needs")
        given, device = self._config.teacher.pretrained, device or self._device
        if round_name is not None or given is None:
            return load_model(teacher_path(self._config, round_name), device, precision)
        family = load_family(given.family)
        dtype = DTYPES[precision]
        return family.pretrained(given, self._dataset.facts, device=str(device), dtype=dtype)

    def for_rollout(
        self, rollout: RolloutConfig, round_name: str | None = None
    ) -> tuple[Family, Quantized | None]:
        """Load a teacher as stage one has it: quantized on its way to the device, if at all."""
        if rollout.quantization is None:
            return self.load(rollout.precision, round_name), None
        teacher = self.load(rollout.precision, round_name, torch.device("cpu"))
        return teacher, quantize_family(teacher, rollout.quantization, device=self._device)

    def speaking(self, manifest: Manifest) -> Family:
        """Load the run's own teacher as it is evaluated: as it wrote a store, if quantized then.

        Others are in fp32, whatever the store was written in.
        """
        if manifest.quantization is None or self._config.rollout is None:
            return self.load("fp32")
        return self.for_rollout(self._config.rollout)[0]

    def in_full(
        self, rollout: RolloutConfig, store: Path | ObjectUrl, round_name: str | None
    ) -> list[Tensor] | None:
        """Return what the teacher predicts in fp32 for the audit; None where there is none to do.

        Its model is gone when this returns, so that it and the quantized one are never together in
        memory. A store that is there has been audited.
        """
        if not rollout.audited or store_exists(store):
            return None
        teacher = self.load("fp32", round_name)
        chosen = self._audit_samples(rollout, teacher)
        if not chosen:
            logger.warning("audit: left out, for the teacher takes none of the recordings")
            return None
        logger.info("audit: scoring %d recordings in fp32", len(chosen))
        found = predictions(teacher, chosen, rollout.guidance.scale)
        del teacher
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def audited(
        self,
        rollout: RolloutConfig,
        teacher: Family,
        quantized: Quantized | None,
        full: list[Tensor] | None,
    ) -> Quantization | None:
        """Return the record of a teacher's precision, with what the audit finds; logs that."""
        if quantized is None and not rollout.audited:
            return None
        dtype: DTypeName = "bfloat16" if rollout.precision == "bf16" else "float32"
        record = Quantization(method="none", dtype=dtype) if quantized is None else quantized.record
        if full is None:
            return record
        found = audit(teacher, self._audit_samples(rollout, teacher), rollout.guidance.scale, full)
        for line in audit_lines(found.model_dump()):
            logger.info("audit: %s", line)
        return record.model_copy(update={"audit": found})

    def _audit_samples(self, rollout: RolloutConfig, teacher: Family) -> list[Sample]:
        given = self._dataset.samples(rollout.split)[: rollout.samples]
        return audit_samples(given, rollout.audited, partial(takes_recording, teacher))
