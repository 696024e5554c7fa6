"""Drawing: exact, keyed by the rollout alone, and never an id that is not allowed."""

from __future__ import annotations

from collections import Counter
from zlib import crc32

import numpy as np
import pytest
import torch

from stages.sampling import (
    RolloutPolicy,
    candidates,
    draw,
    keyed_generator,
    keyed_seed,
    mask_forbidden,
)
from store.schema import Sampler, Stream

VOCABULARY = 12
FORBIDDEN, END = 10, 11


def streams_of(*sizes: int) -> list[Stream]:
    return [Stream(name=f"{i}", group="a", vocabulary=size) for i, size in enumerate(sizes)]


def policy_of(keys, *, seed=3, streams=2, references=None, **sampler) -> RolloutPolicy:
    return RolloutPolicy(
        Sampler.model_validate({"max_timesteps": 20, "min_timesteps": 2} | sampler),
        keys,
        seed=seed,
        streams=streams if isinstance(streams, list) else streams_of(*[VOCABULARY] * streams),
        forbidden=[FORBIDDEN],
        end_id=END,
        reference_timesteps=references or [10] * len(keys),
    )


def logits_of(rows: int, streams: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, streams, VOCABULARY, generator=generator)


def keys_of(count: int) -> list[tuple[str, int]]:
    return [(f"sample {i}", i % 3) for i in range(count)]


def drawn_by_key(policy, keys, order, timestep) -> dict:
    """What each key draws when the rows of `order` are still running, from logits of its own."""
    logits = torch.stack([logits_of(1, seed=crc32(keys[row][0].encode()))[0] for row in order])
    codes = policy.draw(torch.tensor(order), timestep, logits)
    return {keys[row]: codes[place].tolist() for place, row in enumerate(order)}


def test_a_key_names_one_generator_on_every_machine():
    # Values of numpy's Philox under sha256 of the key's text: a change would break old runs.
    import hashlib

    digest = hashlib.sha256(b"(1, 'a', 2)").digest()
    key = sum(byte << (8 * place) for place, byte in enumerate(digest[:16]))
    expected = np.random.Generator(np.random.Philox(key=key)).random(5)
    assert keyed_generator(1, "a", 2).random(5).tolist() == expected.tolist()
    assert 0 <= keyed_seed(1, "a", 2) < 2**63
    assert keyed_seed(1, "a", 2) == int.from_bytes(digest[:8], "little") // 2


