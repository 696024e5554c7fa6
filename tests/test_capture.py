"""Capture: predictions reach the host whole, in order, in few copies and in bounded memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages import capture as module
from stages.capture import Capture, HostArrays
from stages.family import Branch, Branches, Scores
from stages.guidance import guide
from stages.measure import _compare
from stages.paired import Axes
from stages.targets import restore
from store.encoding import array_specs, find_fault
from store.schema import Dense, Full, Manifest, Sampled, Target, TopK
from store.synthetic import synthetic_manifest

CPU = torch.device("cpu")
DTYPES = ("uint8", "int64", "float16", "float32", "uint16", "uint32")


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_arrays_of_all_types_and_shapes_travel_in_one_buffer(specs):
    random = np.random.default_rng(0)
    sent = {
        str(place): random.integers(0, 200, shape).astype(dtype)
        for place, (dtype, shape) in enumerate(specs)
    }
    carried = HostArrays.of({name: torch.from_numpy(array) for name, array in sent.items()})
    assert carried.packed.numel() == sum(array.nbytes for array in sent.values())
    found = carried.arrays()
    assert found.keys() == sent.keys()
    for name, array in found.items():
        assert array.dtype == sent[name].dtype
        assert array.flags.aligned
        np.testing.assert_array_equal(array, sent[name])


def test_transposed_predictions_arrive_in_their_own_order():
    sent = torch.arange(24).reshape(2, 3, 4).transpose(0, 2)
    (found,) = HostArrays.of({"x": sent}).arrays().values()
    np.testing.assert_array_equal(found, sent.numpy())


def steps_of(manifest: Manifest, lengths: list[int]) -> list[tuple]:
    """What a family yields for rollouts of these lengths, rows in an order that changes."""
    generator = torch.Generator().manual_seed(0)
    streams, size = len(manifest.streams), min(manifest.vocabularies)
    values = manifest.streams[0].shape if isinstance(manifest.target, Dense) else (V,)
    steps = []
    for timestep in range(max(lengths)):
        rows = torch.tensor([row for row, length in enumerate(lengths) if length > timestep])
        rows = rows[torch.randperm(len(rows), generator=generator)]
        codes = torch.randint(0, max(size - 2, 1), (len(rows), streams), generator=generator)
        cond, uncond = 3 * torch.randn(2, len(rows), streams, *values, generator=generator)
        branches = Branches(Branch(cond.split(1, 1)), Branch((uncond,)))
        steps.append((rows, timestep, codes, guide(cond, uncond, 2.5), branches))
    return steps


LENGTHS = [3, 7, 1, 5]
KEYS = [(f"sample {row}", row % 2) for row in range(4)]
V = 34
TARGETS = [
    TopK(k=5, tail_samples=3, moments=True), Full(dtype="float32", levels=True), Sampled(draws=7),
]  # fmt: skip
BRANCHED = [Full(branches="both"), Dense(dtype="float32")]
DENSE = [Dense(branches="guided", dtype="float32"), Dense(dtype="float32")]


def name_of(target: Target) -> str:
    return f"{target.kind}-{getattr(target, 'branches', 'guided')}"


def captured(
    manifest: Manifest, steps: list[tuple], device: torch.device = CPU
) -> list[dict[str, np.ndarray]]:
    capture = Capture(manifest, KEYS, device)
    for step in steps:
        capture.add(*step)
    return capture.finish()()


@pytest.mark.parametrize("values", [1, 200, 10**9], ids=["each step", "some steps", "all"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_every_rollout_gets_its_own_timesteps_in_order(monkeypatch, target, values):
    monkeypatch.setattr(module, "CPU_BLOCK_VALUES", values)
    manifest = synthetic_manifest(target)
    steps = steps_of(manifest, LENGTHS)
    rollouts = captured(manifest, steps)
    assert [len(arrays["codes"]) for arrays in rollouts] == LENGTHS
    for row, arrays in enumerate(rollouts):
        assert find_fault(manifest, arrays) is None
        assert arrays.keys() == array_specs(manifest).keys()
        for timestep in range(LENGTHS[row]):
            rows, _, codes, logits, _ = steps[timestep]
            (place,) = torch.nonzero(rows == row)[:, 0].tolist()
            assert arrays["codes"][timestep].tolist() == codes[place].tolist()
            if target.kind == "full":
                stored = torch.from_numpy(arrays["full.logits"][timestep]).softmax(-1)
                allowed = logits[place].clone()
                allowed[:, list(manifest.forbidden)] = -torch.inf
                torch.testing.assert_close(stored, allowed.softmax(-1))


@pytest.mark.parametrize("values", [1, 200, 10**9], ids=["each step", "some steps", "all"])
@pytest.mark.parametrize("target", DENSE, ids=name_of)
def test_every_rollout_gets_its_own_continuous_predictions_and_no_codes(
    monkeypatch, target, values
):
    monkeypatch.setattr(module, "CPU_BLOCK_VALUES", values)
    manifest = synthetic_manifest(target)
    steps = steps_of(manifest, LENGTHS)
    for row, arrays in enumerate(captured(manifest, steps)):
        assert find_fault(manifest, arrays) is None
        for timestep in range(LENGTHS[row]):
            rows, _, _, guided, branches = steps[timestep]
            (place,) = torch.nonzero(rows == row)[:, 0].tolist()
            cond = torch.cat(branches.cond.logits, 1)[place]
            delta = cond - branches.uncond.logits[0][place]
            expected = {"dense.guided": guided[place]}
            if target.branches == "both":
                expected = {"dense.cond": cond, "dense.delta": delta}
            assert arrays.keys() == expected.keys()
            for name, prediction in expected.items():
                np.testing.assert_array_equal(arrays[name][timestep], prediction)


def with_vocabularies(manifest: Manifest, *sizes: int) -> Manifest:
    streams = [
        stream.model_copy(update={"vocabulary": size})
        for stream, size in zip(manifest.streams, sizes, strict=True)
    ]
    return Manifest.model_validate(manifest.model_dump() | {"streams": streams})


@pytest.mark.parametrize("padding", [0.0, 60.0, torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("target", [*TARGETS, Full(branches="both")], ids=name_of)
def test_streams_of_different_vocabularies_are_stored_whatever_stands_beyond_them(target, padding):
    manifest = with_vocabularies(synthetic_manifest(target, vocabulary=V), V, 12)
    clean, steps = (steps_of(manifest, LENGTHS) for _ in range(2))
    for _, _, _, logits, branches in steps:
        for x in (logits, branches.cond.logits[1], branches.uncond.logits[0]):
            x[:, -1, 12:] = padding
    expected = captured(manifest, clean)
    for arrays, plain in zip(captured(manifest, steps), expected, strict=True):
        assert find_fault(manifest, arrays) is None
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, plain[name])


@pytest.mark.parametrize("padding", [0.0, 60.0])
def test_a_system_is_measured_within_the_vocabulary_of_every_stream(padding):
    manifest = with_vocabularies(synthetic_manifest(Full(dtype="float32"), vocabulary=V), V, 12)
    steps = [step for step in steps_of(manifest, LENGTHS) if 1 in step[0]]
    (arrays,) = captured(manifest, [(r[r == 1], t, *(x[r == 1] for x in (c, z)), None)
                                    for r, t, c, z, _ in steps])  # fmt: skip
    target = restore({"logits": arrays["full.logits"][None]}, manifest, None, "cpu")
    lengths = torch.tensor([len(arrays["codes"])])
    codes = torch.zeros(1, len(arrays["codes"]), 2, dtype=torch.int64)
    predicted = torch.ones_like(codes, dtype=torch.bool)
    batch = SimpleNamespace(
        samples=[], codes=codes, lengths=lengths, target=target, predicted=predicted
    )
    logits = torch.from_numpy(arrays["full.logits"][None].copy())
    logits[..., manifest.forbidden] = logits[:, :, 1, 12:] = padding
    family = SimpleNamespace(
        heads=(), streams=manifest.streams, score=lambda *_, **__: Scores(logits)
    )
    axes = Axes(LENGTHS[1], tuple(stream.name for stream in manifest.streams))
    (found,) = _compare(family, 1.0, SimpleNamespace(manifest=manifest), axes, batch)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.agreed == found.predictions == 2 * LENGTHS[1]


def test_the_short_stream_is_reduced_as_a_store_of_its_own_would_be():
    target = TopK(k=5, tail_samples=3, moments=True, dtype="float32")
    plain = synthetic_manifest(target, vocabulary=V).model_copy(update={"end_id": None})
    both = with_vocabularies(plain.model_copy(update={"forbidden": (4,)}), V, 12)
    alone = both.model_copy(update={"streams": both.streams[1:]})
    steps = steps_of(both, LENGTHS)
    cut = [(r, t, codes[:, 1:], x[:, 1:, :12], None) for r, t, codes, x, _ in steps]
    for ours, theirs in zip(captured(both, steps), captured(alone, cut), strict=True):
        for name in ("top_k.ids", "top_k.logits", "top_k.tail_logmass", "top_k.moments"):
            np.testing.assert_allclose(ours[name][:, 1:], theirs[name], atol=1e-6)


@pytest.mark.parametrize("target", [*TARGETS, *BRANCHED], ids=name_of)
def test_blocks_of_any_size_hold_the_same_bytes(monkeypatch, target):
    manifest, seen = synthetic_manifest(target), set()
    for values in (1, 150, 400, 10**9):
        monkeypatch.setattr(module, "CPU_BLOCK_VALUES", values)
        rollouts = captured(manifest, steps_of(manifest, LENGTHS))
        seen.add(b"".join(a[name].tobytes() for a in rollouts for name in sorted(a)))
    assert len(seen) == 1


def test_predictions_are_reduced_as_soon_as_a_block_is_full(monkeypatch):
    manifest, blocks, reduce = synthetic_manifest(Sampled()), [], module._reduce
    per_row = len(manifest.streams) * manifest.vocabulary
    monkeypatch.setattr(module, "CPU_BLOCK_VALUES", 6 * per_row)

    def spy(manifest, seeds, waiting):
        blocks.append(sum(len(part.rows) for part in waiting))
        return reduce(manifest, seeds, waiting)

    monkeypatch.setattr(module, "_reduce", spy)
    captured(manifest, steps_of(manifest, [8, 8, 8, 8]))
    # Four rows per timestep: two timesteps are the first to exceed six rows.
    assert blocks == [8, 8, 8, 8]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("values", [1, 10**9])
def test_one_logit_that_is_not_finite_refuses_the_batch(monkeypatch, values, bad):
    monkeypatch.setattr(module, "CPU_BLOCK_VALUES", values)
    manifest = synthetic_manifest(TopK(k=4))
    steps = steps_of(manifest, LENGTHS)
    steps[4][3][0, 1, 7] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        captured(manifest, steps)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_an_accelerator_reduces_to_the_same_and_is_never_waited_for(target):
    manifest, device = synthetic_manifest(target), torch.device("cuda")
    steps = steps_of(manifest, LENGTHS)
    expected = captured(manifest, steps)
    moved = [tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in s) for s in steps]
    captured(manifest, moved, device)  # ids that are masked are copied there once per process
    capture = Capture(manifest, KEYS, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in moved:
            capture.add(*step)
        collect = capture.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(expected, collect(), strict=True):
        for name, array in ours.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(theirs[name], array, rtol=2e-3, atol=2e-3)
            else:
                assert (theirs[name] == array).mean() > 0.99
