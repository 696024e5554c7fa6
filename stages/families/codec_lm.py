"""The family `codec_lm`: a language model over the codes of a neural or classical audio codec.

Of the shape of NVIDIA's MagpieTTS (text encoder, causal decoder with cross-attention, parallel
codebook heads, optional local transformer and experts), written in plain torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.config import DatasetFacts
from stages.errors import Refused, UserError
from stages.families.codec_lm_checkpoint import (
    inherited_tensors,
    read_checkpoint,
    write_checkpoint,
)
from stages.families.codec_lm_network import (
    CodecLMNetwork,
    Conditions,
    Prediction,
    architecture_of,
)
from stages.families.weights import Undrawn, digest_tensors, no_adapters
from stages.family import LinearOutput, Predicted, Sample, Scores, Step
from stages.layout import FrameStacking
from stages.model_config import CodecLMConfig, FamilyName
from stages.modules.feed_forward import Routing
from stages.modules.guided import Draw, Drawn, decode, scores, split_branches
from stages.sample_checks import require_frames, require_text, speaker_place
from stages.sampling import RolloutPolicy
from store.schema import Head, Sampler, Stream


class CodecLM:
    """A text-to-speech model that predicts all codebooks of a timestep in parallel.

    `module` is the bare model; `network` is what `score` calls, and training may replace it by a
    compiled or data-parallel form of `module`.
    """

    name: FamilyName = "codec_lm"
    predicted: Predicted | None = None
    full_precision: tuple[str, ...] = ("head", "*.router")
    blocks: tuple[str, ...] = ("text_encoder.*", "context_encoder.*", "decoder.*")

    def __init__(
        self,
        network: CodecLMNetwork,
        config: CodecLMConfig,
        facts: DatasetFacts,
        condition_dropout: float = 0.0,
    ) -> None:
        self.module = network
        self.network: nn.Module = network
        self.config = config
        self.facts = facts
        self.condition_dropout = condition_dropout
        self.layout = FrameStacking(
            codebooks=facts.codebooks,
            frames_per_step=config.frames_per_step,
            end_id=facts.codes_per_codebook + 1,
        )
        self.forbidden: tuple[int, ...] = (facts.codes_per_codebook,)
        self.end_id: int | None = facts.codes_per_codebook + 1
        self.timestep_s = config.frames_per_step / facts.frame_rate_hz
        context = ("context_codes",) if facts.context_frames > 0 else ()
        self.conditions: tuple[str, ...] = ("text", "speaker", *context)
        groups = ("backbone", "local") if config.local_transformer else ("backbone",)
        self.streams = tuple(
            Stream(name=f"{group}.{i}", group=group, vocabulary=network.vocabulary)
            for group in groups
            for i in range(self.layout.streams)
        )
        widths = {group: w.shape[-1] for group, w in network.head_weights().items()}
        vectors = {"backbone": 1, "local": self.layout.streams}
        self.heads = tuple(
            Head(group=group, vectors=vectors[group], width=widths[group]) for group in groups
        )
        self._characters = {character: i for i, character in enumerate(facts.alphabet)}
        self._speakers = {name: i for i, name in enumerate(facts.speakers)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.null_text.device

    @classmethod
    def build(
        cls, config: CodecLMConfig, facts: Mapping[str, Any], *, seed: int, device: str = "cpu"
    ) -> Self:
        """Build a model on the CPU with fresh fp32 weights that belong to `seed`."""
        known = DatasetFacts.model_validate(facts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = CodecLMNetwork(config, known)
            network.initialize()
        return cls(network, config, known)

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote, in evaluation mode; raises UserError naming file and tensor."""
        checkpoint = read_checkpoint(path)
        with torch.device("meta"), Undrawn():
            network = CodecLMNetwork(checkpoint.config, checkpoint.facts)
        tensors = checkpoint.tensors(network, device=device, dtype=dtype)
        network.load_state_dict(tensors, strict=True, assign=True)
        family = cls(network, checkpoint.config, checkpoint.facts, checkpoint.condition_dropout)
        family.module.eval()
        return family

    @classmethod
    def pretrained(
        cls, config: Any, facts: DatasetFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Refuse: a codec_lm is fitted here, or loaded from a folder that `fit` wrote."""
        raise UserError(
            f"family {cls.name!r} has no checkpoints of other programs ({config}): give "
            "teacher.model and fit, or teacher.checkpoint"
        )

    def save(self, path: Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        # Beside what the fingerprint covers: it follows from it, and older folders lack it.
        counted = {"architecture": self.architecture().model_dump(mode="json")}
        write_checkpoint(path, self._description() | counted, self.module.state_dict())

    def _description(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "facts": self.facts.model_dump(mode="json"),
            "condition_dropout": self.condition_dropout,
        }

    def inherit(self, path: Path, layers: Sequence[int] | None, *, merged: bool = False) -> None:
        """Copy the weights of the checkpoint folder `path`, whose decoder may be deeper.

        `layers` names the decoder layers to keep, in order; None spreads them evenly, the first and
        the last among them. Raises UserError if any tensor or fact does not fit, and for `merged`.
        """
        if merged:
            raise no_adapters(self.name)
        tensors = inherited_tensors(path, layers, self.module, self.facts)
        self.module.load_state_dict(tensors, strict=True)

    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Start from what the audio codec's codes mean: `vectors` [codebooks, codes, D] float32.

        Embeddings and output rows of near codes become near, which spares the first epochs. What
        is drawn belongs to the weights at hand. Raises UserError if the codes are not the model's.
        """
        seed = int(self.fingerprint()[:15], 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module.adopt_codebooks(vectors.float().cpu())

    def architecture(self) -> Architecture:
        """How large the model is and what decoding a timestep costs."""
        return architecture_of(self.module)

    def fingerprint(self) -> str:
        """Sha256 over configuration, facts and weights (in the order of their names)."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        digest_tensors(digest, self.module.state_dict())
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Sha256 over alphabet and speakers, which turn text and speaker into ids."""
        facts = [self.facts.alphabet, list(self.facts.speakers)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def timesteps(self, sample: Sample) -> int:
        """Timesteps of the sample's own recording, end block included."""
        return self.layout.timesteps(len(sample["codes"]) // self.facts.codebooks)

    def reference_codes(self, sample: Sample) -> Tensor:
        """The recording's own codes [T, C] int64; both groups of streams hold the same.

        Raises Refused for codes that are no frames of the audio codec.
        """
        require_frames(sample, "codes", self.facts)
        codes = self._stack(sample["codes"])
        return codes.repeat(1, len(self.streams) // self.layout.streams)

    def frames(self, codes: Tensor) -> Tensor:
        """The audio codec's frames [F, codebooks] int64 of `codes` [T, C]."""
        return self.layout.decode(codes[:, : self.layout.streams])

    def _stack(self, codes: Any) -> Tensor:
        flat = torch.as_tensor(codes, dtype=torch.int64)
        return self.layout.encode(flat.reshape(-1, self.facts.codebooks))

    def _text_ids(self, sample: Sample) -> Tensor:
        require_text(sample)
        text = sample["text"]
        unknown = sorted(set(text) - self._characters.keys())
        if unknown:
            raise Refused(
                sample["sample_id"],
                "text outside the alphabet",
                f"{''.join(unknown)!r} of it are not among the model's characters "
                f"{self.facts.alphabet!r}; remove them from the text, or prepare a dataset with "
                "them and fit a teacher on it",
            )
        limit = self.config.max_characters
        if len(text) > limit:
            raise Refused(
                sample["sample_id"],
                "text too long",
                f"it has {len(text)} characters, but the model takes {limit} (max_characters); "
                "split the text or raise the limit",
            )
        return torch.tensor([self._characters[character] for character in text])

    def _speaker_id(self, sample: Sample) -> int:
        return speaker_place(sample, self._speakers, "use one of them")

    def _conditions(
        self, samples: Sequence[Sample], unconditional: Tensor | None = None
    ) -> Conditions:
        """Turn the conditions of samples into padded tensors on the model's device."""
        texts = [self._text_ids(sample) for sample in samples]
        speakers = [self._speaker_id(sample) for sample in samples]
        if unconditional is None:
            unconditional = torch.zeros(len(samples), dtype=torch.bool)
        contexts, lengths = self._contexts(samples)
        return Conditions(
            text=nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.device),
            text_lengths=torch.tensor([len(text) for text in texts]).to(self.device),
            speaker=torch.tensor(speakers).to(self.device),
            unconditional=unconditional.to(self.device),
            context=contexts,
            context_lengths=lengths,
        )

    def _contexts(self, samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None]:
        if not self.module.has_context:
            return None, None
        contexts = [self._stack(sample["context_codes"]) for sample in samples]
        self._check_timesteps(max(len(context) for context in contexts), "the longest context")
        padded = nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(context) for context in contexts])
        return padded.to(self.device), lengths.to(self.device)

    def check(self, sampler: Sampler) -> None:
        """Refuse rollouts that may become longer than the model takes; raises UserError."""
        self._check_timesteps(sampler.max_timesteps, "sampler.max_timesteps: a rollout")

    def check_sample(self, sample: Sample, timesteps: int) -> None:
        """Refuse codes, texts, speakers and lengths that the model does not take."""
        lengths = {"a rollout": timesteps}
        require_frames(sample, "codes", self.facts)
        self._text_ids(sample)
        self._speaker_id(sample)
        if self.module.has_context:
            require_frames(sample, "context_codes", self.facts)
            frames = len(sample["context_codes"]) // self.facts.codebooks
            lengths["its context"] = self.layout.timesteps(frames)
        limit = self.config.max_timesteps
        for what, length in lengths.items():
            if length > limit:
                raise Refused(
                    sample["sample_id"],
                    "too long for the model",
                    f"{what} has {length} timesteps, but the model takes {limit} (max_timesteps); "
                    "leave it out or raise the limit",
                )

    def _check_timesteps(self, timesteps: int, what: str) -> None:
        limit = self.config.max_timesteps
        if timesteps > limit:
            raise UserError(
                f"{what} has {timesteps} timesteps, but the model takes {limit} at most "
                "(max_timesteps of the model); shorten it or raise the limit"
            )

    def head_weights(self) -> dict[str, np.ndarray]:
        """`GROUP.weight` [S, V, D] and `GROUP.bias` [S, V] float32; the biases are all 0."""
        arrays = {}
        for group, weight in self.module.head_weights().items():
            arrays[f"{group}.weight"] = weight.detach().float().cpu().contiguous().numpy()
            arrays[f"{group}.bias"] = np.zeros(weight.shape[:2], np.float32)
        return arrays

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

        Each timestep computes only its own position; conditional and unconditional branch are one
        batch (at scale 1 the conditional one alone, unless both are asked for), and rows that end
        leave it. The order of `Step.rows` changes as rows end.
        """
        self._check_timesteps(policy.sampler.max_timesteps, "sampler.max_timesteps: a rollout")
        self.module.eval()
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        state = self.module.start(self._conditions(samples).branches(branches))
        shape = (len(samples), self.layout.streams)
        yield from decode(
            torch.full(shape, self.module.begin_id, device=self.device),
            state,
            policy,
            cfg_scale,
            branches,
            timesteps=policy.sampler.max_timesteps,
            step=self.module.step,
            draw=self._draw_codes,
            end=policy.end,
        )

    def _draw_codes(self, hidden: Tensor, draw: Draw) -> Drawn:
        """Draw the codes of one timestep after the decoder's output [b × branches, E]."""
        network, local = self.module, self.module.local
        parts, states = [network.predict_parallel(hidden)], {"backbone": [hidden.unsqueeze(1)]}
        guided = [draw.guided(parts[0])]
        streams = self.layout.streams
        if local is None:
            branches = split_branches(parts, states, draw.branches)
            return Drawn(draw.codes(guided[0], slice(0, streams)), guided[0], branches)
        state, caches = local.start(hidden)
        codes: list[Tensor] = []
        states["local"] = [state.unsqueeze(1)]
        for stream in range(streams):
            if stream > 0:
                embedded = network.embed_stream(codes[-1][:, 0], stream - 1)
                embedded = embedded.repeat_interleave(draw.branches, 0)
                state = local.step(embedded, stream, caches)
                states["local"].append(state.unsqueeze(1))
            parts.append(local.predict_stream(state, stream).unsqueeze(1))
            guided.append(draw.guided(parts[-1]))
            place = slice(streams + stream, streams + stream + 1)
            codes.append(draw.codes(guided[-1], place))
        branches = split_branches(parts, states, draw.branches)
        return Drawn(torch.cat(codes, 1).repeat(1, 2), torch.cat(guided, 1), branches)

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
        """Predict every timestep of `codes` [B, T, C] in one parallel pass.

        `lengths` [B]; what lies beyond is never read. Where both branches are computed they are
        one doubled batch. `losses` holds `experts`, already weighted, where the model has them,
        and with `alignment` the raw diagonal attention loss under that name; `metrics` how the
        experts are used. Without `local` the local transformer is left alone.
        """
        self._check_timesteps(codes.shape[1], "the longest sequence of the batch")
        conditions = self._conditions(samples, unconditional)
        codes = codes[..., : self.layout.streams].to(self.device, torch.int64)
        lengths = lengths.to(self.device)
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        prediction: Prediction = self.network(
            codes.repeat_interleave(branches, 0),
            lengths.repeat_interleave(branches, 0),
            conditions.branches(branches),
            alignment,
            local,
        )
        weights = self.module.head_weights()
        heads = tuple(LinearOutput(x, weights[group]) for group, x in prediction.hidden.items())
        found = scores(
            heads, prediction.hidden, cfg_scale=cfg_scale, branches=branches, linear=linear
        )
        losses, metrics = {}, {}
        if prediction.routing is not None:
            losses["experts"] = prediction.routing.loss
            metrics = _usage(prediction.routing)
        if prediction.alignment is not None:
            losses["alignment"] = prediction.alignment
        return replace(found, losses=losses, metrics=metrics)

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the local transformer."""
        if self.module.local is not None:
            yield from self.module.local.parameters()


def _usage(routing: Routing) -> dict[str, Tensor]:
    return {
        "expert_usage_min": routing.least,
        "expert_usage_max": routing.most,
        "router_entropy": routing.entropy,
    }