@pytest.mark.parametrize(
    "other", [(2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a2", 2), (1, "a", "2"), ("1", "a", 2)]
)
def test_other_keys_name_other_generators(other):
    assert keyed_generator(1, "a", 2).integers(2**60) != keyed_generator(*other).integers(2**60)
    assert keyed_seed(1, "a", 2) != keyed_seed(*other)


def test_draws_do_not_depend_on_neighbours_their_order_or_who_has_left():
    keys = keys_of(6)
    alone = {}
    for key in keys:
        alone |= drawn_by_key(policy_of([key]), [key], [0], 4)
    together = policy_of(keys)
    assert drawn_by_key(together, keys, [0, 1, 2, 3, 4, 5], 4) == alone
    assert drawn_by_key(together, keys, [5, 2, 0], 4) == {
        keys[r]: alone[keys[r]] for r in (5, 2, 0)
    }
    backwards = keys[::-1]
    assert drawn_by_key(policy_of(backwards), backwards, [0, 1, 2, 3, 4, 5], 4) == alone


def test_drawing_stream_by_stream_equals_drawing_all_at_once():
    keys, rows = keys_of(4), torch.arange(4)
    policy, logits = policy_of(keys), logits_of(4)
    whole = policy.draw(rows, 3, logits)
    parts = [policy.draw(rows, 3, logits[:, c : c + 1], slice(c, c + 1)) for c in range(2)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_a_longer_limit_keeps_the_draws_of_a_shorter_one():
    keys, rows = keys_of(5), torch.arange(5)
    short, long = policy_of(keys, max_timesteps=7), policy_of(keys, max_timesteps=50)
    for timestep in range(7):
        logits = logits_of(5, seed=timestep)
        assert torch.equal(short.draw(rows, timestep, logits), long.draw(rows, timestep, logits))


@pytest.mark.parametrize("change", [{"seed": 4}, {"variation": 1}, {"timestep": 5}])
def test_seed_variation_and_timestep_each_change_the_draws(change):
    rows, logits = torch.arange(1), torch.zeros(1, 40, VOCABULARY)
    plain = policy_of([("a", 0)], streams=40).draw(rows, 4, logits)
    key = ("a", change.get("variation", 0))
    other = policy_of([key], streams=40, seed=change.get("seed", 3))
    assert not torch.equal(plain, other.draw(rows, change.get("timestep", 4), logits))


def drawn_ids(logits: torch.Tensor, filters: tuple, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids drawn from logits [..., V] with uniforms [...]."""
    probabilities, ids = candidates(logits, *filters)
    places = draw(probabilities, uniforms)
    return places if ids is None else ids.gather(-1, places.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    "filters", [(1.0, None, None), (0.7, 5, None), (1.0, None, 0.9), (1.3, 6, 0.8)]
)
def test_every_id_is_drawn_for_exactly_its_share_of_the_unit_interval(filters):
    logits = logits_of(1, 1)[0, 0]
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = drawn_ids(logits.expand(count, -1), filters, grid.float())
    shares = Counter(drawn.tolist())
    expected = reference_filter(logits.double().numpy(), *filters)
    for id_, probability in enumerate(expected):
        assert shares[id_] == pytest.approx(count * probability, abs=1.01)


@pytest.mark.parametrize("filters", [(0.5, None, None), (0.5, 11, None), (0.5, None, 0.999)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_ids_that_are_possible(uniform, filters):
    logits = mask_forbidden(logits_of(64), [FORBIDDEN, END])
    logits[..., 5] = -200.0  # probability 0 in float32
    drawn = drawn_ids(logits, filters, torch.full(logits.shape[:-1], uniform))
    assert not set(drawn.flatten().tolist()) & {5, FORBIDDEN, END}


def reference_filter(logits: np.ndarray, temperature, top_k, top_p) -> np.ndarray:
    """Probabilities [V] after the filters: an independent formula, from the definitions."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k]
    weights = {i: np.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    total = sum(weights.values())
    if top_p is not None:
        nucleus, mass = [], 0.0
        for i in kept:  # the fewest candidates whose mass reaches top_p
            if mass >= top_p:
                break
            nucleus.append(i)
            mass += weights[i] / total
        weights = {i: weights[i] for i in nucleus}
        total = sum(weights.values())
    result = np.zeros(len(logits))
    for i, weight in weights.items():
        result[i] = weight / total
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95])
def test_filters_leave_what_their_definitions_say(temperature, top_k, top_p):
    for logits in logits_of(5, 1)[:, 0]:
        probabilities, ids = candidates(logits, temperature, top_k, top_p)
        dense = np.zeros(VOCABULARY)
        dense[np.arange(VOCABULARY) if ids is None else ids.numpy()] = probabilities.numpy()
        expected = reference_filter(logits.double().numpy(), temperature, top_k, top_p)
        np.testing.assert_allclose(dense, expected, atol=1e-6)
        assert probabilities.sum() == pytest.approx(1, abs=1e-6)


def test_forbidden_ids_are_never_drawn_however_likely():
    policy, rows = policy_of(keys_of(50)), torch.arange(50)
    logits = torch.zeros(50, 2, VOCABULARY)
    logits[..., FORBIDDEN] = 50.0
    for timestep in range(20):
        assert not policy.draw(rows, timestep, logits).eq(FORBIDDEN).any()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("beyond", [50.0, torch.nan])
def test_ids_beyond_the_vocabulary_of_a_stream_are_neither_drawn_nor_looked_at(beyond, top_k):
    sizes = (VOCABULARY, 6, 9)
    policy = policy_of(keys_of(50), streams=streams_of(*sizes), top_k=top_k)
    rows, logits = torch.arange(50), logits_of(50, 3)
    for stream, size in enumerate(sizes):
        logits[:, stream, size:] = beyond
    whole = policy.draw(rows, 4, logits)
    assert (whole < torch.tensor(sizes)).all()
    parts = [policy.draw(rows, 4, logits[:, c : c + 1], slice(c, c + 1)) for c in range(3)]
    assert torch.equal(whole, torch.cat(parts, 1))
    # Below a size all ids can be drawn, and the end is not taken for likeliest where there is none.
    if top_k is None:
        drawn = policy.draw(rows, 4, torch.zeros(50, 3, VOCABULARY))
        assert set(drawn[:, 1].tolist()) == set(range(6))
    logits[:, 0, END] = -50.0
    assert not policy.end(rows, 4, torch.zeros_like(whole), logits).any()


def test_the_end_is_not_drawn_before_the_least_length_and_then_it_is():
    policy, rows = policy_of(keys_of(8), min_timesteps=3), torch.arange(8)
    logits = torch.zeros(8, 2, VOCABULARY)
    logits[..., END] = 50.0
    for timestep in range(3):
        codes = policy.draw(rows, timestep, logits)
        assert not codes.eq(END).any()
        assert not policy.end(rows, timestep, codes, logits).any()
    codes = policy.draw(rows, 3, logits)
    assert codes.eq(END).all()
    assert policy.end(rows, 3, codes, logits).all()
    assert [policy.stop_reason(row) for row in range(8)] == ["end"] * 8


@pytest.mark.parametrize(
    ("end_on", "ends"), [("any", [1, 1, 1, 0]), ("first", [1, 0, 0, 0]), ("majority", [0, 0, 1, 0])]
)
def test_how_many_streams_must_end_is_a_setting(end_on, ends):
    policy, rows = policy_of(keys_of(4), streams=3, end_on=end_on), torch.arange(4)
    codes = torch.tensor([[END, 0, 0], [0, END, 0], [0, END, END], [0, 0, 0]])
    logits = torch.zeros(4, 3, VOCABULARY)
    logits[..., 0] = 1.0
    assert policy.end(rows, 5, codes, logits).tolist() == [bool(end) for end in ends]


def test_an_end_that_is_likeliest_counts_though_another_code_was_drawn():
    policy, rows = policy_of(keys_of(2)), torch.arange(2)
    logits = torch.zeros(2, 2, VOCABULARY)
    logits[0, 1, END] = 1.0
    logits[1, 1, FORBIDDEN] = 1.0  # likelier than the end, but it cannot be
    logits[1, 1, 0] = 0.5
    assert policy.end(rows, 5, torch.zeros(2, 2, dtype=torch.int64), logits).tolist() == [
        True,
        False,
    ]


def test_rollouts_stop_at_a_multiple_of_their_reference_or_at_the_limit_and_say_which():
    policy = policy_of(keys_of(3), references=[4, 40, 1], reference_multiple=1.5, max_timesteps=9)
    running, codes = torch.arange(3), torch.zeros(3, 2, dtype=torch.int64)
    logits = torch.zeros(3, 2, VOCABULARY)
    logits[..., 0] = 1.0
    lengths = {}
    for timestep in range(9):
        done = policy.end(running, timestep, codes[: len(running)], logits[: len(running)])
        lengths |= dict.fromkeys(running[done].tolist(), timestep + 1)
        running = running[~done]
    assert len(running) == 0
    assert lengths == {0: 6, 1: 9, 2: 2}  # 1.5 × 4; the limit; not below min_timesteps
    assert [policy.stop_reason(row) for row in range(3)] == [
        "truncated", "max_timesteps", "truncated",
    ]  # fmt: skip


def stopped(reason: str, **sampler) -> RolloutPolicy:
    """A policy whose only rollout, of a reference of 10 timesteps, has ended for a reason."""
    policy = policy_of([("a", 0)], references=[10], reference_multiple=1.5, **sampler)
    rows, end = torch.tensor([0]), torch.full((1, 2), END)
    timestep, codes = {"end": (5, end), "truncated": (14, end * 0), "max_timesteps": (19, end * 0)}[
        reason
    ]
    logits = torch.zeros(1, 2, VOCABULARY).index_fill(-1, torch.tensor(0), 1.0)
    assert policy.end(rows, timestep, codes, logits).all()
    assert policy.stop_reason(0) == reason
    return policy


WEIGHTS = {
    "truncated_weight": 0.5, "max_timesteps_weight": 0.25, "too_short_multiple": 0.5,
    "too_short_weight": 0.125, "too_long_multiple": 1.5, "too_long_weight": 0.375,
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "timesteps", "weight"),
    [
        ("end", 5, 1.0),
        ("end", 15, 1.0),
        ("end", 4, 0.125),
        ("end", 16, 0.375),
        ("truncated", 15, 0.5),
        ("max_timesteps", 15, 0.25),
        # Of two rules the one that trusts the rollout least counts, whichever it is.
        ("truncated", 16, 0.375),
        ("max_timesteps", 16, 0.25),
        ("max_timesteps", 4, 0.125),
    ],
)
def test_every_reason_has_its_own_weight_and_the_least_counts(reason, timesteps, weight):
    assert stopped(reason, **WEIGHTS).weight(0, timesteps, 10) == weight


def test_lengths_are_judged_only_where_a_multiple_is_given():
    policy = stopped("end", **(WEIGHTS | {"too_short_multiple": None, "too_long_multiple": None}))
    assert policy.weight(0, 1, 10) == policy.weight(0, 99, 10) == 1.0


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_whose_logits_are_not_finite_ends_and_no_other(bad, top_k):
    policy, rows, logits = policy_of(keys_of(2), top_k=top_k), torch.arange(2), logits_of(2)
    logits[..., END] = -9.0
    assert not policy.end(rows, 1, policy.draw(rows, 1, logits), logits).any()
    healthy = policy.draw(rows, 1, logits)
    logits[1, 0, 3] = bad
    codes = policy.draw(rows, 1, logits)
    assert torch.equal(codes[0], healthy[0])
    assert (codes < VOCABULARY).all(), "an index beyond the vocabulary would end a CUDA process"
    assert policy.all_finite
    assert policy.end(rows, 1, codes, logits).tolist() == [False, True]
    assert not policy.all_finite
    assert (policy.stop_reason(1), policy.weight(1, 5, 5)) == ("not_finite", 0.0)


def test_streams_that_have_no_say_in_the_end_are_to_be_finite_too():
    policy, rows, logits = policy_of(keys_of(2)), torch.arange(2), logits_of(2)
    logits[..., END] = -9.0
    others = logits.clone()
    others[1, 1, 3] = torch.nan
    others[0, 0, FORBIDDEN] = torch.nan
    codes = torch.zeros(2, 2, dtype=torch.int64)
    assert policy.end(rows, 1, codes, logits, others).tolist() == [False, True]
