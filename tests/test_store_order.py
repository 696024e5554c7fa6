"""The order of training is a pure function, shown by enumeration."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, product

import numpy as np
import pytest

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


GOLDEN = [(0, 0), (1, 1), (1, 0), (0, 1), (0, 2)]


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


def test_neighbours_have_similar_lengths_and_shards_stay_within_their_buffer() -> None:
    lengths = [RANDOM.integers(1, 1000, 200) for _ in range(8)]
    order = Order.of(lengths, seed=0, buffer_shards=4, neighbours=32)
    epoch = order.epoch(0)
    assert len(set(epoch[:800, 0])) == 4
    spread = [np.ptp([lengths[s][r] for s, r in epoch[i : i + 32]]) for i in range(0, 1600, 32)]
    assert max(spread) < 100
    # The runs themselves are not sorted: short and long ones alternate.
    first = [lengths[s][r] for s, r in epoch[::32]]
    assert first != sorted(first)


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
