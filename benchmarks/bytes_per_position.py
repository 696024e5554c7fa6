"""What a prediction costs on disk under the profile `compact`, and what its rounding loses.

Bytes per (timestep, codebook), of hidden states per timestep, with the chunk's entry in the index
of its file. Two teachers of random weights, guided at 2.5: one like a codec model (V = 2048, eight
codebooks, 3.5 to 4.4 nats), one like a text model (V = 152064, ids in random order, the worst case
for them). Beside each size stands its KL against the teacher in fp64: over the kept ids and the
tail as one bucket, of hidden states over the whole vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from measure import report, seconds

from store.encoding import Array, ArraySpec, ids_dtype
from store.schema import Compact
from store.zarr_codecs import compact_codec

STREAMS = 8
CODEC_VOCABULARY, TEXT_VOCABULARY = 2048, 152_064
CFG_SCALE = 2.5
T1, T2 = (1.0,), (1.0, 2.0)
"""Distillation temperatures that a target lists."""
PUBLISHED = "published formula, not measured"
INDEX_BYTES = 16
"""Offset and length of one chunk in the index of its file."""


@dataclass(frozen=True)
class Teacher:
    """Logits `sharpness * (head @ state) + bias`, the state an AR(1) process under guidance."""

    vocabulary: int
    sharpness: tuple[float, float]
    """Standard deviation of the logits: of the first codebook and of the last."""
    spread: float
    """Standard deviation of the log of a timestep's own sharpness: some are nearly certain."""
    zipf: float
    """Exponent of the Zipf law of the bias."""
    width: int = 64

    def logits(self, timesteps: int) -> Iterator[Array]:
        """One [C, V] float32 for each timestep."""
        random = np.random.default_rng(0)
        states = guided_states(random, timesteps, self.width)
        own = np.exp(self.spread * random.standard_normal(timesteps))
        sharpness = np.linspace(*self.sharpness, STREAMS)[:, None] / np.sqrt(self.width)
        head = random.standard_normal((self.vocabulary, self.width), np.float32)
        zipf = -self.zipf * np.log(np.arange(1, self.vocabulary + 1))
        bias = np.stack([random.permutation(zipf) for _ in range(STREAMS)])
        turns = [np.linalg.qr(random.standard_normal((self.width,) * 2))[0] for _ in range(STREAMS)]
        for state, factor in zip(states, own, strict=True):
            turned = np.stack([turn @ state for turn in turns]) * sharpness
            yield (factor * (turned.astype(np.float32) @ head.T + bias)).astype(np.float32)


def guided_states(random: np.random.Generator, timesteps: int, width: int) -> Array:
    """[T, width] of unit variance, guided: what both branches share and what sets them apart."""
    shared, own = (slow_noise(random, timesteps, width) for _ in range(2))
    mixed = shared + CFG_SCALE * 0.5 * own
    scaled: Array = mixed / mixed.std()
    return scaled


def slow_noise(random: np.random.Generator, timesteps: int, width: int) -> Array:
    """[T, width] of an AR(1) process with coefficient 0.9."""
    steps = random.standard_normal((timesteps, width))
    steps[1:] *= np.sqrt(1 - 0.9**2)
    for timestep in range(1, timesteps):
        steps[timestep] += 0.9 * steps[timestep - 1]
    return steps


CODEC = Teacher(CODEC_VOCABULARY, sharpness=(3.8, 2.3), spread=0.0, zipf=0.5)
TEXT = Teacher(TEXT_VOCABULARY, sharpness=(5.0, 5.0), spread=0.2, zipf=1.1)
PEAKED_TEXT = Teacher(TEXT_VOCABULARY, sharpness=(5.7, 5.7), spread=0.2, zipf=1.5)
"""About 12 different ids among 50 draws, as random sampling KD reports of text."""


