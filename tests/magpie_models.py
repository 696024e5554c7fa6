"""Tiny MagpieTTS models for tests, what the family makes of them, and NeMo's own answers.

What NeMo says is computed by its stock model: restored with its audio codec, uncached, teacher
forced, and for one sample at a time unless the contexts are equally long. Importing this module
does not import NeMo.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.family import load_family
from stages.model_config import MagpieConfig, MagpieTeacher
from stages.sampling import RolloutPolicy
from store.schema import Sampler

CODEBOOKS, CODES, VOCABULARY = 4, 64, 72
EOS = CODES + 1
TOKENIZER = "english_chars"
LIMIT = 11
"""Most timesteps of a rollout here."""
REFERENCES = (7, 4, 10, 5, 14, 8)
"""Timesteps of the recording of each sample, as far as policies know."""

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": 4},
    "stacked by 2": {"frame_stacking": 2},
    "experts, stacked by 2": {"experts": 3, "frame_stacking": 2},
    "stacked by 4": {"frame_stacking": 4},
    "no local transformer": {"local_transformer": False},
}


def nemo(module: str) -> Any:
    """Import a module that needs NeMo, such as `families.magpie_tiny` of stages."""
    return importlib.import_module(f"stages.{module}")


def quiet() -> Any:
    return nemo("families.nemo_archive").quiet()


class Models:
    """Archives of tiny models in one folder; each is built once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = nemo("families.magpie_tiny")
        with quiet():
            self.codec = self.tiny.build_codec(folder / "codec.nemo")
        self.audio_codec: str = nemo("families.nemo_archive").archive_fingerprint(self.codec)
        self._archives: dict[str, Path] = {}
        self._stock: dict[Path, Any] = {}

    def archive(
        self,
        *,
        baked: Tensor | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        edit: Callable[[Any], None] | None = None,
        **shape: Any,
    ) -> Path:
        """Path of the .nemo of a model of this shape.

        `settings` are dotted keys of NeMo's configuration to change; `edit` changes the model
        before it is saved.
        """
        speakers = None if baked is None else tuple(baked.shape)
        name = edit.__name__ if edit else None
        key = repr((sorted(shape.items()), speakers, seed, settings, name))
        if key not in self._archives:
            path = self.folder / f"model{len(self._archives)}.nemo"
            with quiet():
                if settings is None and edit is None:
                    self.tiny.build_model(path, self.codec, baked=baked, seed=seed, **shape)
                else:
                    model = self.model(settings or {}, seed=seed, **shape)
                    if baked is not None:
                        self.tiny.bake(model, baked)
                    if edit is not None:
                        edit(model)
                    model.save_to(str(path))
            self._archives[key] = path
        return self._archives[key]

    @torch.no_grad()
    def model(self, settings: dict[str, Any], *, seed: int = 0, **shape: Any) -> Any:
        """NeMo's model of random weights, with dotted keys of its configuration changed."""
        from nemo.collections.tts.models import MagpieTTSModel
        from omegaconf import OmegaConf

        config = OmegaConf.create(self.config(**shape))
        for key, value in settings.items():
            OmegaConf.update(config, key, value, force_add=True)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = MagpieTTSModel(config)
            self.tiny.sharpen(model)
        return model

    def config(self, **shape: Any) -> dict[str, Any]:
        """NeMo's configuration of a model of this shape."""
        config: dict[str, Any] = self.tiny.model_config(self.codec, **shape)
        return config

    def facts(self, **changes: Any) -> Any:
        from stages.config import DatasetFacts

        known = {
            "alphabet": " abcdefgh",
            "speakers": ("low", "high"),
            "codebooks": CODEBOOKS,
            "codes_per_codebook": CODES,
            "frame_rate_hz": 21.533,
            "audio_codec": self.audio_codec,
            "context_frames": 20,
        }
        return DatasetFacts.model_validate(known | changes)

    def teacher(self, path: Path, **settings: Any) -> Any:
        """The family with a checkpoint of NeMo's."""
        record = MagpieTeacher.model_validate({"family": "magpie", "path": path} | settings)
        return load_family("magpie").pretrained(
            record, self.facts(), device="cpu", dtype=torch.float32
        )

    def student(self, path: Path, *, seed: int = 0, like: Path | None = None, **settings: Any):
        """The family with a model to train; `like` is a checkpoint of the same shape to copy."""
        config = MagpieConfig.model_validate({"family": "magpie", "nemo": path} | settings)
        family = load_family("magpie").build(config, self.facts().model_dump(), seed=seed)
        if like is not None:
            family.inherit(like, None)
        return family

    def stock(self, path: Path) -> Any:
        """NeMo's own model with its audio codec, in evaluation mode; one object per file."""
        if path not in self._stock:
            self._stock[path] = restored(path)
        return self._stock[path].eval()


