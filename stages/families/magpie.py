"""The family `magpie`: NVIDIA's MagpieTTS, from NeMo's checkpoints and back to them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families import magpie_checkpoint as checkpoint
from stages.families.magpie_architecture import architecture_of
from stages.families.magpie_checkpoint import MODEL_FILE, AudioCodecFacts
from stages.families.magpie_conditions import ConditionReader
from stages.families.magpie_network import MagpieNetwork, Prediction
from stages.families.magpie_settings import overridden, read_model_config
from stages.families.nemo_archive import archive_fingerprint, quiet
from stages.families.weights import digest_tensors, no_adapters
from stages.family import LinearOutput, Predicted, Sample, Scores, Step
from stages.layout import FrameStacking
from stages.model_config import FamilyName, MagpieConfig, MagpieSettings, MagpieTeacher
from stages.modules.guided import Draw, Drawn, decode, scores, split_branches
from stages.publish import replace_file
from stages.sample_checks import require_frames
from stages.sampling import RolloutPolicy
from store.schema import Head, Sampler, Stream

with quiet():
    from nemo.collections.tts.modules.magpietts_modules import LocalTransformerType

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"

NEMO_KEYS = (
    "encoder", "decoder", "context_encoder", "frame_stacking_factor", "local_transformer_type",
    "local_transformer_n_heads",
)  # fmt: skip
"""Settings of NeMo's that say how weights are computed with, beside their shapes."""

TRAINING_KEYS = ("p_dropout", "p_dropout_out", "router_jitter_noise")
"""Settings of a part that play no role in evaluation mode, where a model tells its targets."""

SPECIAL_IDS = (
    "audio_bos_id", "audio_eos_id", "context_audio_bos_id", "context_audio_eos_id", "mask_token_id",
    "bos_id", "eos_id",
)  # fmt: skip
"""Ids that NeMo places among those of codes and texts, or where a configuration forces them."""

UNUSED = ("alignment_encoder.", "_codec_model.")
"""Parts that neither decode nor learn here."""


