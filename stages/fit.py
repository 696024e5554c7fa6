"""Training a teacher by cross entropy on the dataset's own codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.config import FitConfig
from stages.data import CodeBatch, DatasetBatches
from stages.distributed import Place
from stages.family import Family, Sample
from stages.interruption import StopRequest
from stages.losses import cross_entropy, stream_weights
from stages.optimization import Objective, attach, optimize
from stages.sampling import keyed_generator, mask_forbidden


def fit(
    family: Family,
    train: Sequence[Sample],
    dev: Sequence[Sample],
    config: FitConfig,
    folder: Path,
    *,
    seed: int,
    identity: str,
    place: Place,
    stop: StopRequest,
) -> bool:
    """Train `family` on the samples' own codes and save it into `folder`.

    Conditions are dropped for a share of the samples, keyed by (seed, sample_id, epoch), so that
    the unconditional branch of guidance exists. Resumes from the newest checkpoint. Returns False
    when `stop` was requested first.
    """
    learner = CodeLearner(family, train, dev, config, seed, place)
    network = attach(family, config.optimizer, place)
    finished = optimize(
        family.module,
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
        family.condition_dropout = config.condition_dropout
        family.save(folder)
    return finished


class CodeLearner:
    """Cross entropy of the recording's codes, with condition dropout and alignment."""

    def __init__(
        self,
        family: Family,
        train: Sequence[Sample],
        dev: Sequence[Sample],
        config: FitConfig,
        seed: int,
        place: Place,
    ) -> None:
        self._family, self._config, self._seed = family, config, seed
        self._weights = stream_weights(config.codebook_weights, family).to(place.device)
        self._train = DatasetBatches(family, train, config.optimizer, seed, place)
        # The leading process validates alone, on whole batches, however many processes there are.
        alone = Place(0, 1, place.device)
        self._dev = DatasetBatches(family, dev, config.optimizer, seed, alone) if dev else None

    def batches(self, position: int) -> Sequence[CodeBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._train.batches(position)

    def objective(self, step: int, batch: CodeBatch) -> Objective:
        """Return cross entropy, alignment and the model's own losses of a micro-batch."""
        alignment = self._alignment_weight(step)
        scores = self._family.score(
            batch.samples,
            batch.codes,
            batch.lengths,
            unconditional=self._unconditional(batch),
            alignment=alignment > 0,
        )
        terms = self._code_terms(scores.logits, batch, batch.element_weights * self._weights)
        total = terms["ce"]
        for name, loss in scores.losses.items():
            # Auxiliary losses are means over a micro-batch; its weight makes them sums like ce.
            terms[name] = loss * batch.weight
            total = total + terms[name] * (alignment if name == "alignment" else 1.0)
        terms |= {name: metric * batch.weight for name, metric in scores.metrics.items()}
        return Objective(total, terms)

    def _code_terms(
        self, logits: Tensor, batch: CodeBatch, element_weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the sums of cross entropy, weighted, and of right guesses, unweighted."""
        chosen = batch.element_weights > 0
        student = mask_forbidden(logits[chosen].float(), self._family.forbidden)
        codes, weights = batch.codes[chosen], element_weights[chosen]
        hits = student.detach().argmax(-1) == codes
        return {"ce": (cross_entropy(student, codes) * weights).sum(), "accuracy": hits.sum()}

    def _alignment_weight(self, step: int) -> float:
        last = self._config.alignment_steps
        return self._config.alignment_weight if last is None or step < last else 0.0

    def _unconditional(self, batch: CodeBatch) -> Tensor:
        share = self._config.condition_dropout
        draws = [
            keyed_generator(self._seed, "condition", sample["sample_id"], epoch).random() < share
            for sample, epoch in zip(batch.samples, batch.epochs, strict=True)
        ]
        return torch.tensor(draws, device=batch.codes.device)

    def validate(self) -> Mapping[str, float]:
        """Return cross entropy and accuracy on the dev split, with conditions and without noise."""
        if self._dev is None:
            return {}
        sums: dict[str, float] = {"ce": 0.0, "accuracy": 0.0}
        weight = 0.0
        self._family.module.eval()
        # Not inference_mode: weights that were shared out are gathered here, and learn later.
        with torch.no_grad():
            for index in range(self._config.dev_batches):
                for batch in self._dev.batches(index * self._config.optimizer.batch_size):
                    scores = self._family.score(batch.samples, batch.codes, batch.lengths)
                    terms = self._code_terms(scores.logits, batch, batch.element_weights)
                    for name, term in terms.items():
                        sums[name] += float(term)
                    weight += batch.weight
        self._family.module.train()
        return {f"dev_{name}": value / max(weight, 1e-9) for name, value in sums.items()}
