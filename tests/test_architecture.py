"""Sizes and costs that are reported are those of the network that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.architecture import Architecture, feed_forward_flops, parameters_by_part
from stages.families.codec_lm import CodecLM
from stages.saved_model import WEIGHTS_FILES, is_saved
from tests.test_rollout import VARIANTS, samples_of, teacher_of

ATTENTION = ("aten._scaled_dot", "aten._flash", "aten._efficient")


def counted(family: CodecLM) -> int:
    """FLOPs of one decoding step as torch counts its products, attention to others left out."""
    network = family.module.requires_grad_(False)
    state = network.start(family._conditions(samples_of(1)))
    codes = torch.zeros(1, network.streams, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        hidden = network.step(codes, state)
        network.predict_parallel(hidden)
        if network.local is not None:
            local, caches = network.local.start(hidden)
            for stream in range(network.streams):
                if stream > 0:
                    embedded = network.embed_stream(codes[:, 0], stream - 1)
                    local = network.local.step(embedded, stream, caches)
                network.local.predict_stream(local, stream)
    totals = counter.get_flop_counts()["Global"]
    return sum(n for op, n in totals.items() if not str(op).startswith(ATTENTION))


@pytest.mark.parametrize("variant", ["plain", "stacked", "local"])
def test_the_flops_of_a_timestep_are_those_that_torch_counts(variant: str) -> None:
    family = teacher_of(**VARIANTS[variant])
    found = family.architecture()
    assert found.flops_per_timestep == counted(family)
    assert found.dense_flops_per_timestep == found.flops_per_timestep
    assert (found.experts, found.active_experts) == (0, 0)
    assert found.active_parameters == found.parameters


def test_experts_cost_what_their_active_ones_and_the_router_do() -> None:
    dense, sparse = teacher_of().architecture(), teacher_of(**VARIANTS["experts"]).architecture()
    assert (sparse.experts, sparse.active_experts) == (3, 2)
    layers, width, hidden = 2, 16, 24
    expert = 2 * 2 * width * hidden
    router = 2 * width * 3 + 3
    more = sparse.flops_per_timestep - dense.flops_per_timestep
    assert more == layers * ((2 - 1) * expert + router)
    more = sparse.dense_flops_per_timestep - dense.flops_per_timestep
    assert more == layers * (3 - 1) * expert, "one feed-forward, three times as wide"
    assert sparse.parameters - sparse.active_parameters == layers * 1 * 2 * width * hidden


def test_a_feed_forward_costs_what_nemo_says() -> None:
    # By hand: d 768, 8 experts of 1536, top 2; and the dense one of 3072.
    assert feed_forward_flops(768, 1536, experts=8, active=2) == 2 * 4 * 768 * 1536 + 12288 + 8
    assert feed_forward_flops(768, 3072) == 4 * 768 * 3072


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_add_up_to_all_parameters_of_the_module(variant: str) -> None:
    family = teacher_of(context=True, **VARIANTS[variant])
    found = family.architecture()
    assert found.parameters == sum(p.numel() for p in family.module.parameters())
    assert sum(found.parts.values()) == found.parameters
    assert {"decoder", "head", "text_encoder", "context_encoder"} <= found.parts.keys()
    assert ("local" in found.parts) == ("local_transformer" in VARIANTS[variant])
    assert Architecture.model_validate_json(found.model_dump_json()) == found


def test_parts_are_named_by_the_first_part_of_a_name() -> None:
    assert parameters_by_part([("a.0.w", 2), ("a.1.w", 3), ("b", 5)]) == {"a": 5, "b": 5}


def test_a_model_is_finished_when_its_weights_are_there(tmp_path: Path) -> None:
    family = teacher_of()
    assert not is_saved(tmp_path)
    family.save(tmp_path / "model")
    assert is_saved(tmp_path / "model")
    for name in WEIGHTS_FILES:
        (tmp_path / name).touch()
        assert is_saved(tmp_path)
        (tmp_path / name).unlink()


def test_what_a_model_folder_says_of_its_size_leaves_the_fingerprint_alone(tmp_path: Path) -> None:
    family = teacher_of()
    family.save(tmp_path)
    again = CodecLM.load(tmp_path, device="cpu", dtype=torch.float32)
    assert again.fingerprint() == family.fingerprint()
    assert again.architecture() == family.architecture()
