"""The order of training is a pure function, shown by enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.order import Order, rank_share

RANDOM = np.random.default_rng(5)
LENGTHS = [RANDOM.integers(1, 400, size) for size in (7, 30, 1, 16, 30, 22, 5)]
TOTAL = sum(map(len, LENGTHS))
ALL = sorted((shard, row) for shard, lengths in enumerate(LENGTHS) for row in range(len(lengths)))


def joined(parts: Iterable[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return list(chain.from_iterable(parts))


def pairs(rollouts: np.ndarray) -> list[tuple[int, int]]:
    return [(int(shard), int(row)) for shard, row in rollouts]


@pytest.mark.parametrize(("buffer", "neighbours"), list(product((1, 2, 100), (1, 4, 1000))))
def test_every_epoch_holds_each_rollout_exactly_once(buffer: int, neighbours: int) -> None:
    order = Order.of(LENGTHS, seed=3, buffer_shards=buffer, neighbours=neighbours)
    epochs = [pairs(order.epoch(epoch)) for epoch in range(3)]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    one, two = Order.of(LENGTHS, seed=3), Order.of([x.copy() for x in LENGTHS], seed=3)
    assert pairs(one.epoch(1)) == pairs(two.epoch(1))
    assert pairs(one.epoch(1)) != pairs(Order.of(LENGTHS, seed=4).epoch(1))


def test_the_order_of_a_seed_never_changes() -> None:
    order = Order.of([np.array([3, 1, 2]), np.array([5, 4])], seed=11, neighbours=2)
    assert pairs(order.epoch(0)) == GOLDEN
    assert digest(Order.of(LENGTHS, seed=3).take(0, 3 * TOTAL)) == "6a9f15ae022b6dc0"
    drawn = Order.of(LENGTHS, seed=3, neighbours=8, samples=np.arange(TOTAL) % 40)
    assert digest(drawn.take(0, 120)) == "97d5de13beeb65df"


def digest(rollouts: np.ndarray) -> str:
    return sha256(rollouts.astype("<i8").tobytes()).hexdigest()[:16]


GOLDEN = [(1, 1), (1, 0), (0, 2), (0, 0), (0, 1)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, TOTAL, 2 * TOTAL + 1])
def test_batches_of_any_size_walk_the_same_sequence_across_epochs(batch_size: int) -> None:
    order = Order.of(LENGTHS, seed=3)
    endless = joined(pairs(order.epoch(epoch)) for epoch in range(5))
    steps = 4 * TOTAL // batch_size
    walked = [pairs(order.take(step * batch_size, batch_size)) for step in range(steps)]
    assert joined(walked) == endless[: steps * batch_size]


def test_a_run_that_resumes_with_another_batch_size_continues_the_same_order() -> None:
    order = Order.of(LENGTHS, seed=3)
    before = pairs(order.take(0, 40)) + pairs(order.take(40, 40))
    after = [pairs(order.take(start, 7)) for start in range(80, 150, 7)]
    assert before + joined(after) == pairs(order.take(0, 150))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_ranks_together_take_the_global_batch_once(world_size: int) -> None:
    batch = Order.of(LENGTHS, seed=3).take(100, 16)
    shares = [pairs(rank_share(batch, rank, world_size)) for rank in range(world_size)]
    assert sorted(joined(shares)) == sorted(pairs(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ValueError, match=f"rank is {world_size} but must be in"):
        rank_share(batch, world_size, world_size)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    buffer_shards=st.integers(1, 4),
    neighbours=st.sampled_from([1, 3, 8, 64]),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_runs_begin_at_multiples_of_their_size_and_hold_neighbours_in_length(
    sizes: list[int], buffer_shards: int, neighbours: int, epoch: int, seed: int
) -> None:
    distinct = np.random.default_rng(seed).permutation(sum(sizes))
    lengths = np.split(distinct, np.cumsum(sizes)[:-1])
    order = Order.of(lengths, seed, buffer_shards, neighbours)
    found = pairs(order.epoch(epoch))
    assert len(set(found)) == len(found) == sum(sizes)
    # Buffers are read one after another, so their shards appear one after another.
    shards = list(dict.fromkeys(shard for shard, _ in found))
    start = 0
    for first in range(0, len(shards), buffer_shards):
        stop = start + sum(sizes[shard] for shard in shards[first : first + buffer_shards])
        walked = [int(lengths[shard][row]) for shard, row in found[start:stop]]
        assert {shard for shard, _ in found[start:stop]} == {*shards[first : first + buffer_shards]}
        begin = epoch * len(order) + start
        cuts = [at for at in range(1, len(walked)) if (begin + at) % neighbours == 0]
        runs = [walked[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert sorted(walked) == list(chain.from_iterable(sorted(runs)))
        start = stop


def test_runs_are_shuffled_and_their_order_differs_between_buffers_and_epochs() -> None:
    lengths = [np.arange(640) for _ in range(4)]
    order = Order.of(lengths, seed=0, buffer_shards=1, neighbours=64)
    firsts = [
        tuple(order.epoch(epoch)[shard * 640 : (shard + 1) * 640 : 64, 1])
        for epoch, shard in product(range(3), range(4))
    ]
    assert len(set(firsts)) == 12
    assert all(sorted(first) == list(range(0, 640, 64)) for first in firsts)


@pytest.mark.parametrize("epoch", range(4))
def test_the_parts_of_a_run_that_two_buffers_share_are_both_short_or_both_long(epoch: int) -> None:
    lengths = [RANDOM.permutation(1000)[:100] for _ in range(6)]
    order = Order.of(lengths, seed=epoch, buffer_shards=2, neighbours=64)
    walked = [lengths[s][r] for s, r in order.take(epoch * 600, 664)]
    for buffer in (1, 2, 3):  # the last one begins the next epoch
        begin = (epoch * 600 + buffer * 200) // 64 * 64 - epoch * 600
        shared = walked[begin : begin + 64]
        if begin < buffer * 200:
            assert max(shared) < 500 or min(shared) > 500


@pytest.mark.parametrize(("rollouts", "most"), [(100, 0.035), (256, 0.02)])
def test_little_of_a_batch_is_padding(rollouts: int, most: float) -> None:
    """Lengths as those of the demo: about 130 timesteps, 12 to 240; batches of 16."""
    random = np.random.default_rng(0)
    lengths = [random.normal(130, 35, rollouts).clip(12, 240).astype(int) for _ in range(24)]
    assert padding(Order.of(lengths, seed=0), lengths) < most
    assert padding(Order.of(lengths, seed=0, neighbours=1), lengths) > 0.3


def padding(order: Order, lengths: list[np.ndarray]) -> float:
    walked = np.array([lengths[s][r] for s, r in order.take(0, 2 * len(order))])
    batches = walked[: len(walked) // 16 * 16].reshape(-1, 16)
    return 1 - batches.sum() / (16 * batches.max(1).sum())


# Variations drawn per epoch.

SAMPLES = RANDOM.permutation(np.arange(TOTAL) % 29 * 2)  # numbers with gaps, 3 or 4 rollouts each
FLAT = [(shard, row) for shard, lengths in enumerate(LENGTHS) for row in range(len(lengths))]
SAMPLE_OF = dict(zip(FLAT, SAMPLES.tolist(), strict=True))


def test_an_epoch_may_hold_every_sample_once_with_a_variation_of_it() -> None:
    order = Order.of(LENGTHS, seed=3, samples=SAMPLES)
    assert len(order) == 29
    epochs = [pairs(order.epoch(epoch)) for epoch in range(40)]
    assert all(sorted(SAMPLE_OF[r] for r in epoch) == [*range(0, 58, 2)] for epoch in epochs)
    seen = Counter(chain.from_iterable(epochs))
    assert set(seen) == set(ALL)
    assert max(seen.values()) < 26  # of 40 epochs, 10 or 13.3 are expected
    assert pairs(order.take(25, 10)) == epochs[0][25:] + epochs[1][:6]
    assert order.epochs(25, 10).tolist() == [0] * 4 + [1] * 6


def test_variations_are_drawn_evenly_and_independently_of_each_other() -> None:
    lengths, samples = [np.full(3, 7)] * 4000, np.repeat(np.arange(4000), 3)
    order = Order.of(lengths, seed=1, samples=samples)
    drawn = np.stack([rows[np.argsort(rows[:, 0]), 1] for rows in map(order.epoch, range(2))])
    table = np.histogram2d(*drawn, bins=3)[0]
    expected = 4000 / 9
    assert ((table - expected) ** 2 / expected).sum() < 27  # chi-square, 8 degrees: p = 0.0007


def test_the_variation_of_a_sample_depends_on_no_length_and_no_other_sample() -> None:
    alone = SAMPLES.copy()
    alone[alone == 8] = 1000  # another number for one sample: only its own draw changes
    plain = Order.of(LENGTHS, seed=3, samples=SAMPLES).epoch(5)
    other = Order.of([x[::-1] for x in LENGTHS], seed=3, samples=alone).epoch(5)
    assert {*pairs(plain)} ^ {*pairs(other)} <= {
        r for r, sample in SAMPLE_OF.items() if sample == 8
    }


def test_samples_that_are_not_those_of_the_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"number of samples is 3 but must be {TOTAL}, one for"):
        Order.of(LENGTHS, seed=0, samples=np.arange(3))


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([], {}, "number of rollouts is 0 but must be >= 1: commit a shard first"),
        ([np.array([], int)], {}, "number of rollouts is 0"),
        (LENGTHS, {"buffer_shards": 0}, "buffer_shards is 0"),
        (LENGTHS, {"neighbours": 0}, "neighbours is 0"),
    ],
)
def test_an_order_of_nothing_is_refused(
    lengths: list[np.ndarray], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Order.of(lengths, seed=0, **settings)


def test_taking_nothing_gives_nothing() -> None:
    assert Order.of(LENGTHS, seed=0).take(5, 0).shape == (0, 2)