def restored(path: Path) -> Any:
    """What stock NeMo makes of an archive, in evaluation mode."""
    from nemo.collections.tts.models import MagpieTTSModel

    with quiet():
        return MagpieTTSModel.restore_from(str(path), map_location="cpu").eval()


def samples_of(count: int, *, equal: bool = False, speakers: bool = False) -> list[dict[str, Any]]:
    """Samples whose texts, recordings and, unless `equal`, contexts all differ in length.

    With `speakers` their contexts are baked: speaker 0, 1, 2, 0, ... of the model.
    """
    random = np.random.default_rng(count)
    samples = []
    for i in range(count):
        sample: dict[str, Any] = {
            "sample_id": f"s{i}",
            "text": "".join(random.choice(list(" abcdefgh"), size=4 + 3 * (i * 2 % count))),
            "codes": random.integers(0, CODES, size=CODEBOOKS * (4 + i)).astype(np.uint16),
        }
        if speakers:
            sample["speaker"] = f"speaker {i % 3}"
        else:
            frames = 9 if equal else 3 + 5 * (i * 3 % count)
            codes = random.integers(0, CODES, size=CODEBOOKS * frames)
            sample["context_codes"] = codes.astype(np.uint16)
        samples.append(sample)
    return samples


def random_codes(family: Any, lengths: Sequence[int], seed: int = 0) -> Tensor:
    """Codes [B, T, C] of all streams, with numbers beyond the lengths that cannot be looked up."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), len(family.streams))
    codes = torch.randint(0, CODES, shape, generator=generator)
    return poisoned(codes, torch.tensor(lengths))


def poisoned(codes: Tensor, lengths: Tensor) -> Tensor:
    """Codes with 10**6 beyond the lengths, where nothing may be read."""
    beyond = torch.arange(codes.shape[1]) >= lengths[:, None]
    return codes.masked_fill(beyond.unsqueeze(-1), 10**6)


# Rollouts


def policy_of(family: Any, samples: list[dict], kind: type = RolloutPolicy, **changes: Any) -> Any:
    """A policy that ends every row at a timestep of its own, if the row does not end before."""
    sampler = {"max_timesteps": LIMIT, "min_timesteps": 2, "temperature": 0.7, "top_k": 40}
    sampler["reference_multiple"] = 1.0
    return kind(
        Sampler.model_validate(sampler | changes),
        [(sample["sample_id"], 0) for sample in samples],
        seed=7,
        streams=family.streams,
        forbidden=family.forbidden,
        end_id=family.end_id,
        reference_timesteps=[REFERENCES[int(s["sample_id"][1:])] for s in samples],
    )


@dataclass
class Rolled:
    """The steps of a rollout, put together per row."""

    codes: Tensor
    logits: Tensor
    lengths: Tensor
    policy: Any
    batch_sizes: list[int] = field(default_factory=list)

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Codes [T, C] and logits [T, C, V] of one rollout."""
        length = int(self.lengths[row])
        return self.codes[row, :length], self.logits[row, :length]


def roll(
    family: Any, samples: list[dict], scale: float, policy: Any = None, **changes: Any
) -> Rolled:
    policy = policy or policy_of(family, samples, **changes)
    rows, streams = len(samples), len(family.streams)
    steps = policy.sampler.max_timesteps
    rolled = Rolled(
        torch.zeros(rows, steps, streams, dtype=torch.int64),
        torch.full((rows, steps, streams, VOCABULARY), float("nan")),
        torch.zeros(rows, dtype=torch.int64),
        policy,
    )
    for step in family.rollout(samples, policy, scale):
        assert step.logits.dtype == torch.float32
        assert (rolled.lengths[step.rows] == step.timestep).all(), "a row left and came back"
        rolled.codes[step.rows, step.timestep] = step.codes
        rolled.logits[step.rows, step.timestep] = step.logits
        rolled.lengths[step.rows] = step.timestep + 1
        rolled.batch_sizes.append(len(step.rows))
    return rolled


# NeMo's own answers


@dataclass(frozen=True)
class Answer:
    """What NeMo's decoder says of given codes, of one branch."""

    backbone: Tensor
    """[B, T, S, V]."""
    local: Tensor | None
    """[B, T, S, V]: the local transformer's, fed the codes of its own streams."""
    routing: list[dict[str, Tensor]]
    """Per layer, what its router decided at every position of context and timesteps."""
    counted: Tensor
    """[B, P + T] bool: which positions are there."""

    def logits(self) -> Tensor:
        """[B, T, C, V] in the order of the family's streams."""
        return self.backbone if self.local is None else torch.cat([self.backbone, self.local], 2)