class Magpie:
    """A MagpieTTS model with what foretell knows of it.

    `module` is the bare network; `network` is what `score` calls, and training may replace it by a
    compiled or data-parallel form of `module`.
    """

    name: FamilyName = "magpie"
    predicted: Predicted | None = None
    full_precision: tuple[str, ...] = (
        "model.final_proj",
        "model.local_transformer_out_projections.*",
        "*.router",
    )
    blocks: tuple[str, ...] = ()  # layers are read by `magpie_layers`, and never called

    def __init__(
        self, network: MagpieNetwork, settings: MagpieSettings, facts: DatasetFacts
    ) -> None:
        self.module = network
        self.network: nn.Module = network
        self.config = settings
        self.facts = facts
        model = network.model
        self.condition_dropout = float(model.cfg.get("cfg_unconditional_prob", 0.0))
        self.layout = FrameStacking(
            codebooks=model.num_audio_codebooks,
            frames_per_step=model.frame_stacking_factor,
            end_id=model.audio_eos_id,
        )
        self.end_id: int | None = model.audio_eos_id
        special = range(model.codebook_size, network.vocabulary)
        self.forbidden = tuple(i for i in special if i != model.audio_eos_id)
        self.timestep_s = model.frame_stacking_factor / facts.frame_rate_hz
        self._reader = ConditionReader(network, settings, facts, self.layout)
        self.conditions = self._reader.columns
        groups = ("backbone", "local") if network.local else ("backbone",)
        self.streams = tuple(
            Stream(name=f"{group}.{i}", group=group, vocabulary=network.vocabulary)
            for group in groups
            for i in range(network.streams)
        )
        vectors = {"backbone": 1, "local": network.streams}
        self.heads = tuple(
            Head(group=group, vectors=vectors[group], width=weight.shape[-1])
            for group, (weight, _) in network.head_weights().items()
        )
        streams = network.streams
        halves: list[slice] = [slice(0, streams), slice(streams, None)]
        self._leading, self._led = halves[::-1] if settings.history == "local" else halves
        """The streams whose draws are the history, and end it, and those that follow it."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.module.model.final_proj.weight.device
        return device

    @classmethod
    def build(
        cls, config: MagpieConfig, facts: Mapping[str, Any], *, seed: int, device: str = "cpu"
    ) -> Self:
        """Build a model on the CPU with fresh fp32 weights that belong to `seed`.

        Contexts that are baked for `config.speakers` are those of its .nemo. Raises UserError when
        NeMo's configuration cannot be read or is not supported.
        """
        known = DatasetFacts.model_validate(facts)
        nemo = overridden(read_model_config(config.nemo), config)
        archive = config.nemo if config.nemo.suffix == ".nemo" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = checkpoint.build(nemo, AudioCodecFacts.of(known), archive)
        if config.speakers:
            checkpoint.bake(model, config.nemo)
        return cls(_network(model, config), config, known)

    @classmethod
    def pretrained(
        cls, config: MagpieTeacher, facts: DatasetFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Load a checkpoint of NeMo's, in evaluation mode.

        Raises UserError when it cannot be read, is not supported, or speaks the codes of another
        audio codec than the dataset's.
        """
        model = checkpoint.load_teacher(config, AudioCodecFacts.of(facts))
        _check_audio_codec(config, model.cfg, facts)
        family = cls(_network(model, config), config, facts)
        family.module.to(device, dtype).eval().requires_grad_(False)
        return family

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote, in evaluation mode; raises UserError naming the file."""
        file = path / CONFIG_FILE
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            settings = MagpieConfig.model_validate(description["config"])
            facts = DatasetFacts.model_validate(description["facts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not the configuration of a magpie checkpoint: {error}; give a folder "
                "that `train` wrote"
            ) from error
        archive = path / MODEL_FILE
        model = checkpoint.build(read_model_config(archive), AudioCodecFacts.of(facts), archive)
        checkpoint.load_weights(model, checkpoint.read_checkpoint(archive), archive)
        family = cls(_network(model, settings), settings, facts)
        family.module.to(device, dtype).eval()
        return family

    def save(self, path: Path) -> None:
        """Write config.json, and model.nemo for stock NeMo, into the folder `path`.

        Each file appears whole, the weights last: where they are, the checkpoint is finished.
        """
        text = json.dumps(self._description(), indent=2, sort_keys=True) + "\n"
        replace_file(path / CONFIG_FILE, text.encode())
        checkpoint.save(self.module.model, path / MODEL_FILE)

    def _description(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "facts": self.facts.model_dump(mode="json"),
            "architecture": self.architecture().model_dump(mode="json"),
        }

    def inherit(self, path: Path, layers: Sequence[int] | None, *, merged: bool = False) -> None:
        """Copy the weights of a .nemo, a .ckpt or a student's folder, without building its model.

        `layers` names the decoder layers to keep, in order; None spreads them evenly. Raises
        UserError if any tensor does not fit, and for `merged`.
        """
        if merged:
            raise no_adapters(self.name)
        checkpoint.inherit(self.module.model, path, layers)

    def architecture(self) -> Architecture:
        """How large the model is and what decoding a timestep costs."""
        return architecture_of(self.module)

    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Keep the embeddings of codes as NeMo draws them, whatever the codes mean."""

    def fingerprint(self) -> str:
        """Sha256 over what predictions depend on: settings, special ids and weights by name."""
        model = self.module.model
        known = {
            "settings": self.config.model_dump(
                mode="json", include=set(MagpieSettings.model_fields)
            ),
            "facts": self.facts.model_dump(mode="json"),
            "nemo": _computing(model.cfg),
            "ids": {name: getattr(model, name) for name in SPECIAL_IDS},
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        weights = checkpoint.state_of(model)
        digest_tensors(digest, {n: x for n, x in weights.items() if not n.endswith("causal_mask")})
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Sha256 over whatever turns conditions into ids."""
        return self._reader.fingerprint()

    # Layout

    def timesteps(self, sample: Sample) -> int:
        """Timesteps of the sample's own recording, end block included."""
        return self.layout.timesteps(len(sample["codes"]) // self.facts.codebooks)

    def reference_codes(self, sample: Sample) -> Tensor:
        """[T, C] int64: the recording's codes, laid out once for each group of streams.

        Raises Refused for codes that are no frames of the audio codec.
        """
        require_frames(sample, "codes", self.facts)
        codes = torch.as_tensor(sample["codes"], dtype=torch.int64)
        stacked = self.layout.encode(codes.reshape(-1, self.facts.codebooks))
        return stacked.repeat(1, len(self.streams) // self.layout.streams)

    def frames(self, codes: Tensor) -> Tensor:
        """The audio codec's frames [F, codebooks] int64 of `codes` [T, C]: the decoder's own."""
        return self.layout.decode(codes[:, : self.layout.streams])

    def check(self, sampler: Sampler) -> None:
        """Take all settings: how long a rollout may be depends on the sample's context."""

    def check_sample(self, sample: Sample, timesteps: int) -> None:
        """Refuse codes that are no frames, and conditions that the model does not take."""
        require_frames(sample, "codes", self.facts)
        self._reader.check(sample, timesteps)

    # The two verbs

    def head_weights(self) -> dict[str, np.ndarray]:
        """`GROUP.weight` [S, V, D] and `GROUP.bias` [S, V], float32."""
        arrays = {}
        for group, (weight, bias) in self.module.head_weights().items():
            arrays[f"{group}.weight"] = weight.detach().float().cpu().contiguous().numpy()
            arrays[f"{group}.bias"] = bias.detach().float().cpu().contiguous().numpy()
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

        As in NeMo's distillation the history continues with the decoder's own draws, which alone
        decide when a rollout ends; what the local transformer draws from them is a target. With
        the setting `history: local` its draws are the history, as in NeMo's inference.
        """
        self.module.eval()
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        conditions = self._reader.read(samples)
        limits = torch.tensor(policy.limits)
        self._reader.check_batch(samples, conditions, limits, max(policy.limits))
        encoded = self.module.encode(conditions, branches)
        state = self.module.start(encoded, max(policy.limits))
        del encoded
        heads = self.module.head_weights()  # once: they may be a copy in another type
        shape = (len(samples), self.layout.streams)

        def end(rows: Tensor, timestep: int, codes: Tensor, logits: Tensor) -> Tensor:
            others = logits[:, self._led] if self.module.local else None
            leading = codes[:, : self.layout.streams], logits[:, self._leading]
            return policy.end(rows, timestep, *leading, others)

        yield from decode(
            torch.full(shape, self.module.begin_id, device=self.device),
            state,
            policy,
            cfg_scale,
            branches,
            timesteps=max(policy.limits),
            step=self.module.step,
            draw=partial(self._draw_codes, heads),
            end=end,
        )

    def _draw_codes(
        self, heads: Mapping[str, tuple[Tensor, Tensor]], hidden: Tensor, draw: Draw
    ) -> Drawn:
        """Draw the codes of one timestep after the decoder's output [b × branches, E]."""
        network, streams = self.module, self.layout.streams
        parts, states = [_logits(hidden, *heads["backbone"])], {"backbone": [hidden.unsqueeze(1)]}
        guided = [draw.guided(parts[0])]
        codes = [draw.codes(guided[0], slice(0, streams))]
        if network.local:
            states["local"] = []
            decoding = network.local_states(hidden)
            state = next(decoding)
            for stream in range(streams):
                states["local"].append(state.unsqueeze(1))
                weight, bias = (x[stream : stream + 1] for x in heads["local"])
                parts.append(_logits(state, weight, bias))
                guided.append(draw.guided(parts[-1]))
                codes.append(draw.codes(guided[-1], slice(streams + stream, streams + stream + 1)))
                if stream + 1 < streams:
                    state = decoding.send(codes[-1][:, 0].repeat_interleave(draw.branches, 0))
        if self.config.history == "local":
            codes = [*codes[1:], *codes[1:]]
        branches = split_branches(parts, states, draw.branches)
        return Drawn(torch.cat(codes, 1), torch.cat(guided, 1), branches)

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

        `lengths` [B]; what lies beyond is never read. `losses` holds `experts`, already weighted,
        where the model has them; there is no alignment loss. With `linear` the heads are left to
        who reads the scores; without `local` the local transformer is left alone.
        """
        del alignment
        conditions = self._reader.read(samples, unconditional)
        self._reader.check_batch(samples, conditions, lengths, codes.shape[1])
        branches = 2 if both_branches or cfg_scale != 1.0 else 1
        prediction: Prediction = self.network(
            codes.to(self.device, torch.int64), lengths.to(self.device), conditions, branches, local
        )
        weights = self.module.head_weights()
        heads = tuple(LinearOutput(x, *weights[group]) for group, x in prediction.hidden.items())
        found = scores(
            heads, prediction.hidden, cfg_scale=cfg_scale, branches=branches, linear=linear
        )
        return replace(found, losses=prediction.losses, metrics=prediction.metrics)

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the local transformer, its projections and heads, where it is trained."""
        if self.module.local:
            for name, parameter in self.module.model.named_parameters():
                if name.startswith("local_transformer"):
                    yield parameter


def _logits(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits [n, c, V] of states [n, D] in the type of their head."""
    flat = nn.functional.linear(states.to(weight.dtype), weight.flatten(0, 1), bias.flatten())
    return flat.view(-1, *bias.shape)


def _network(model: Any, settings: MagpieSettings) -> MagpieNetwork:
    """Wrap NeMo's model; what takes no part gets no gradient.

    Raises UserError for a local transformer that does not decode one codebook after the other.
    """
    kind = model.local_transformer_type
    if settings.local_streams and kind == LocalTransformerType.MASKGIT:
        raise UserError(
            f"the model's local transformer is of type {kind.value!r}, but only 'autoregressive' "
            "can be distilled: set local_streams: false"
        )
    network = MagpieNetwork(model, local=settings.local_streams)
    if settings.history == "local" and not network.local:
        raise UserError(
            "history is 'local', but the model has no local transformer: set history: backbone"
        )
    unused = list(UNUSED)
    if model.has_baked_context_embedding:
        unused += ["context_encoder.", "baked_context_embedding."]
    if not network.local:
        unused.append("local_transformer")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(unused)))
    return network


def _computing(config: DictConfig) -> dict[str, Any]:
    """Settings of NeMo's that predictions depend on."""
    nemo: dict[str, Any] = OmegaConf.to_container(config, resolve=True)
    known = {key: nemo.get(key) for key in NEMO_KEYS}
    for part in ("encoder", "decoder", "context_encoder"):
        known[part] = {key: x for key, x in nemo[part].items() if key not in TRAINING_KEYS}
    return known


def _check_audio_codec(config: MagpieTeacher, nemo: DictConfig, facts: DatasetFacts) -> None:
    """Compare the teacher's audio codec with the dataset's, where its file is there."""
    named = Path(str(nemo.get("codecmodel_path") or ""))
    path = config.audio_codec or named
    if config.audio_codec is None and not named.is_file():
        logger.warning(
            "the teacher's audio codec (%s) is not on this machine, so whether the dataset was "
            "encoded with it is not checked: name its .nemo in teacher.pretrained.audio_codec",
            named,
        )
        return
    found = archive_fingerprint(path)
    if found != facts.audio_codec:
        raise UserError(
            f"the teacher's audio codec {path} has fingerprint {found}, but the dataset was "
            f"encoded with {facts.audio_codec}: prepare the dataset with the teacher's audio codec"
        )
