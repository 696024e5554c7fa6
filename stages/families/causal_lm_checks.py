"""What does not fit a language model: a layout, a dataset, a sample that is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stages.causal_lm_config import CausalLMSettings
from stages.config import DatasetFacts
from stages.errors import Refused, UserError
from stages.families.hugging_face import PreTrainedModel
from stages.family import Sample
from stages.slot_layout import SlotLayout

Pair = tuple[Tensor, Tensor]
"""Ids of the prompts with and without the conditions."""


@dataclass(frozen=True)
class Context:
    """How much of a sample a model can see."""

    slots: int
    """Ids of a timestep."""
    positions: int
    """Ids of the longest sequence (`max_position_embeddings`)."""

    def check(self, sample: Sample, pair: Pair, timesteps: int) -> None:
        """Refuse a sample after whose prompts not so many timesteps fit; raises `Refused`."""
        prompt = max(map(len, pair))
        length = prompt + timesteps * self.slots
        if length > self.positions:
            raise Refused(
                sample["sample_id"],
                "too long for the model",
                f"a prompt of {prompt} ids and {timesteps} timesteps of {self.slots} ids are "
                f"{length}, but the model takes {self.positions} (max_position_embeddings); split "
                "the text, or lower sampler.max_timesteps",
            )

    def check_batch(
        self, samples: Sequence[Sample], pairs: Sequence[Pair], most: int, lengths: Tensor
    ) -> None:
        """Refuse a sample of `lengths` [B] timesteps, of which none is more than `most`.

        The device is asked for lengths only where a batch may not fit.
        """
        longest = max(len(prompt) for pair in pairs for prompt in pair)
        if longest + most * self.slots > self.positions:
            for sample, pair, length in zip(samples, pairs, lengths.tolist(), strict=True):
                self.check(sample, pair, length)


def check_vocabulary(
    model: PreTrainedModel, settings: CausalLMSettings, layout: SlotLayout, folder: Path
) -> None:
    """Refuse a model that has fewer ids than layout or prompts; one may be padded to more."""
    ids = model.get_output_embeddings().weight.shape[0]
    beyond = {name: token.id for name, token in settings.special.items() if token.id >= ids}
    if beyond:
        raise UserError(
            f"{folder} has the ids 0 to {ids - 1}, but special gives {beyond}: give the ids of "
            "this model's tokenizer"
        )
    if ids < layout.least_vocabulary:
        raise UserError(
            f"{folder} has {ids} ids, but the layout reaches to {layout.least_vocabulary - 1}: "
            "correct audio_base_id, codes_per_slot or end_id, or resize the model's vocabulary"
        )


def check_codes(layout: SlotLayout, facts: DatasetFacts) -> None:
    """Refuse a dataset whose frames are not those of the layout."""
    entries = layout.config.codes_per_slot
    if facts.codebooks != layout.slots or facts.codes_per_codebook > entries:
        raise UserError(
            f"the dataset's frames have {facts.codebooks} codes of {facts.codes_per_codebook} "
            f"entries, but the layout has {layout.slots} slots of {entries}: give the layout of "
            "the dataset's audio codec, or prepare the dataset with the model's"
        )
    if facts.slots and facts.slots != layout.config.slots:
        raise UserError(
            f"the dataset's frames list the codes (level, place) {_listed(facts.slots)}, but the "
            f"layout has {_listed(layout.config.slots)}: give the order of the dataset's audio "
            "codec in layout.slots"
        )


def _listed(slots: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"({level}, {place})" for level, place in slots)
