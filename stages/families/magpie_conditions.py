"""The conditions of MagpieTTS: texts, context clips and speakers, from samples to tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stages.config import DatasetFacts
from stages.errors import Refused, UserError
from stages.families.magpie_network import Conditions, MagpieNetwork
from stages.families.magpie_tokenizers import described_tokenizers
from stages.families.nemo_archive import quiet
from stages.family import Sample
from stages.layout import FrameStacking
from stages.model_config import MagpieSettings
from stages.sample_checks import require_frames, require_text, speaker_place


class ConditionReader:
    """Turns the conditions of samples into what a model reads, and refuses what it cannot."""

    def __init__(
        self,
        network: MagpieNetwork,
        settings: MagpieSettings,
        facts: DatasetFacts,
        layout: FrameStacking,
    ) -> None:
        """Raises UserError when the dataset lacks what the model reads."""
        model = network.model
        self._network, self._layout, self._facts = network, layout, facts
        self._baked: int = model.num_baked_speakers
        self._tokenizer = _tokenizer(settings, list(model.tokenizer.tokenizer_names))
        for tokenizer in model.tokenizer.tokenizers.values():
            g2p: Any = getattr(tokenizer, "g2p", None)
            if getattr(g2p, "phoneme_probability", None) is not None:
                # NeMo's training draws anew which words it spells out; no two passes would agree.
                g2p.phoneme_probability = 1.0
        self._speakers = {name: i for i, name in enumerate(settings.speakers)}
        self._require(settings, facts)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of samples.parquet that the model reads."""
        return ("text", "speaker") if self._baked else ("text", "context_codes")

    def _require(self, settings: MagpieSettings, facts: DatasetFacts) -> None:
        """Refuse a dataset that lacks what the model reads; raises UserError."""
        speakers = settings.speakers
        if self._baked != len(speakers):
            raise UserError(
                f"the model has {self._baked} baked contexts, but the setting speakers names "
                f"{len(speakers)} ({', '.join(speakers) or 'none'}): name the dataset's speaker of "
                "each, in their order"
            )
        if not self._baked and facts.context_frames == 0:
            raise UserError(
                "the model reads a context clip of the speaker, but the dataset was prepared "
                "without: set prepare.context_s (5.0 for the published models) and prepare again"
            )

    def fingerprint(self) -> str:
        """Sha256 over all tokenizers, the one in use, and the baked speakers.

        Of a tokenizer count its tokens, its settings, and how it pronounces words; of files only
        what they say, not where they are.
        """
        tokenizer = self._network.model.tokenizer
        tokens = [str(token) for token in tokenizer.tokens]
        sounds = [_pronunciations(tokenizer.tokenizers[n]) for n in tokenizer.tokenizer_names]
        settings = described_tokenizers(self._network.model.cfg)
        known = [tokens, settings, sounds, self._tokenizer, list(self._speakers)]
        text = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, samples: Sequence[Sample], unconditional: Tensor | None = None) -> Conditions:
        """Turn the conditions of samples into padded tensors on the model's device."""
        texts = [self._text_ids(sample) for sample in samples]
        dropped = torch.zeros(len(samples), dtype=torch.bool)
        contexts, lengths, speakers = None, None, None
        if self._baked:
            speakers = torch.tensor([self._speaker(sample) for sample in samples])
        else:
            rows = [self._context(sample) for sample in samples]
            contexts = pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
        return Conditions(
            text=pad_sequence(texts, batch_first=True),
            text_lengths=torch.tensor([len(text) for text in texts]),
            unconditional=dropped if unconditional is None else unconditional,
            context=contexts,
            context_lengths=lengths,
            speakers=speakers,
        ).to(self._network.model.final_proj.weight.device)

    def _text_ids(self, sample: Sample) -> Tensor:
        """Token ids of a text, with NeMo's end token."""
        require_text(sample)
        model = self._network.model
        with quiet():
            ids = model.tokenizer.encode(sample["text"], self._tokenizer)
        if not ids:
            raise Refused(
                sample["sample_id"],
                "text outside the alphabet",
                f"the tokenizer {self._tokenizer!r} knows nothing of the text {sample['text']!r}; "
                "remove the sample, or choose another tokenizer",
            )
        limit = self._network.positions.text
        if len(ids) + 1 > limit:
            raise Refused(
                sample["sample_id"],
                "text too long",
                f"the text has {len(ids)} tokens, but the model's text encoder takes {limit - 1} "
                "(encoder.max_length_causal_mask): split the text",
            )
        return torch.tensor([*ids, model.eos_id])

    def _context(self, sample: Sample) -> Tensor:
        """Codes of the context clip between its special ids, stacked: [P, S] int64."""
        model, layout = self._network.model, self._layout
        codes = torch.as_tensor(sample["context_codes"], dtype=torch.int64)
        frames = codes.reshape(-1, layout.codebooks)
        begin = torch.full_like(frames[:1], model.context_audio_bos_id, dtype=torch.int64)
        if not len(frames):
            begin = torch.full((1, layout.codebooks), model.context_audio_bos_id)
        end = torch.full_like(begin, model.context_audio_eos_id)
        whole = torch.cat([begin, frames, end])
        # NeMo fills the last block with the code 0.
        missing = -len(whole) % layout.frames_per_step
        return nn.functional.pad(whole, (0, 0, 0, missing)).reshape(-1, layout.streams)

    def _speaker(self, sample: Sample) -> int:
        advice = "leave it out, or name its baked context in the setting speakers"
        return speaker_place(sample, self._speakers, advice)

    def check(self, sample: Sample, timesteps: int) -> None:
        """Refuse conditions that the model does not read, or has no positions for with `timesteps`.

        Raises Refused.
        """
        self._text_ids(sample)
        if self._baked:
            lengths = self._network.model.baked_context_embedding_len
            context = int(lengths[self._speaker(sample)])
        else:
            require_frames(sample, "context_codes", self._facts)
            context = len(self._context(sample))
        self._check_positions(sample, context, timesteps)

    def check_batch(
        self, samples: Sequence[Sample], conditions: Conditions, timesteps: Tensor, most: int
    ) -> None:
        """Refuse a batch with a sample that the model has no positions for; raises Refused.

        `timesteps` [B] are at most `most`. Only where the widest rows would not fit together is the
        device asked for the length of each.
        """
        limits, model = self._network.positions, self._network.model
        known = conditions.context
        if known is None:
            widest = model.baked_context_embedding.embedding_dim // model.cfg.decoder.d_model
        else:
            widest = known.shape[1]
        if widest + most <= limits.decoder and (known is None or widest <= limits.context):
            return
        contexts = self._network.context_positions(conditions).tolist()
        for sample, context, count in zip(samples, contexts, timesteps.tolist(), strict=True):
            self._check_positions(sample, context, count)

    def _check_positions(self, sample: Sample, context: int, timesteps: int) -> None:
        limits = self._network.positions
        if not self._baked and context > limits.context:
            raise Refused(
                sample["sample_id"],
                "context too long",
                f"a context of {context} positions exceeds the {limits.context} positions of the "
                "context encoder (context_encoder.max_length_causal_mask): lower prepare.context_s",
            )
        if context + timesteps > limits.decoder:
            raise Refused(
                sample["sample_id"],
                "too long for the model",
                f"a context of {context} positions and {timesteps} timesteps exceed the "
                f"{limits.decoder} positions of the model (decoder.max_length_causal_mask): lower "
                "prepare.context_s or sampler.max_timesteps",
            )


def _tokenizer(settings: MagpieSettings, names: Sequence[str]) -> str:
    """Name of the tokenizer that reads the texts; raises UserError where there is none such."""
    if settings.tokenizer is None:
        return names[0]
    if settings.tokenizer not in names:
        raise UserError(
            f"tokenizer={settings.tokenizer!r} is none of the model's, {', '.join(names)}: name one"
        )
    return settings.tokenizer


def _pronunciations(tokenizer: Any) -> list[Any]:
    """What a tokenizer looks words up in, read from files or not; nothing where it only spells."""
    g2p = getattr(tokenizer, "g2p", None)
    words = getattr(g2p, "phoneme_dict", None) or {}
    return [
        {str(word): sounds for word, sounds in words.items()},
        sorted(map(str, getattr(g2p, "heteronyms", None) or ())),
    ]
