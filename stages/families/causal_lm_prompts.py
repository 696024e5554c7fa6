"""What a language model reads before it speaks: a prompt with the conditions, or without them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from stages.causal_lm_config import FIELD, MARK, CausalLMSettings
from stages.errors import Refused, UserError
from stages.families.hugging_face import AutoTokenizer, PreTrainedTokenizerFast, reading
from stages.family import Sample
from stages.sample_checks import require_text


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model folder; no code of the folder's is run.

    Raises UserError when there is none that `tokenizers` reads.
    """
    fault = f"no tokenizer can be read from {folder}"
    with reading(folder, fault, "give the folder of a model with its tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, which keeps no "
            "tokenizer.json: save it again as a fast one"
        )
    return tokenizer


class PromptReader:
    """Turns samples into the ids that stand before their audio."""

    def __init__(
        self, settings: CausalLMSettings, tokenizer: PreTrainedTokenizerFast, folder: Path
    ) -> None:
        self.tokenizer = tokenizer
        self._settings, self._folder = settings, folder
        prompts = settings.prompt + settings.unconditional_prompt
        self.columns = tuple(dict.fromkeys(FIELD.findall(prompts)))
        """Columns of a sample that the prompts read."""
        self._check_special()

    def conditional(self, sample: Sample) -> Tensor:
        """Ids [P] int64 of the prompt that says what is to be said; raises Refused."""
        require_text(sample)
        return self._ids(self._settings.prompt, sample)

    def unconditional(self, sample: Sample) -> Tensor:
        """Ids [P] int64 of the prompt of the branch without conditions."""
        return self._ids(self._settings.unconditional_prompt, sample)

    def pair(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The prompts with the conditions and without them; raises Refused."""
        return self.conditional(sample), self.unconditional(sample)

    def fingerprint(self) -> str:
        """Sha256 over tokenizer, prompts and ids: whatever turns conditions into ids."""
        settings = self._settings.model_dump(
            mode="json", include={"layout", "special", "prompt", "negative_prompt", "vocabulary"}
        )
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    def _ids(self, prompt: str, sample: Sample) -> Tensor:
        """Ids of a prompt, in which texts and the names of special tokens take turns."""
        ids: list[int] = []
        for place, part in enumerate(MARK.split(prompt)):
            if place % 2:
                ids.append(self._settings.special[part].id)
            elif part:
                ids += self._text_ids(FIELD.sub(lambda name: _cell(sample, name[1]), part), sample)
        return torch.tensor(ids)

    def _text_ids(self, text: str, sample: Sample) -> list[int]:
        """Ids of a text, in which nothing is a special token, whatever it looks like."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        audio = self._settings.layout.audio_ids
        reserved = {token.id for token in self._settings.special.values()}
        strange = [i for i in ids if i in audio or i in reserved]
        if strange:
            raise Refused(
                sample["sample_id"],
                "text read as other ids",
                f"the tokenizer reads {text!r} as ids {strange} of audio or of special tokens: "
                "correct the text, or layout and special",
            )
        return ids

    def _check_special(self) -> None:
        """Refuse a tokenizer that writes a special token otherwise than the settings say."""
        for name, token in self._settings.special.items():
            if token.token is None:
                continue
            found = self.tokenizer.convert_tokens_to_ids(token.token)
            if found != token.id:
                raise UserError(
                    f"the tokenizer in {self._folder} has {token.token!r} at id {found}, but "
                    f"special.{name} says {token.id}: give the ids of this model's tokenizer"
                )


def _cell(sample: Sample, column: str) -> str:
    """What a prompt says of a column; raises Refused where there is nothing."""
    value: str | None = sample[column]
    if value is None:
        raise Refused(sample["sample_id"], f"no {column}", "its cell is empty; leave it out")
    return value
