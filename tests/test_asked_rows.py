"""What a denoiser is asked: every row with its own condition, sizes and none of its neighbours'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.diffusion.asked_rows import ConditionRows
from stages.diffusion.draws import draws_of

CONDITIONS = [{"prompt_embeds": np.full((2, 3), row, np.float16)} for row in range(4)]
LATENTS = [
    {"latent": np.full((1, 2, 2), row, np.float16), "time_ids": np.full(6, row, np.float32)}
    for row in range(3)
]
SAMPLE = {
    "sample_id": "a", "latents": [2, 0, 1], "conditions": [3, 1, 3], "target": "teacher",
    "weight": 1.0, "bucket": 0,
}  # fmt: skip


@pytest.mark.parametrize("unconditional", [False, True])
def test_rows_have_their_conditions_and_sizes_and_those_of_no_condition_the_same_sizes(
    unconditional,
):
    draws = draws_of(SAMPLE)
    count = len(draws)
    x = np.arange(count * 4, dtype=np.float32).reshape(count, 1, 2, 2)
    t, scale = np.arange(count, dtype=np.float64), np.arange(count, dtype=np.float32)
    rows = ConditionRows(LATENTS, CONDITIONS)
    held = rows.asked(x, t, draws, scale, unconditional=unconditional)
    assert len(held.conditions["prompt_embeds"]) == 2 + unconditional, "each condition once"
    asked = held.to(torch.device("cpu"))
    assert torch.equal(asked.x, torch.from_numpy(x))
    assert torch.equal(asked.t, torch.from_numpy(t))
    assert torch.equal(asked.scale, torch.from_numpy(scale))
    assert asked.conditions.keys() == {"prompt_embeds", "time_ids"}
    assert asked.conditions["prompt_embeds"][:, 0, 0].tolist() == [3, 1, 3] * 3
    assert asked.conditions["time_ids"][:, 0].tolist() == [2] * 3 + [0] * 3 + [1] * 3
    assert (asked.unconditional is not None) == unconditional
    if asked.unconditional is not None:
        assert asked.unconditional.keys() == asked.conditions.keys()
        assert not asked.unconditional["prompt_embeds"].any()
        assert asked.unconditional["prompt_embeds"].shape == (count, 2, 3)
        assert torch.equal(asked.unconditional["time_ids"], asked.conditions["time_ids"])
    some = asked.rows(torch.tensor([4, 0]))
    assert some.conditions["prompt_embeds"][:, 0, 0].tolist() == [1, 3]
    assert some.conditions["time_ids"][:, 0].tolist() == [0, 2]
    assert some.t.tolist() == some.scale.tolist() == [4, 0]
    assert torch.equal(some.x, asked.x[[4, 0]])
    assert (some.unconditional is not None) == unconditional


def test_an_unconditional_dataset_has_no_conditions():
    draws = draws_of(SAMPLE | {"conditions": [-1]})
    x, t = np.zeros((3, 1, 2, 2), np.float32), np.zeros(3)
    bare = [{"latent": row["latent"]} for row in LATENTS]
    asked = ConditionRows(bare, None).asked(
        x, t, draws, np.ones(3, np.float32), unconditional=False
    )
    assert (asked.conditions, asked.sizes) == ({}, {})
    found = asked.to(torch.device("cpu"))
    assert (found.conditions, found.unconditional) == ({}, None)
