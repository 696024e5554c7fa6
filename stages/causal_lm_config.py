"""Settings of the family `causal_lm`: slots and prompts of a language model that speaks codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.ranges import Positive, Share
from store.schema import Record

TokenId = Annotated[int, Field(ge=0)]

BaseQuantization = Literal["bf16", "int8", "int4"]

MARK = re.compile(r"<(\w+)>")
"""A special token in a prompt, by its name."""
FIELD = re.compile(r"\{(text|speaker)\}")
"""A condition in a prompt."""


class SlotLayoutConfig(Record):
    """How a language model's flat stream of tokens holds the levels of an audio codec.

    A frame is what one code of the slowest level spans. It is a fixed row of slots, and each slot
    has ids of its own: slot s those from `audio_base_id` + s · `codes_per_slot` on.
    """

    slots: Annotated[tuple[tuple[TokenId, TokenId], ...], Field(min_length=1)]
    """Per slot (level, place): which of the level's codes of the frame stands there, from 0."""
    codes_per_slot: Positive
    """Ids of a slot; an audio codec may have fewer entries than that."""
    audio_base_id: TokenId
    """Id of the first code of the first slot."""
    end_id: TokenId
    """Id that ends the audio, in any slot."""

    @property
    def audio_ids(self) -> range:
        """Ids of all codes of all slots."""
        first = self.audio_base_id
        return range(first, first + len(self.slots) * self.codes_per_slot)

    @model_validator(mode="after")
    def _check(self) -> Self:
        places: dict[int, list[int]] = {}
        for level, place in self.slots:
            places.setdefault(level, []).append(place)
        whole = all(sorted(of_level) == [*range(len(of_level))] for of_level in places.values())
        if sorted(places) != [*range(len(places))] or not whole:
            raise ValueError(
                f"slots={[list(slot) for slot in self.slots]} must hold every place of every level "
                "once, counted from 0: [0, 0], [1, 0], [1, 1] for levels of one and two codes"
            )
        if self.end_id in self.audio_ids:
            raise ValueError(
                f"end_id={self.end_id} lies among the audio's, {self.audio_ids.start} to "
                f"{self.audio_ids.stop - 1}: correct it, or audio_base_id and codes_per_slot"
            )
        return self


class SpecialToken(Record):
    """A token that sets off text and speech."""

    id: TokenId
    """Its id."""
    token: str | None = None
    """How the tokenizer writes it; where given, another token with this id is an error."""


class LoraConfig(Record):
    """Low-rank adapters on a frozen base model (Hu et al., 2106.09685)."""

    rank: Positive = 16
    """Rank of the matrices that are added."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the product, over the rank."""
    dropout: Share = 0.0
    """Dropout share of what the adapters read, in training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Last names of the linear layers that have one."""


class CausalLMSettings(Record):
    """What foretell must know of a language model that speaks codes."""

    family: Literal["causal_lm"]
    path: Path
    """Folder of the model as transformers has it: configuration, tokenizer, safetensors."""
    layout: SlotLayoutConfig
    """Which ids are audio, and what they stand for."""
    special: dict[str, SpecialToken] = Field(default_factory=dict)
    """Special tokens by the names that the prompts call them."""
    prompt: str
    """What stands before the audio: special tokens as <name>, {text} and {speaker}."""
    negative_prompt: str | None = None
    """What stands there without the conditions; null keeps the special tokens of `prompt` alone."""
    vocabulary: Literal["slots", "full"] = "slots"
    """Which ids are predicted: those that a slot can have, or for comparison all of the model."""

    @property
    def unconditional_prompt(self) -> str:
        """The prompt of the branch without conditions."""
        if self.negative_prompt is not None:
            return self.negative_prompt
        return "".join(mark[0] for mark in MARK.finditer(self.prompt))

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        within = {n: t.id for n, t in self.special.items() if t.id in self.layout.audio_ids}
        if within:
            audio = self.layout.audio_ids
            raise ValueError(
                f"special ids {within} lie among the audio's, {audio.start} to {audio.stop - 1}: "
                "correct them, or audio_base_id and codes_per_slot"
            )
        for prompt in (self.prompt, self.unconditional_prompt):
            unknown = [name for name in MARK.findall(prompt) if name not in self.special]
            if unknown:
                raise ValueError(
                    f"the prompt {prompt!r} names the special tokens {unknown}, but special has "
                    f"{sorted(self.special)}: add them there"
                )
            strange = re.findall(r"\S*[<>{}]\S*", FIELD.sub(" ", MARK.sub(" ", prompt)))
            if strange:
                raise ValueError(
                    f"the prompt {prompt!r} holds {strange[0]!r}, which would be read as text: "
                    "write {text} and {speaker}, and a special token as <name>, with its spelling "
                    "in special.name.token"
                )
        if "{text}" not in self.prompt:
            raise ValueError(f"the prompt {self.prompt!r} must hold {{text}}, what is to be said")
        if "{text}" in self.unconditional_prompt:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} holds {{text}}, but it is what stands "
                "there without the text: leave that out"
            )
        if not MARK.search(self.unconditional_prompt):
            raise ValueError(
                f"the prompt without conditions, {self.unconditional_prompt!r}, needs a special "
                "token, after which the audio begins"
            )
        return self


class CausalLMConfig(CausalLMSettings):
    """A language model to train, whole or by adapters: the family `causal_lm`."""

    weights: Literal["load", "fresh"] = "load"
    """Whether the folder's weights are loaded, or drawn for its configuration."""
    lora: LoraConfig | None = None
    """Adapters to train on the frozen model; null trains all of its weights."""
    quantization: BaseQuantization | None = None
    """How the frozen model is kept while adapters are trained, the rest of it in bf16; null keeps
    all of it in fp32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights == "fresh" and self.lora is not None:
            raise ValueError(
                "weights='fresh' with lora would freeze random weights: leave one of them out"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization={self.quantization!r} is of a frozen model: give lora, or leave it "
                "out to train all weights"
            )
        return self


class CausalLMTeacher(CausalLMSettings):
    """A language model that was trained elsewhere."""

    adapter: Path | None = None
    """Folder of a peft adapter that was trained on it; null where there is none."""

    @property
    def weights(self) -> Path:
        """What a student that begins as its teacher reads."""
        return self.adapter or self.path
