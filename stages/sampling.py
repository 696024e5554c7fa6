"""How codes are drawn during a rollout, and when a rollout ends."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from store.schema import Latent, Sampler, Stream

RUNNING, END, TRUNCATED, LIMIT, NOT_FINITE = range(5)
STOP_REASONS = {
    END: "end", TRUNCATED: "truncated", LIMIT: "max_timesteps", NOT_FINITE: "not_finite"
}  # fmt: skip
"""`end`: the end id; `truncated`: a multiple of the reference; `max_timesteps`: the limit;
`not_finite`: the timestep after the last would have been NaN or infinite."""


def keyed_generator(*key: object) -> np.random.Generator:
    """Return the counter-based generator that belongs to a key, and to nothing else.

    The key is any tuple of strings and integers, such as (seed, sample_id, variation). It is
    hashed with sha256 into the key of a Philox generator, so that draws depend neither on the
    rank, nor on the batch, nor on the time. Source: Salmon et al., Parallel Random Numbers (2011).
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def keyed_seed(*key: object) -> int:
    """Return a 63-bit seed for torch that belongs to a key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def mask_forbidden(logits: Tensor, forbidden: Sequence[int]) -> Tensor:
    """Return `logits` [..., V] with -inf at the forbidden ids, which both models mask alike."""
    if not forbidden:
        return logits
    return logits.index_fill(-1, index_of(tuple(forbidden), logits.device), float("-inf"))


@cache
def index_of(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ids as a tensor [len(ids)] int64 on `device`, copied there once per process.

    A copy per decoding step would wait for the device every time.
    """
    with torch.inference_mode(False):  # so that training may use it too
        return torch.tensor(ids, dtype=torch.int64, device=device)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities that the filters leave, and the ids they belong to.

    `logits` is [..., V]. Without filters these are all V in the order of their ids, and the ids
    are None: sorting costs more than drawing. With filters they are [..., k] float32, falling and
    summing to 1, with ids [..., k]: top-k acts before temperature, top-p after it (Holtzman et
    al., 1904.09751), and the first candidate is always kept.
    """
    if top_k is None and top_p is None:
        return (logits.float() / temperature).softmax(-1), None
    k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    values, ids = logits.float().topk(k, dim=-1)
    probabilities = (values / temperature).softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one place per row by inverting the cumulative distribution.

    `probabilities` is [..., k] in any order, `uniforms` [...] in [0, 1). Returns [...] int64; a
    place of probability 0 is never drawn.
    """
    return _invert(probabilities.cumsum(-1), uniforms.unsqueeze(-1)).squeeze(-1)