@dataclass(frozen=True)
class Stored:
    """An array that went through its codec of the profile `compact`, chunk by chunk."""

    values: Array
    decoded: Array
    bytes: int
    decode_s: float

    @classmethod
    def through(
        cls, name: str, values: Array, repeats: int, temperatures: tuple[float, ...] = (1.0,)
    ) -> Stored:
        """Encode and decode values [N, ...] in chunks of 256 timesteps."""
        spec = ArraySpec(name, values.dtype, values.shape[1:], temperatures)
        codec = compact_codec(spec, Compact())
        decoded, size, decode_s = np.empty_like(values), 0, 0.0
        for start in range(0, len(values), 256):
            chunk = values[start : start + 256]
            content = codec.encode_chunk(chunk)
            out = decoded[start : start + 256]
            decode = partial(codec.decode_into, content, out)
            decode_s += min(seconds(decode) for _ in range(repeats))
            size += len(content) + INDEX_BYTES
        return cls(values, decoded, size, decode_s)

    @property
    def rate(self) -> float:
        """Decoded numbers per second."""
        return self.values.size / self.decode_s


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    timesteps: int
    repeats: int


@dataclass(frozen=True)
class Cost:
    """Bytes of one target per position, and what its rounding loses."""

    name: str
    bytes: float
    loss_name: str
    loss: float
    note: str


@dataclass(frozen=True)
class Kept:
    """A target `top_k` of one timestep."""

    ids: Array
    """[C, K] rising."""
    logprobs: Array
    """[temperatures, C, K] of those ids, among all."""
    tails: Array
    """[temperatures, C] log mass of all other ids."""


TopKKind = tuple[int, tuple[float, ...]]
"""How many ids are kept, and the listed temperatures."""


def top_k_costs(name: str, teacher: Teacher, kinds: list[TopKKind], options: Options) -> list[Cost]:
    """The target `top_k` at some temperatures, without and with the drawn code."""
    kept: dict[TopKKind, list[Kept]] = {kind: [] for kind in kinds}
    codes, entropies, random = [], [], np.random.default_rng(1)
    for logits in teacher.logits(options.timesteps):
        logprobs = log_softmax(logits)
        probabilities = np.exp(logprobs)
        entropies.append(-(probabilities * logprobs).sum(-1).mean())
        codes.append(draw(probabilities, 1, random)[:, 0])
        for kind in kinds:
            kept[kind].append(top_k(logprobs, *kind))
    stored_codes = Stored.through(
        "codes", np.stack(codes).astype(ids_dtype(teacher.vocabulary)), options.repeats
    )
    positions = stored_codes.values.size
    entropy = f"{np.mean(entropies):.2f} nats, a drawn code {stored_codes.bytes / positions:.2f} B"
    costs = []
    for kind, timesteps in kept.items():
        k, temperatures = kind
        label = f"compact_k{k}_{name}{'_t2' if 2.0 in temperatures else ''}"
        found = top_k_cost(label, teacher, timesteps, temperatures, entropy, options.repeats)
        costs.append(found)
    return costs


def top_k_cost(
    name: str,
    teacher: Teacher,
    kept: list[Kept],
    temperatures: tuple[float, ...],
    note: str,
    repeats: int,
) -> Cost:
    """The cost of ids, logits and tail log-mass of all timesteps; of KLs the largest T²·KL."""
    ids = np.stack([timestep.ids for timestep in kept])
    logprobs = np.stack([timestep.logprobs for timestep in kept], 1)
    tails = np.stack([timestep.tails for timestep in kept], 1)
    logits = (logprobs[0] - logprobs[0].max(-1, keepdims=True)).astype(np.float16)
    masses = np.stack(list(tails), -1).astype(np.float32)
    parts = [
        Stored.through("top_k.ids", ids.astype(ids_dtype(teacher.vocabulary)), repeats),
        Stored.through("top_k.logits", logits, repeats, temperatures),
        Stored.through("top_k.tail_logmass", masses, repeats),
    ]
    if not np.array_equal(parts[0].decoded, ids):
        raise AssertionError("the ids came back changed")
    positions = tails[0].size
    sizes = [part.bytes / positions for part in parts]
    split = " + ".join(f"{size:.1f}" for size in sizes)
    rates = " and ".join(f"{part.rate / 1e6:.0f}" for part in parts[:2])
    decoded, mass = (part.decoded.astype(np.float64) for part in parts[1:])
    losses = [
        t**2 * bucketed_divergence(logprobs[i], tails[i], decoded / t, mass[..., i]).mean()
        for i, t in enumerate(temperatures)
    ]
    return Cost(name, sum(sizes), "kl", max(losses), f"{split} B, {rates} M numbers/s, {note}")


