"""Heads that a loss applies: the same loss and gradients, and never the logits of a whole batch."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from stages import losses
from stages.distributed import Place
from stages.families.codec_lm import CodecLM
from stages.family import LinearOutput
from stages.loss_config import LossConfig
from stages.losses import distillation_loss
from stages.targets import RestoredTarget
from stages.train import Networks, TargetLearner
from store import PredictionStore
from tests.conftest import START
from tests.stored_targets import B, C, Scene, T, V, scene
from tests.test_losses import (
    CATEGORICAL,
    CODES,
    EVERYTHING,
    LENGTHS,
    Asked,
    Largest,
    poisoned,
    weights_of,
)
from tests.test_train import HERE, LOCAL, config_of, family_of, store_of

Tensor = torch.Tensor
D = 7
FORMS = {"shared": [(C, 1)], "own": [(C, C)], "two": [(1, 1), (1, 1)]}
"""Streams and states of each group."""


def heads_of(
    form: str, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[LinearOutput]:
    """Leaves that require gradients; the width of states differs from group to group."""
    random, heads = torch.Generator().manual_seed(3), []
    for number, (streams, states) in enumerate(FORMS[form]):
        width = D + number
        shapes = [(B, T, states, width), (streams, V, width), (streams, V)]
        parts = [
            torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in shapes
        ]
        heads.append(LinearOutput(parts[0], parts[1], parts[2] if bias else None))
    return heads


def leaves(heads: list[LinearOutput]) -> list[Tensor]:
    parts = [part for head in heads for part in (head.states, head.weight, head.bias)]
    return [part for part in parts if part is not None]


def of_logits(heads: list[LinearOutput]) -> Tensor:
    """All logits by their definition, in the type of the leaves."""
    parts = []
    for head in heads:
        states = head.states.expand(B, T, len(head.weight), -1)
        logits = torch.einsum("btcd,cvd->btcv", states, head.weight)
        parts.append(logits if head.bias is None else logits + head.bias)
    return torch.cat(parts, 2)


def computed(heads, made: Scene, config: LossConfig, whole: bool = False, **changes):
    """Loss, terms, and the gradients of all leaves."""
    given = {"target": made.target(), "weights": weights_of(), "values": None, "codes": CODES}
    given |= changes
    target: RestoredTarget = given["target"]
    for leaf in leaves(heads):
        leaf.grad = None
    loss, terms = distillation_loss(
        of_logits(heads) if whole else heads, target, given["codes"], given["weights"],
        made.forbidden, config, given["values"],
    )  # fmt: skip
    (loss / 3).backward()
    return loss.detach(), terms, [leaf.grad.clone() for leaf in leaves(heads)]


def assert_equal(ours, theirs, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=tolerance, atol=0, msg=name)
    for one, two in zip(ours[2], theirs[2], strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("values", [None, 1, 3 * C * V], ids=["whole", "one", "three"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CATEGORICAL)
def test_loss_and_gradients_are_those_of_logits_that_autograd_made(kind, form, values):
    made, heads = scene(kind), heads_of(form)
    expected = computed(heads, made, EVERYTHING[kind], whole=True)
    assert_equal(computed(heads, made, EVERYTHING[kind], values=values), expected)


def test_a_head_without_a_bias_is_one_whose_bias_is_nothing():
    made, heads = scene("top_k"), heads_of("two", bias=False)
    expected = computed(heads, made, EVERYTHING["top_k"], whole=True)
    found = computed(heads, made, EVERYTHING["top_k"])
    assert len(found[2]) == 4
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_nan_beyond_the_end_reaches_no_gradient(kind):
    made, heads = scene(kind), heads_of("own")
    expected = computed(heads, made, EVERYTHING[kind])
    beyond = torch.arange(T) >= LENGTHS.unsqueeze(1)
    codes = CODES.clone()
    codes[beyond] = 2**40
    with torch.no_grad():
        heads[0].states[beyond] = torch.nan
    bad = poisoned(made, LENGTHS).target()
    found = computed(heads, made, EVERYTHING[kind], target=bad, codes=codes)
    assert torch.equal(found[0], expected[0])
    for one, two in zip(found[2], expected[2], strict=True):
        assert torch.equal(one, two)


def test_streams_of_a_smaller_vocabulary_have_rows_of_the_head_that_mean_nothing():
    made, heads = scene("full"), heads_of("two")
    streams = list(made.manifest.streams)
    streams[1] = streams[1].model_copy(update={"vocabulary": V - 4})
    manifest = made.manifest.model_copy(update={"streams": tuple(streams)})
    logits = made.arrays["logits"].copy()
    logits[:, :, 1, V - 4 :] = -np.inf
    short = Scene(manifest, {"logits": logits}, {}, made.logits)
    config = LossConfig(kl=1.0, reverse_kl=1.0, nrmse=1.0, ce=0.5)
    codes = CODES.clamp_max(V - 5)
    expected = computed(heads, short, config, whole=True, codes=codes)
    found = computed(heads, short, config, codes=codes)
    assert_equal(found, expected)
    assert (found[2][4][0, V - 4 :] == 0).all()


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_neither_all_logits_nor_their_gradient_are_ever_made(kind):
    made, heads = scene(kind), heads_of("two")
    target = made.target()
    with Largest(B * T * C * V // 2) as largest:
        loss, _ = distillation_loss(
            heads, target, CODES, weights_of(), made.forbidden, EVERYTHING[kind], C * V
        )
        loss.backward()
    assert largest.found == []
    with Largest(B * T * C * V // 2) as largest:
        distillation_loss(
            of_logits(heads), target, CODES, weights_of(), made.forbidden, EVERYTHING[kind], C * V
        )[0].backward()
    assert largest.found != [], "else nothing would be shown"


def test_a_group_that_weighs_nothing_is_not_even_multiplied():
    made, heads = scene("top_k"), heads_of("two")
    weights = weights_of(streams=(1.0, 0.0))
    expected = computed(heads, made, EVERYTHING["top_k"], weights=weights)
    with torch.no_grad():
        heads[1].weight.fill_(torch.nan)
        heads[1].states.fill_(torch.nan)
    found = computed(heads, made, EVERYTHING["top_k"], weights=weights)
    assert torch.equal(found[0], expected[0])
    for one, two in zip(found[2], expected[2], strict=True):
        assert torch.equal(one, two)
    assert all((gradient == 0).all() for gradient in found[2][3:])


def test_the_device_is_asked_as_often_for_many_blocks_as_for_one():
    made, heads, times = scene("top_k"), heads_of("two"), []
    for values in (1, 2**20):
        with torch.no_grad(), Asked() as asked:
            distillation_loss(
                heads, made.target(), CODES, weights_of(), made.forbidden, EVERYTHING["top_k"],
                values,
            )  # fmt: skip
        times.append(asked.times)
    assert times[0] == times[1], "which also shows that no gradient was computed"


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    made, heads = scene("top_k"), heads_of("two")
    expected = computed(heads, made, EVERYTHING["top_k"])
    still = [replace(head, **{frozen: getattr(head, frozen).detach()}) for head in heads]
    loss, _ = distillation_loss(
        still, made.target(), CODES, weights_of(), made.forbidden, EVERYTHING["top_k"]
    )
    for leaf in leaves(heads):
        leaf.grad = None
    (loss / 3).backward()
    names = ["states", "weight", "bias"] * 2
    for name, leaf, gradient in zip(names, leaves(heads), expected[2], strict=True):
        assert (leaf.grad is None) if name == frozen else torch.equal(leaf.grad, gradient)


def test_without_gradients_the_same_loss_is_computed():
    made, heads = scene("hidden"), heads_of("own")
    expected, _, _ = computed(heads, made, EVERYTHING["hidden"])
    with torch.inference_mode():
        loss, _ = distillation_loss(
            heads, made.target(), CODES, weights_of(), made.forbidden, EVERYTHING["hidden"]
        )
    assert loss == expected


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape to another type."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.times = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16
        self.times += cast and args[0].shape == self.shape
        return made


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_heads_multiply_in_bf16_and_their_gradients_add_up_in_fp32(form):
    made, heads, config = scene("top_k"), heads_of(form), EVERYTHING["top_k"]
    exact = computed(heads, made, config)
    with torch.autocast("cpu", torch.bfloat16):
        whole = computed(heads, made, config, whole=True)
        with Casts(heads[0].weight.shape) as casts:
            found = computed(heads, made, config, values=C * V)
    alike = sum(head.weight.shape == heads[0].weight.shape for head in heads)
    assert casts.times == alike, "once per head, and not for every block"
    torch.testing.assert_close(found[0], whole[0], rtol=1e-3, atol=0)
    assert found[0] != exact[0]
    for ours, theirs, true in zip(found[2], whole[2], exact[2], strict=True):
        assert ours.dtype == torch.float32
        size = float(true.abs().max())
        torch.testing.assert_close(ours, theirs, atol=0.01 * size, rtol=0)


def test_under_autocast_a_small_gradient_is_not_lost_beside_a_large_one():
    # Added up in bf16, what is below 2^-9 of the sum so far would vanish.
    made, heads, config = scene("top_k"), heads_of("own"), EVERYTHING["top_k"]
    small = weights_of(rollout=(0.0, 0.1, 0.5))
    large = weights_of(rollout=(1e4, 0.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        both, one, other = (
            computed(heads, made, config, weights=weights, values=C * V)[2][1]
            for weights in (small + large, large, small)
        )
    assert (one.abs().max() / other.abs().max()) > 2**12
    torch.testing.assert_close(both - one, other, atol=0.02 * float(other.abs().max()), rtol=0)


def test_heads_in_half_precision_get_gradients_of_their_own_type():
    made, heads = scene("top_k"), heads_of("two", dtype=torch.bfloat16)
    _, _, found = computed(heads, made, EVERYTHING["top_k"])
    assert {gradient.dtype for gradient in found} == {torch.bfloat16}


# What trains and what scores.

WIDTHS = {"d_model": 20, "local_transformer": {"d_model": 12, "layers": 1, "heads": 2}}
"""None of which is a number of ids, so that logits are known by their shape."""


class LogitsMade(TorchDispatchMode):
    """Collects the tensors that may be logits, or their gradient, of at least some size."""

    def __init__(self, streams: int, vocabulary: int, numel: int) -> None:
        super().__init__()
        self.last = {vocabulary, streams * vocabulary, streams // 2 * vocabulary}
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        large = isinstance(made, torch.Tensor) and made.numel() >= self.numel
        if large and made.dim() > 1 and made.shape[-1] in self.last:
            self.found.append((str(func), tuple(made.shape)))
        return made


def test_training_never_holds_the_logits_of_a_batch(tmp_path, monkeypatch):
    store = store_of(tmp_path / "store", "top_k", LOCAL | WIDTHS)
    monkeypatch.setitem(losses.HEADED_BLOCK_VALUES, "cpu", 1)
    student = family_of(1, LOCAL | WIDTHS)
    learner = TargetLearner(student, store, config_of({"kl": 1.0}, LOCAL | WIDTHS), 0, HERE)
    (batch,) = learner.batches(0)
    of_group = 2 * 16 * len(batch.lengths) * max(batch.lengths)
    with LogitsMade(4, 16, of_group) as made:
        learner.objective(0, batch).total.backward()
    learner.close()
    assert made.found == []
    assert all(parameter.grad is not None for parameter in student.module.parameters())


@pytest.mark.parametrize("kind", ["hidden", "hidden_both", "top_k", "full_both"])
def test_scoring_never_holds_the_logits_of_a_batch_and_states_need_none(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setattr("stages.rollout.SCORED_TIMESTEPS", 2)
    shortest_batch = 2 * 16 * 3 * 8  # its longest rollout, padded to by the two others
    computed_parts = []
    logits_of = LinearOutput.logits
    monkeypatch.setattr(
        LinearOutput, "logits", lambda head: (computed_parts.append(0), logits_of(head))[1]
    )
    with LogitsMade(4, 16, shortest_batch) as large:
        store = store_of(tmp_path / "store", kind, LOCAL | WIDTHS)
    assert [len(store[key].codes) for key in store] == [6, 7, 9, 4, 5, 8]
    assert large.found == []
    assert (computed_parts == []) == kind.startswith("hidden")


STARTING = {"kl": 1.0, "local_start_step": 1}


def gradients(
    learner: TargetLearner, networks: Networks, student: CodecLM, place: Place, step: int
) -> dict:
    """Gradient of the mean loss of the first global batch, by parameter."""
    batches = learner.batches(0)
    (weight,) = place.totals(sum(batch.weight for batch in batches))
    student.module.zero_grad()
    networks.at(step)
    for batch in batches:
        (learner.objective(step, batch).total * (place.world_size / weight)).backward()
    parameters = student.module.named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def work(rank: int, folder: Path) -> None:
    """One of two data-parallel processes; writes its gradients of three steps."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    place, student = Place(rank, 2, torch.device("cpu")), family_of(1, LOCAL)
    store, config = PredictionStore.open(folder / "store"), config_of(STARTING, LOCAL)
    networks = Networks(student, config, place)
    learner = TargetLearner(student, store, config, 0, place)
    for step in (0, 1, 2):
        found = gradients(learner, networks, student, place, step)
        save_file(found, folder / f"{rank}-{step}.safetensors")
    learner.close()
    dist.destroy_process_group()


def test_processes_share_the_gradients_of_heads_that_lie_outside_of_their_network(tmp_path):
    # At step 0 the local transformer is left alone, and no process may wait for its gradients.
    store = store_of(tmp_path / "store", "top_k", LOCAL)
    start = multiprocessing.get_context(START)
    workers = [start.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    student, config = family_of(1, LOCAL), config_of(STARTING, LOCAL)
    networks = Networks(student, config, HERE)
    learner = TargetLearner(student, store, config, 0, HERE)
    for step in (0, 1, 2):
        expected = gradients(learner, networks, student, HERE, step)
        assert ("local.heads" in expected) == (step > 0)
        for rank in range(2):
            found = load_file(tmp_path / f"{rank}-{step}.safetensors")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    learner.close()