def draw_many(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw m places per row, with replacement, in the order of the places.

    `weights` [..., V] are probabilities times any factor of the row, `uniforms` [..., m] float64 in
    [0, 1). The cumulative distribution is float64, exact to 1e-10 for any vocabulary. Returns
    [..., m] int64, rising with repeats; a place of weight 0 is never drawn.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return _invert(cumulative, _sorted(uniforms))


def misplaced(weights: Tensor, places: Tensor, uniforms: Tensor) -> Tensor:
    """Return how far numbers lie from the mass of the places that they are said to have drawn.

    `weights` [..., V] and `uniforms` [..., m] are those of `draw_many`, and `places` [..., m] what
    it returned. Returns [..., m] float64, shares of the whole mass: 0 where it would draw the same.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total, numbers = cumulative[..., -1:], _sorted(uniforms)
    upper = cumulative.gather(-1, places) / total
    lower = upper - weights.gather(-1, places) / total
    return torch.maximum(lower - numbers, numbers - upper).clamp_min_(0)


def _sorted(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # where NumPy sorts short rows ten times as fast as torch
        return torch.from_numpy(np.sort(values.contiguous().numpy(), axis=-1))
    return values.sort(-1).values


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Places [..., m] of `uniforms` [..., m] in rows of cumulative weights [..., V]."""
    total = cumulative[..., -1:]
    # Rounding may lift the product to the total, which no place exceeds.
    below = torch.nextafter(total, torch.zeros_like(total))
    place = torch.searchsorted(cumulative, torch.minimum(uniforms * total, below), right=True)
    # A row of NaN has no place; an index beyond the end would kill a CUDA process, and whoever
    # asked refuses such rows.
    return place.clamp_max(cumulative.shape[-1] - 1)


def _beyond(streams: Sequence[Stream | Latent], device: torch.device) -> Tensor | None:
    """[C, V] bool: ids that a stream does not have; None where all have the same, or none."""
    sizes = [stream.vocabulary for stream in streams if isinstance(stream, Stream)]
    if len(set(sizes)) <= 1:
        return None
    return (torch.arange(max(sizes)) >= torch.tensor(sizes).unsqueeze(-1)).to(device)


def most_timesteps(sampler: Sampler, reference_timesteps: int) -> int:
    """Return how many timesteps a rollout may have whose recording has `reference_timesteps`."""
    return min(_truncation(sampler, reference_timesteps), sampler.max_timesteps)


def _truncation(sampler: Sampler, reference: int) -> int:
    multiple = sampler.reference_multiple
    if multiple is None:
        return sampler.max_timesteps
    return max(round(multiple * reference), sampler.min_timesteps)


class RolloutPolicy:
    """Draws the codes of one batch of rollouts and decides when each of them ends.

    A family calls `draw` once per timestep, or once per group of streams, and then `end`. Every
    rollout has its own table of uniform numbers, so what it draws does not depend on its
    neighbours in the batch.
    """

    def __init__(
        self,
        sampler: Sampler,
        keys: Sequence[tuple[str, int]],
        *,
        seed: int,
        streams: Sequence[Stream | Latent],
        forbidden: Sequence[int],
        end_id: int | None,
        reference_timesteps: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampler = sampler
        self._stop_weights = {
            END: 1.0, TRUNCATED: sampler.truncated_weight, LIMIT: sampler.max_timesteps_weight,
            NOT_FINITE: 0.0,
        }  # fmt: skip
        self.forbidden = tuple(forbidden)
        self.end_id = end_id
        self._beyond = _beyond(streams, torch.device(device))
        shape = (sampler.max_timesteps, len(streams))
        tables = [keyed_generator(seed, *key).random(shape, dtype=np.float32) for key in keys]
        self._uniforms = torch.from_numpy(np.stack(tables)).to(device)
        self.limits = [most_timesteps(sampler, each) for each in reference_timesteps]
        """Timesteps that each rollout of the batch may have."""
        last = [_truncation(sampler, reference) for reference in reference_timesteps]
        self._last_timestep = torch.tensor(last, device=device)
        self.stop = torch.full((len(keys),), RUNNING, dtype=torch.int8, device=device)
        """[B] why each rollout ended; 0 while it runs."""
        self.all_finite = True
        """Whether none of them is NOT_FINITE; known without waiting for the device."""

    def _masked(self, logits: Tensor, ids: Sequence[int], streams: slice = slice(None)) -> Tensor:
        """Return logits [b, c, V] with -inf at `ids` and beyond each stream's own vocabulary."""
        masked = mask_forbidden(logits, ids)
        if self._beyond is None:
            return masked
        return masked.masked_fill(self._beyond[streams], float("-inf"))

    def _excluded(self, timestep: int) -> tuple[int, ...]:
        if self.end_id is not None and timestep < self.sampler.min_timesteps:
            return (*self.forbidden, self.end_id)
        return self.forbidden

    def draw(
        self, rows: Tensor, timestep: int, logits: Tensor, streams: slice = slice(None)
    ) -> Tensor:
        """Draw codes [b, c] int64 from guided logits [b, c, V] of the streams given."""
        masked = self._masked(logits, self._excluded(timestep), streams)
        probabilities, ids = candidates(
            masked, self.sampler.temperature, self.sampler.top_k, self.sampler.top_p
        )
        places = draw(probabilities, self._uniforms[rows, timestep, streams])
        return places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)

    def end(
        self,
        rows: Tensor,
        timestep: int,
        codes: Tensor,
        logits: Tensor,
        others: Tensor | None = None,
        *,
        likeliest: bool = True,
    ) -> Tensor:
        """Return which of `rows` end with this timestep, as [b] bool, and note why.

        `codes` [b, C] are the drawn ones and `logits` [b, C, V] what they were drawn from. The
        end id counts where it was drawn and, with `likeliest`, where it is the most likely one, as
        NeMo's MagpieTTS does (`argmax_or_multinomial_any`); `end_on` says in how many streams it
        must stand. A row
        whose largest logit is not finite ends before this timestep, which is not to be kept;
        `others` [b, c, V] are logits of streams that have no other say, all of one vocabulary.
        """
        largest, places = self._masked(logits, self.forbidden).max(-1)
        finite = largest.isfinite().all(-1)
        if others is not None:
            finite &= mask_forbidden(others, self.forbidden).amax(-1).isfinite().all(-1)
        reason = torch.full_like(self.stop[rows], RUNNING)
        reason[self._last_timestep[rows] <= timestep + 1] = TRUNCATED
        if timestep + 1 >= self.sampler.max_timesteps:
            reason[:] = LIMIT
        if self.end_id is not None and timestep >= self.sampler.min_timesteps:
            votes = codes.eq(self.end_id)
            if likeliest:
                votes |= places.eq(self.end_id)
            reason[self._ended(votes)] = END
        if not bool(finite.all()):
            self.all_finite = False
            reason[~finite] = NOT_FINITE
        self.stop[rows] = reason
        return reason != RUNNING

    def finish(self, rows: Tensor) -> None:
        """Note that `rows` [b] have come to their end, where it is no code that says so."""
        self.stop[rows] = END

    def _ended(self, votes: Tensor) -> Tensor:
        match self.sampler.end_on:
            case "any":
                return votes.any(-1)
            case "first":
                return votes[:, 0]
            case "majority":
                return votes.sum(-1) * 2 > votes.shape[-1]

    def stop_reason(self, row: int) -> str:
        """Why rollout `row` ended, one of `STOP_REASONS`."""
        return STOP_REASONS[int(self.stop[row])]

    def weight(self, row: int, timesteps: int, reference_timesteps: int) -> float:
        """Weight of a rollout in training, from why it ended and how long it became.

        A rollout cut short teaches little about how speech ends; one far shorter or longer than
        its reference is probably wrong (NeMo's MagpieTTS truncation and rejection weights). Where
        several rules apply, the one that trusts the rollout least has the say.
        """
        sampler = self.sampler
        too_short, too_long = sampler.too_short_multiple, sampler.too_long_multiple
        weights = [self._stop_weights[int(self.stop[row])]]
        if too_short is not None and timesteps < too_short * reference_timesteps:
            weights.append(sampler.too_short_weight)
        if too_long is not None and timesteps > too_long * reference_timesteps:
            weights.append(sampler.too_long_weight)
        return min(weights)