def bucketed_divergence(logprobs: Array, tails: Array, logits: Array, logmass: Array) -> Array:
    """KL [T, C] in nats over K kept ids and one bucket, from teacher to what was decoded."""
    decoded, mass = log_softmax(logits), logmass[..., None]
    decoded += np.log(-np.expm1(mass))
    of_kept = (np.exp(logprobs) * (logprobs - decoded)).sum(-1)
    divergence: Array = of_kept + np.exp(tails) * (tails - mass[..., 0])
    return divergence


def sampled_cost(teacher: Teacher, draws: int, options: Options) -> list[Cost]:
    """The target `sampled`, whose decoded ids must be the drawn ones."""
    random = np.random.default_rng(2)
    drawn = np.stack(
        [
            np.sort(draw(np.exp(log_softmax(logits)), draws, random))
            for logits in teacher.logits(options.timesteps)
        ]
    )
    ids = drawn.astype(ids_dtype(teacher.vocabulary))
    stored = Stored.through("sampled.ids", ids, options.repeats)
    exact = float(np.array_equal(stored.decoded, ids))
    positions = ids[..., 0].size
    different = (np.diff(drawn) != 0).sum() / positions + 1
    note = f"{different:.1f} different ids, {stored.rate / 1e6:.0f} M numbers/s"
    rskd = Cost("  RS-KD, 3 B per different id", 3 * different, "", 0.0, PUBLISHED)
    size = stored.bytes / positions
    return [Cost(f"sampled_n{draws}_v152k", size, "bit_exact", exact, note), rskd]


def hidden_costs(options: Options) -> list[Cost]:
    """The target `hidden` of a guided state of 768 features with a head per codebook."""
    width, random = 768, np.random.default_rng(3)
    gains = np.exp(0.3 * random.standard_normal(width))
    lift = random.standard_normal((64, width)) / 8
    states = guided_states(random, options.timesteps, 64) @ lift
    states = (states + 0.3 * random.standard_normal(states.shape)) * gains
    states = states[:, None].astype(np.float32)  # [T, 1, D]
    sharpness = np.linspace(*CODEC.sharpness, STREAMS)
    heads = random.standard_normal((STREAMS, CODEC_VOCABULARY, width)).astype(np.float32)
    heads *= (sharpness / np.sqrt((states**2).sum(-1).mean()))[:, None, None]
    bias = -CODEC.zipf * np.log(np.arange(1, CODEC_VOCABULARY + 1, dtype=np.float32))
    half = states.astype(np.float16)
    stored = Stored.through("hidden.backbone", half, options.repeats)
    loss, entropy = full_divergence(states, stored.decoded, heads, bias)
    half_loss, _ = full_divergence(states, half, heads, bias)
    note = f"{stored.rate / 1e6:.0f} M numbers/s, {entropy:.2f} nats"
    return [
        Cost("hidden_d768", stored.bytes / len(states), "kl", loss, note),
        Cost("  float16 states", 2.0 * width, "kl", half_loss, "exact layout"),
    ]