def batch_of(stock: Any, samples: Sequence[dict]) -> dict[str, Tensor]:
    """A batch as NeMo's dataset makes it."""
    texts = [[*stock.tokenizer.encode(s["text"], TOKENIZER), stock.eos_id] for s in samples]
    batch = {"text": padded(texts), "text_lens": torch.tensor([len(text) for text in texts])}
    if "speaker" in samples[0]:
        numbers = [int(sample["speaker"].removeprefix("speaker ")) for sample in samples]
        return batch | {"speaker_indices": torch.tensor(numbers)}
    contexts = [
        torch.from_numpy(s["context_codes"].astype(np.int64)).view(-1, CODEBOOKS) for s in samples
    ]
    lengths = torch.tensor([len(context) for context in contexts])
    codes = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    return batch | {"context_audio_codes": codes.mT, "context_audio_codes_lens": lengths}


def padded(rows: list[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def frames_of(codes: Tensor) -> Tensor:
    """NeMo's codes [B, codebooks, frames] of stacked codes [B, T, S]."""
    return codes.reshape(codes.shape[0], -1, CODEBOOKS).mT


def answer(
    stock: Any,
    samples: Sequence[dict],
    codes: Tensor,
    lengths: Tensor | None = None,
    *,
    unconditional: bool = False,
) -> Answer:
    """Run NeMo's decoder and local transformer on codes [B, T, C]: uncached, teacher forced."""
    batch = batch_of(stock, samples)
    if lengths is None:
        lengths = torch.full((len(samples),), codes.shape[1])
    steps = int(lengths.max())
    codes = codes[:, :steps]
    codes = codes.masked_fill((torch.arange(steps) >= lengths[:, None]).unsqueeze(-1), 0)
    stacking = stock.frame_stacking_factor
    streams = CODEBOOKS * stacking
    begin = torch.full((len(samples), CODEBOOKS, stacking), stock.audio_bos_id)
    history = torch.cat([begin, frames_of(codes[..., :streams])[..., :-stacking]], -1)
    with quiet():
        tensors = stock.prepare_context_tensors(batch)
        embedded, _ = stock.embed_audio_tokens(history, lengths * stacking)
        cond, cond_mask = tensors.cond, tensors.cond_mask
        context, context_mask = tensors.additional_decoder_input, tensors.additional_decoder_mask
        if unconditional:
            cond, cond_mask, context, context_mask, _ = stock.prepare_dummy_cond_for_cfg(
                cond, cond_mask, context, context_mask
            )
        valid = torch.arange(steps) < lengths[:, None]
        counted = torch.cat([context_mask.bool(), valid], 1)
        logits, _, states, routing = stock.forward(
            dec_input_embedded=torch.cat([context, embedded], 1),
            dec_input_mask=counted,
            cond=cond,
            cond_mask=cond_mask,
            attn_prior=None,
            multi_encoder_mapping=tensors.multi_encoder_mapping,
        )
        local, size = None, context.shape[1]
        if codes.shape[-1] > streams:
            local = stock._lt_helper.compute_logits(
                states[:, size:].detach(),
                frames_of(codes[..., streams:]),
                targets_offset_by_one=False,
            ).view(len(samples), steps, streams, -1)
    backbone = logits[:, size:].view(len(samples), steps, streams, -1)
    return Answer(backbone, local, routing or [], counted)


def nemo_student(stock: Any, samples: Sequence[dict], codes: Tensor, lengths: Tensor) -> Any:
    """What NeMo's distillation computes of its student for given codes [B, T, C]."""
    from nemo.collections.tts.models.magpietts_cfg_distillation import _process_batch_student

    stacking = stock.frame_stacking_factor
    streams = CODEBOOKS * stacking
    codes = codes.masked_fill((torch.arange(codes.shape[1]) >= lengths[:, None]).unsqueeze(-1), 0)
    frames = frames_of(codes[..., :streams])
    batch: dict[str, Any] = batch_of(stock, samples)
    batch["audio_codes"] = F.pad(frames, (stacking, 0), value=stock.audio_bos_id)
    batch["audio_codes_lens"] = (lengths + 1) * stacking
    local = codes.shape[-1] > streams
    if local:
        batch["audio_codes_lt"] = frames_of(codes[..., streams:])
    with quiet():
        return _process_batch_student(stock, batch, use_lt=local)


@torch.no_grad()
def guided(
    stock: Any, samples: Sequence[dict], codes: Tensor, scale: float, lengths: Tensor | None = None
) -> Tensor:
    """NeMo's guided logits [B, T, C, V] of codes [B, T, C]."""
    cond = answer(stock, samples, codes, lengths).logits()
    if scale == 1.0:
        return cond
    uncond = answer(stock, samples, codes, lengths, unconditional=True).logits()
    return (1 - scale) * uncond + scale * cond


@contextmanager
def training(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into training mode, without dropout, and back into evaluation mode."""
    rates = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, torch.nn.Dropout):
            rates[module] = module.p
            module.p = 0.0
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()
        for module, rate in rates.items():
            module.p = rate
