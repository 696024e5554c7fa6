"""The mixture of experts: dispatch, routing and its losses."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from stages.model_config import ExpertsConfig
from stages.modules.feed_forward import Experts, Routing, dispatch, load_balance, sinkhorn


def experts_of(**changes) -> Experts:
    layer = Experts(8, 16, ExpertsConfig.model_validate({"experts": 4, "active": 2} | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def test_dispatch_equals_visiting_the_experts_one_position_at_a_time():
    layer = experts_of()
    x = torch.randn(9, 8)
    logits = layer.router(x)
    chosen = logits.topk(2, -1).indices
    gates = logits.softmax(-1).gather(-1, chosen)
    expected = torch.stack(
        [
            sum(
                gates[i, a] * (F.gelu(x[i] @ layer.up[e]) @ layer.down[e])
                for a, e in enumerate(chosen[i].tolist())
            )
            for i in range(9)
        ]
    )
    answer = dispatch(x, gates, chosen, layer.up, layer.down)
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


def test_the_grouped_product_has_the_gradients_of_a_loop():
    from stages.modules.grouped_matmul import grouped_matmul

    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: grouped_matmul(a, b, ends), (x, weights))
    expected = torch.cat([x[:2] @ weights[0], x[2:] @ weights[2]])
    torch.testing.assert_close(grouped_matmul(x, weights, ends), expected)


def test_bfloat16_training_is_close_to_float32():
    layer, x = experts_of(), torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    exact, _ = layer(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = layer(x, None)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.3, rtol=0.05)
    rounded.float().square().sum().backward()
    assert layer.up.grad.isfinite().all()


def test_an_expert_without_positions_still_has_a_gradient():
    layer = experts_of()
    x = torch.randn(5, 8)
    chosen, gates = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    dispatch(x, gates, chosen, layer.up, layer.down).square().sum().backward()
    assert layer.up.grad[0].abs().sum() > 0
    assert torch.equal(layer.up.grad[1:], torch.zeros_like(layer.up.grad[1:]))


def test_padding_changes_neither_the_losses_nor_the_routing_of_valid_positions():
    layer = experts_of(routing="sinkhorn", balance_weight=0.0).train()
    x = torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    changed = x.clone()
    changed[~valid] = 50.0
    first, second = layer(x, valid), layer(changed, valid)
    torch.testing.assert_close(first[0][valid], second[0][valid])
    torch.testing.assert_close(first[1], second[1])
    balanced = experts_of()
    torch.testing.assert_close(balanced(x, valid)[1], balanced(changed, valid)[1])


def test_load_balance_is_one_when_even_and_grows_with_imbalance():
    even = 20.0 * torch.eye(4).repeat(3, 1)
    weights, total = torch.ones(12), torch.tensor(12.0)
    chosen = even.argmax(-1, keepdim=True)
    torch.testing.assert_close(load_balance(even, chosen, weights, total), torch.tensor(1.0))
    skewed = torch.zeros(12, 4)
    skewed[:, 0] = 20.0
    worst = load_balance(skewed, skewed.argmax(-1, keepdim=True), weights, total)
    torch.testing.assert_close(worst, torch.tensor(4.0))


def test_sinkhorn_spreads_positions_that_all_prefer_one_expert():
    generator = torch.Generator().manual_seed(0)
    logits = 0.5 * torch.randn(64, 4, generator=generator)
    logits[:, 0] += 3.0
    valid = torch.ones(64, dtype=torch.bool)
    assert (logits.argmax(-1) == 0).sum() > 55
    assert F.one_hot(sinkhorn(logits, valid).argmax(-1), 4).sum(0).max() < 30


def test_sinkhorn_routes_in_training_only():
    layer = experts_of(routing="sinkhorn", balance_weight=0.0)
    x = torch.randn(40, 8)
    plain = experts_of().eval()
    torch.testing.assert_close(layer.eval()(x, None)[0], plain(x, None)[0])
    assert not torch.allclose(layer.train()(x, None)[0], plain(x, None)[0])


def test_what_is_reported_of_the_experts_is_counted_over_valid_positions():
    layer, x = experts_of(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)) + 1
    valid = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    _, routing = layer(x, valid)
    visits, entropies = [0] * 4, []
    for position in x[valid]:
        probabilities = (layer.router.weight @ position).softmax(-1).tolist()
        entropies.append(-sum(p * math.log(p) for p in probabilities))
        for expert in sorted(range(4), key=probabilities.__getitem__)[-2:]:
            visits[expert] += 1
    assert float(routing.least) == pytest.approx(min(visits) / 16)
    assert float(routing.most) == pytest.approx(max(visits) / 16)
    assert min(visits) < max(visits)
    assert float(routing.entropy) == pytest.approx(sum(entropies) / 8, rel=1e-5)
    assert routing.loss.requires_grad
    assert not any(x.requires_grad for x in (routing.least, routing.most, routing.entropy))


def test_layers_add_up_their_losses_and_share_what_is_reported():
    layers = [
        Routing(*torch.tensor(values)) for values in ([0.3, 0.1, 0.4, 1.0], [0.1, 0.2, 0.6, 0.5])
    ]
    assert [float(x) for x in Routing.of_layers(layers)] == pytest.approx([0.4, 0.15, 0.5, 0.75])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"active": 5}, "active=5"),
        ({"routing": "sinkhorn", "balance_weight": 0.01}, "balance_weight=0.01"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        ExpertsConfig.model_validate({"experts": 4, "active": 2} | changes)