def full_divergence(
    states: Array, decoded: Array, heads: Array, bias: Array
) -> tuple[float, float]:
    """Mean KL between the distributions of all heads, and their mean entropy."""
    divergences, entropies = [], []
    for head in heads.astype(np.float64):
        exact = log_softmax(states[:, 0] @ head.T + bias)
        near = log_softmax(decoded[:, 0].astype(np.float64) @ head.T + bias)
        divergences.append((np.exp(exact) * (exact - near)).sum(-1).mean())
        entropies.append(-(np.exp(exact) * exact).sum(-1).mean())
    return float(np.mean(divergences)), float(np.mean(entropies))


def published(vocabulary: int, name: str) -> list[Cost]:
    """Bytes of other layouts by their formula."""
    bits = int(np.ceil(np.log2(vocabulary)))
    rows = []
    for k in (50, 64, 128):
        packed = k * 2 + np.ceil(k * bits / 8) + 4
        rows.append(Cost(f"  float16 + packed ids, k={k}, {name}", packed, "", 0.0, "exact layout"))
    for k, exact, terms, label in ((50, 1, 3, "budget"), (128, 16, 6, "recommended")):
        size = np.ceil(k * bits / 8) + 2 * exact + 4 * terms
        row = f"  DistillKit {label}, k={k}, {name}"
        rows.append(Cost(row, size, "", 0.0, PUBLISHED))
    return rows


def log_softmax(logits: Array) -> Array:
    """Log probabilities over the last axis in float64."""
    relative = logits.astype(np.float64)
    relative -= relative.max(-1, keepdims=True)
    relative -= np.log(np.exp(relative).sum(-1, keepdims=True))
    return relative


def top_k(logprobs: Array, k: int, temperatures: tuple[float, ...]) -> Kept:
    """The `k` likeliest ids of log probabilities [C, V], and the mass of all others."""
    ranked = np.argpartition(-logprobs, k, -1)
    ids = np.sort(ranked[:, :k], -1)
    softened = [log_softmax(logprobs / temperature) for temperature in temperatures]
    rest = [np.take_along_axis(x, ranked[:, k:], -1) for x in softened]
    return Kept(
        ids,
        np.stack([np.take_along_axis(x, ids, -1) for x in softened]),
        np.stack([np.log(np.exp(x).sum(-1)) for x in rest]),
    )


def draw(probabilities: Array, draws: int, random: np.random.Generator) -> Array:
    """Ids [C, draws] drawn with replacement."""
    cumulative = probabilities.cumsum(-1)
    uniforms = random.random((len(probabilities), draws)) * cumulative[:, -1:]
    places = [np.searchsorted(c, u) for c, u in zip(cumulative, uniforms, strict=True)]
    return np.stack(places)


def show(cost: Cost) -> None:
    """One line of the table."""
    loss = f"{cost.loss_name} {cost.loss:.2g}" if cost.loss_name else ""
    print(f"{cost.name:<44}{cost.bytes:>9.1f} B  {loss:<12}  {cost.note}")


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    given = parser.parse_args()
    options = Options(given.timesteps, given.repeats)
    costs = [
        *top_k_costs("v2048", CODEC, [(50, T1), (64, T1), (64, T2), (128, T1)], options),
        *published(CODEC_VOCABULARY, "V=2048"),
        *top_k_costs("v152k", TEXT, [(50, T1), (128, T1)], options),
        *published(TEXT_VOCABULARY, "V=152064"),
        *sampled_cost(PEAKED_TEXT, 50, options),
        *hidden_costs(options),
    ]
    if not given.json:
        for cost in costs:
            show(cost)
    measured = [cost for cost in costs if not cost.name.startswith(" ")]
    ratios = {f"{cost.name}_bytes": cost.bytes for cost in measured}
    ratios |= {f"{cost.name}_{cost.loss_name}": cost.loss for cost in measured}
    report(__file__, ratios, ["numpy", "pcodec"])


if __name__ == "__main__":
    main()
