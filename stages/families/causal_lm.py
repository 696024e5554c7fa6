"""The family `causal_lm`: decoder-only language models that speak audio codes, such as Orpheus.

A timestep is one codec frame, whose slots are its streams. Within it the model decodes one token
after the other; what it is taught at a slot are the ids that the slot can have, and the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.architecture import Architecture
from stages.causal_lm_config import CausalLMConfig, CausalLMSettings, CausalLMTeacher
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families import causal_lm_adapter as adapter
from stages.families import causal_lm_checkpoint as checkpoint
from stages.families.causal_lm_base import (
    OWN_BASE,
    Base,
    Saved,
    adapted,
    frozen,
    inherited,
    merged,
    require_architecture,
    whole_model,
)
from stages.families.causal_lm_checks import Context, check_codes, check_vocabulary
from stages.families.causal_lm_network import CausalLMNetwork, Decoding, architecture_of, joined
from stages.families.causal_lm_prompts import PromptReader, load_tokenizer
from stages.families.hugging_face import PreTrainedModel
from stages.families.weights import digest_tensors
from stages.family import LinearOutput, Predicted, Sample, Scores, Step
from stages.model_config import FamilyName
from stages.modules.guided import Draw, Drawn, decode, scores, split_branches
from stages.sample_checks import require_frames
from stages.sampling import RolloutPolicy
from stages.slot_layout import SlotLayout, up_to_end
from store.schema import Head, Sampler, Stream

GROUP = "backbone"
"""The one group of streams: the slots of a frame."""


class CausalLM:
    """A language model over text and audio ids, with what foretell knows of it.

    `module` is the bare network; `network` is what `score` calls, and training may replace it by a
    compiled or data-parallel form of `module`.
    """

    name: FamilyName = "causal_lm"
    blocks: tuple[str, ...] = ("*.layers.*", "*.h.*")

    def __init__(
        self,
        model: PreTrainedModel,
        reader: PromptReader,
        settings: CausalLMSettings,
        facts: DatasetFacts,
        condition_dropout: float = 0.0,
        base: Base | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.layout = SlotLayout(settings.layout)
        check_vocabulary(model, settings, self.layout, settings.path)
        check_codes(self.layout, facts)
        full = settings.vocabulary == "full"
        self.module = CausalLMNetwork(model, self.layout, full=full)
        self.network: nn.Module = self.module
        self.config = settings
        self.facts = facts
        self._context = Context(self.layout.slots, int(model.config.max_position_embeddings))
        self.condition_dropout = condition_dropout
        self._reader, self._base, self._seed, self._device = reader, base, seed, device
        self._end = self.layout.end_id if full else self.layout.end_code
        self.end_id: int | None = self._end
        self.predicted: Predicted | None = partial(up_to_end, end=self._end)
        unused = range(facts.codes_per_codebook, settings.layout.codes_per_slot)
        self.forbidden = () if full else tuple(unused)
        self.timestep_s = 1.0 / facts.frame_rate_hz
        self.conditions = reader.columns
        self.streams = tuple(
            Stream(name=f"{GROUP}.{slot}", group=GROUP, vocabulary=self.module.vocabulary)
            for slot in range(self.layout.slots)
        )
        head = self.module.head
        named = [name for name, layer in self.module.named_modules() if layer is head]
        self.full_precision = (*named, "*.lora_*")
        width = head.weight.shape[1]
        self.heads: tuple[Head, ...] = (Head(group=GROUP, vectors=self.layout.slots, width=width),)

    @classmethod
    def build(
        cls, config: CausalLMConfig, facts: Mapping[str, Any], *, seed: int, device: str = "cpu"
    ) -> Self:
        """Load the base model, or draw its weights from `seed`, to be trained in fp32.

        With `lora` the model is frozen, quantized onto `device` if wanted, and what is trained are
        fresh adapters, which belong to `seed`. Otherwise it is on the CPU. Raises UserError when
        the folder cannot be read or does not fit the layout or the dataset.
        """
        known = DatasetFacts.model_validate(facts)
        reader = PromptReader(config, load_tokenizer(config.path), config.path)
        if config.weights == "fresh":
            model = checkpoint.fresh_model(config.path, seed=seed)
        else:
            model = checkpoint.load_model(config.path, dtype=torch.float32)
        if config.lora is None:
            return cls(model, reader, config, known)
        model = adapter.attach(frozen(model, config.quantization, device), config.lora, seed=seed)
        base = Base(config.path)
        return cls(model, reader, config, known, base=base, seed=seed, device=device)

    @classmethod
    def pretrained(
        cls, config: CausalLMTeacher, facts: DatasetFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Load a model that was trained elsewhere, in evaluation mode.

        Raises UserError when it cannot be read, or does not fit the layout or the dataset.
        """
        reader = PromptReader(config, load_tokenizer(config.path), config.path)
        model, dropout = checkpoint.load_model(config.path, dtype=dtype), 0.0
        if config.adapter is not None:
            model = merged(model, config.adapter, config.path)
            ours = (config.adapter / checkpoint.CONFIG_FILE).is_file()
            dropout = Saved.read(config.adapter).condition_dropout if ours else 0.0
        family = cls(model, reader, config, facts, dropout)
        family.module.to(device).eval().requires_grad_(False)
        return family

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote, in evaluation mode; raises UserError naming the file.

        The base of adapters is loaded as it is, whatever it was kept in while they were trained.
        """
        saved = Saved.read(path)
        reader = PromptReader(saved.config, load_tokenizer(path), path)
        folder = saved.found_base()
        model = checkpoint.load_model(folder or path, dtype=dtype)
        base = None if folder is None else Base(folder)
        if base is not None:
            model = adapted(model, path, base)
        family = cls(model, reader, saved.config, saved.facts, saved.condition_dropout, base)
        family.module.to(device).eval()
        return family

    def save(self, path: Path) -> None:
        """Write a folder that stock transformers opens, or for adapters stock peft.

        config.json has what foretell adds. Each file appears whole, the weights last: where they
        are, the checkpoint is finished.
        """
        description = self._description() | {
            "architecture": self.architecture().model_dump(mode="json")
        }
        checkpoint.write_tokenizer(path, self._reader)
        if self._base is None:
            checkpoint.write_description(path, description, self.module.model)
            checkpoint.write_weights(path, self.module.model)
            return
        base = self._base.kept_in(path)
        description["base"] = OWN_BASE if self._base.merged else str(base.folder)
        checkpoint.write_description(path, description, None)
        adapter.save_adapter(
            self.module.model, path, base_path=base.folder, base_fingerprint=base.fingerprint
        )

    def _description(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "facts": self.facts.model_dump(mode="json"),
            "condition_dropout": self.condition_dropout,
        }

    def inherit(self, path: Path, layers: Sequence[int] | None, *, merged: bool = False) -> None:
        """Begin as the model in the folder `path`: one that `save` wrote, or a stock one.

        Without adapters all weights are copied, `layers` naming the layers to keep. Adapters begin
        as the best approximation of that model's, on the same base; with `merged` they begin
        fresh, on that model as a whole. Raises UserError if the two do not fit.
        """
        assert isinstance(self.config, CausalLMConfig)  # what is trained was built from it
        lora = self.config.lora
        if lora is None or self._base is None:
            inherited(self.module.model, whole_model(path)[0], path, layers)
            return
        if layers is not None:
            raise UserError(
                f"init.layers={list(layers)} chooses layers whose weights are copied, but a model "
                "with lora has all of its base's: leave one of the two out"
            )
        if merged:
            model, was_adapted = whole_model(path)
            require_architecture(self.module.model, model, path)
            model = frozen(model, self.config.quantization, self._device)
            self.module.model = adapter.attach(model, lora, seed=self._seed)
            self._base = Base(path, merged=was_adapted)
        else:
            base = self._base
            adapter.start_from(
                self.module.model, path, base_path=base.folder, base_fingerprint=base.fingerprint
            )

    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Start fresh weights from what the audio codec's codes mean.

        `vectors` [codebooks, codes, D] float32. Loaded weights know it already and are kept.
        """
        if isinstance(self.config, CausalLMConfig) and self.config.weights == "fresh":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(self.fingerprint()[:15], 16))
                self.module.adopt_codebooks(vectors.float().cpu())

    def architecture(self) -> Architecture:
        """How large the model is and what decoding a timestep costs."""
        return architecture_of(self.module)

    def fingerprint(self) -> str:
        """Sha256 over what predictions depend on: configurations, facts and weights by name."""
        known = {
            "settings": self.config.model_dump(
                mode="json", include=set(CausalLMSettings.model_fields) - {"path"}
            ),
            "facts": self.facts.model_dump(mode="json"),
            "model": checkpoint.computing(self.module.model),
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        trained = self.module.state_dict()
        if self._base is not None:
            digest.update(self._base.fingerprint.encode())
            trained = adapter.factors(self.module.model)
        digest_tensors(digest, trained)
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Sha256 over tokenizer, prompts and the ids of special tokens and audio."""
        return self._reader.fingerprint()

    def check(self, sampler: Sampler) -> None:
        """Refuse ends that a language model does not draw; raises UserError."""
        if sampler.end_on != "any":
            raise UserError(
                f"sampler.end_on={sampler.end_on!r} is for codes drawn in parallel: a language "
                "model ends with the first end of a frame, whatever its slot; set it to 'any'"
            )

    def check_sample(self, sample: Sample, timesteps: int) -> None:
        """Refuse codes that are no frames, and texts and lengths that the model does not take."""
        require_frames(sample, "codes", self.facts)
        self._context.check(sample, self._reader.pair(sample), timesteps)

    def timesteps(self, sample: Sample) -> int:
        """Frames of the sample's own recording, and one for its end."""
        return len(sample["codes"]) // self.layout.slots + 1

    def reference_codes(self, sample: Sample) -> Tensor:
        """The recording's own codes [T, S] int64; the last timestep is nothing but ends.

        Raises Refused for a last frame that is not whole, and for a code that no codebook has.
        """
        require_frames(sample, "codes", self.facts)
        codes = torch.as_tensor(sample["codes"], dtype=torch.int64)
        codes = self.layout.to_timesteps(functional.pad(codes, (0, 1), value=self.layout.end_code))
        return self.layout.to_vocabulary(codes) if self.module.full else codes

    def frames(self, codes: Tensor) -> Tensor:
        """The audio codec's frames [F, S] int64 of `codes` [T, S]: the whole ones before the end.

        Raises UserError for an id of the full vocabulary that its slot does not have.
        """
        own = self.layout.from_vocabulary(codes) if self.module.full else codes
        return self.layout.frames(self.layout.from_timesteps(own))

    def head_weights(self) -> dict[str, np.ndarray]:
        """`backbone.weight` [S, V, D] and `backbone.bias` [S, V] float32."""
        weight, bias = self.module.head_weights()
        if bias is None:
            bias = weight.new_zeros(weight.shape[:2])
        tensors = {f"{GROUP}.weight": weight, f"{GROUP}.bias": bias}
        return {
            name: tensor.detach().float().cpu().contiguous().numpy()
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def rollout(
        self,
        samples: Sequence[Sample],
        policy: RolloutPolicy,
        cfg_scale: float,
        *,
        both_branches: bool = False,
    ) -> Iterator[Step]:
        """Generate under guidance; sets the network to evaluation mode.

        Conditional and unconditional prompts are one batch (at scale 1 the conditional ones alone,
        unless both are asked for), keys and values are kept in memory that is allocated once, and
        rows that end leave it. The order of `Step.rows` changes as rows end.
        """
        self.module.eval()
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        timesteps = max(policy.limits)
        pairs = [self._reader.pair(sample) for sample in samples]
        prompts = [prompt for pair in pairs for prompt in pair[:branches]]
        state = self.module.start(prompts, branches, timesteps * self.layout.slots)
        weight, bias = self._head()
        shape = (len(samples), self.layout.slots)
        yield from decode(
            torch.zeros(shape, dtype=torch.int64, device=self.module.device),
            state,
            policy,
            cfg_scale,
            branches,
            timesteps=timesteps,
            step=self._step,
            draw=partial(self._draw_codes, state=state, head=(weight.mT, bias)),
            end=partial(policy.end, likeliest=False),
        )

    def _step(self, previous: Tensor, state: Decoding) -> Tensor:
        """Read the last token of the timestep `previous` [n, S]; the prompt has been read."""
        if state.tokens:
            state.step(self.module.slot_ids(previous[:, -1], self.layout.slots - 1))
        return state.hidden

    def _draw_codes(
        self, hidden: Tensor, draw: Draw, *, state: Decoding, head: tuple[Tensor, Tensor | None]
    ) -> Drawn:
        """Draw the codes of a frame slot by slot, after the state [n, D] that predicts its first.

        Behind an end stand ends: the rows keep step, and what is predicted there counts nowhere.
        """
        weight, bias = head
        codes: list[Tensor] = []
        parts, states, guided = [], [], []
        ended = torch.zeros_like(draw.rows, dtype=torch.bool)
        for slot in range(self.layout.slots):
            if slot:
                ids = self.module.slot_ids(codes[-1], slot - 1)
                state.step(ids.repeat_interleave(draw.branches))
                hidden = state.hidden
            logits = hidden.to(weight.dtype) @ weight[slot]
            if bias is not None:
                logits = logits + bias[slot]
            states.append(hidden.unsqueeze(1))
            parts.append(logits.unsqueeze(1))
            guided.append(draw.guided(parts[-1]))
            drawn = draw.codes(self._possible(guided[-1], slot), slice(slot, slot + 1))[:, 0]
            drawn = torch.where(ended, self._end, drawn)
            ended = ended | (drawn == self._end)
            codes.append(drawn)
        split = split_branches(parts, {GROUP: states}, draw.branches)
        return Drawn(torch.stack(codes, 1), torch.cat(guided, 1), split)

    def _possible(self, logits: Tensor, slot: int) -> Tensor:
        """Logits [b, 1, V] with -inf at the ids of a full vocabulary that a slot does not have."""
        if not self.module.full:
            return logits
        audio = self.module.columns[slot]
        unused = audio[self.facts.codes_per_codebook : -1]
        possible = torch.full_like(logits, float("-inf"))
        possible[..., audio] = logits[..., audio]
        possible[..., unused] = float("-inf")
        return possible

    def score(
        self,
        samples: Sequence[Sample],
        codes: Tensor,
        lengths: Tensor,
        *,
        cfg_scale: float = 1.0,
        both_branches: bool = False,
        unconditional: Tensor | None = None,
        alignment: bool = False,
        linear: bool = False,
        local: bool = True,
    ) -> Scores:
        """Predict every timestep of `codes` [B, T, S] in one parallel pass.

        `lengths` [B]; what lies beyond is never read. Where both branches are computed they are
        one doubled batch.
        """
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        dropped = [False] * len(samples) if unconditional is None else unconditional.tolist()
        pairs = [self._reader.pair(sample) for sample in samples]
        self._context.check_batch(samples, pairs, codes.shape[1], lengths)
        prompts = [
            prompt
            for (conditional, bare), drop in zip(pairs, dropped, strict=True)
            for prompt in (bare if drop else conditional, bare)[:branches]
        ]
        ids, before = joined(prompts, self._tokens(codes, lengths).repeat_interleave(branches, 0))
        states = self.network(ids, before, codes.shape[1] * self.layout.slots)
        states = states.unflatten(1, (-1, self.layout.slots))
        heads = (LinearOutput(states, *self._head()),)
        return scores(heads, {GROUP: states}, cfg_scale=cfg_scale, branches=branches, linear=linear)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """The slots' heads: as they are to learn, and in fp32 for what is kept or compared.

        Logits of size 20 that are rounded to bf16 are wrong by 0.05 nats before guidance, which
        multiplies that.
        """
        weight, bias = self.module.head_weights()
        if torch.is_grad_enabled():
            return weight, bias
        return weight.float(), None if bias is None else bias.float()

    def _tokens(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Ids [B, T · S] of codes [B, T, S]; any ids of audio beyond a length."""
        codes, lengths = codes.to(self.module.device), lengths.to(self.module.device)
        beyond = torch.arange(codes.shape[1], device=codes.device) >= lengths[:, None]
        return self.module.layout_ids(codes.masked_fill(beyond[..., None], self._end)).flatten(1)

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """Nothing: there is no local transformer beside the model."""
        yield from ()
