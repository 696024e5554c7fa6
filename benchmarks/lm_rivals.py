"""What foretell's language models are measured against: transformers' generation, and two models.

`TwoModels` is the common guide to distilling a speech model: teacher and student are both in
memory, and both compute the logits of all ids in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from stages.optimization import Objective

HARD_SHARE, TEMPERATURE = 0.3, 2.0
"""The guide's α and T."""
IGNORED = -100
"""Label of what is not audio, as transformers has it."""


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Tensor], negative: Sequence[Tensor], scale: float, tokens: int
) -> Tensor:
    """Ids [B, tokens] that transformers generates, greedily, under its own guidance.

    `prompts` and `negative` [P] each; they are padded on the left.
    """
    ids, mask = _padded_left(prompts)
    negative_ids, negative_mask = _padded_left(negative)
    generated: Tensor = model.generate(
        ids, attention_mask=mask, guidance_scale=scale, negative_prompt_ids=negative_ids,
        negative_prompt_attention_mask=negative_mask, do_sample=False, max_new_tokens=tokens,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return generated[:, ids.shape[1] :]


def _padded_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ids = pad_sequence(list(rows), batch_first=True, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


@dataclass(frozen=True)
class Labelled:
    """Prompts with the audio that follows them, padded on the right."""

    ids: Tensor
    """[B, L] int64."""
    mask: Tensor
    """[B, L] int64: 1 for what is no padding, as transformers' collators give it."""
    labels: Tensor
    """[B, L] int64: the ids of audio, `IGNORED` elsewhere."""

    @classmethod
    def of(cls, prompts: Sequence[Tensor], audio: Sequence[Tensor]) -> Labelled:
        """Join the prompts [P] and the audio [A] of each row."""
        pairs = list(zip(prompts, audio, strict=True))
        rows = [torch.cat(pair) for pair in pairs]
        labels = [torch.cat([torch.full_like(prompt, IGNORED), row]) for prompt, row in pairs]
        return cls(
            pad_sequence(rows, batch_first=True),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )

    @property
    def audio(self) -> Tensor:
        """[B, L - 1] bool: where the next id is audio."""
        return self.labels[:, 1:] != IGNORED

    def logits(self, model: Any) -> Tensor:
        """Logits [n, V] of all ids at the n positions that predict audio."""
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        audio: Tensor = logits[:, :-1][self.audio]
        return audio


@dataclass(frozen=True)
class LabelledBatch:
    """The same audio after the prompts of both branches."""

    cond: Labelled
    uncond: Labelled

    @property
    def weight(self) -> float:
        """How many ids are predicted."""
        return float(self.cond.audio.sum())


class TwoModels:
    """α·CE + (1 − α)·T²·KL on the positions of audio, over all ids, the teacher at hand.

    With `scale` the teacher's predictions are guided, by a second pass; the guide does without.
    """

    def __init__(
        self, student: Any, teacher: Any, batch: LabelledBatch, scale: float | None = None
    ) -> None:
        self._student, self._teacher = student, teacher
        self._batch, self._scale = batch, scale

    def batches(self, position: int) -> Sequence[LabelledBatch]:
        """Return the one batch."""
        return [self._batch]

    def objective(self, step: int, batch: LabelledBatch) -> Objective:
        """Return the loss summed over what is predicted."""
        with torch.no_grad():
            teacher = batch.cond.logits(self._teacher)
            if self._scale is not None:
                other = batch.uncond.logits(self._teacher)
                teacher = other + self._scale * (teacher - other)
        student, codes = batch.cond.logits(self._student), batch.cond.labels[:, 1:]
        hard = functional.cross_entropy(student, codes[batch.cond.audio], reduction="sum")
        soft = functional.kl_div(
            functional.log_softmax(student / TEMPERATURE, -1),
            functional.softmax(teacher / TEMPERATURE, -1),
            reduction="sum",
        )
        total = HARD_SHARE * hard + (1 - HARD_SHARE) * TEMPERATURE**2 * soft
        return Objective(total, {"hard": hard, "soft": soft})
