"""Conditioned policies: each way by hand, sets without an order, gradients, and the ordinary network that comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillhouse.networks.conditioned import (
    ConditionedPolicy,
    Conditioning,
    SetEncoder,
    as_network,
    outputs,
)

torch.set_num_threads(1)

WAYS: tuple[Conditioning, ...] = ("none", "context", "film", "weights")


def build(way: Conditioning, seed: int = 0, strong: bool = True) -> ConditionedPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = ConditionedPolicy(4, 2, (6, 5), way, transitions=3, encoder_width=7, context=4)
        if strong and way != "none":
            nn.init.normal_(policy.change.weight, std=0.5)
            nn.init.normal_(policy.change.bias, std=0.5)
    return policy


def sets(count: int = 3, rows: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, 3, generator=generator), torch.ones(count, rows, dtype=torch.bool)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_by_hand(way: Conditioning) -> None:
    policy = build(way)
    rows, present = sets()
    observations = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    found = outputs(policy.layers(rows, present), observations)
    assert found.shape == (3, 2, 2)
    for index in range(3):
        hidden = observations[index]
        change = None
        if way != "none":
            change = policy.change(policy.encoder(rows[index : index + 1], present[index : index + 1]))[0]
        place = 0
        for number, layer in enumerate(policy.dense):
            weight, bias = layer.weight, layer.bias  # type: ignore[union-attr]
            if way == "weights":
                assert change is not None
                weight = weight + change[place : place + weight.numel()].view_as(weight)
                place += weight.numel()
                bias = bias + change[place : place + bias.numel()]
                place += bias.numel()
            hidden = hidden @ weight.T + bias
            if way == "context" and number == 0:
                hidden = hidden + change
            if way == "film" and number < 2:
                assert change is not None
                begin, width = (0, 6) if number == 0 else (6, 5)
                scale, shift = change[begin : begin + width], change[11 + begin : 11 + begin + width]
                hidden = (1 + scale) * hidden + shift
            if number < 2:
                hidden = torch.relu(hidden)
        torch.testing.assert_close(found[index], hidden)


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_out_is_an_ordinary_network(way: Conditioning) -> None:
    layers = build(way).layers(*sets())
    observations = torch.randn(9, 4)
    for index in range(3):
        network = as_network(layers, index, "cartpole")
        wanted = outputs(layers, observations.expand(3, 9, 4))[index]
        torch.testing.assert_close(network(observations, "cartpole"), wanted)
        assert network.spec.size.features == 6 and network.spec.size.torso == (5,) and not network.training


@given(seed=st.integers(0, 1000), rows=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_a_set_has_no_order_and_absent_rows_do_not_count(seed: int, rows: int) -> None:
    encoder = SetEncoder(3, 7, 4)
    given, present = sets(2, rows, seed)
    wanted = encoder(given, present)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(encoder(given[:, order], present), wanted, rtol=1e-5, atol=1e-6)
    padded = torch.cat([given, torch.full((2, 3, 3), 99.0)], 1)
    there = torch.cat([present, torch.zeros(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(encoder(padded, there), wanted, rtol=1e-5, atol=1e-6)


def test_an_empty_set_is_a_context_too() -> None:
    encoder = SetEncoder(3, 7, 4)
    empty, present = torch.zeros(1, 0, 3), torch.zeros(1, 0, dtype=torch.bool)
    absent = encoder(torch.randn(1, 5, 3), torch.zeros(1, 5, dtype=torch.bool))
    torch.testing.assert_close(encoder(empty, present), absent)
    assert torch.isfinite(absent).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_set_changes_the_outputs_but_for_none(way: Conditioning) -> None:
    policy = build(way)
    observations = torch.randn(2, 4, 4)[:1].expand(2, 4, 4)
    found = outputs(policy.layers(*sets(2)), observations)
    assert torch.equal(found[0], found[1]) == (way == "none")
    fresh = build(way, strong=False)  # at first all sets have nearly the same policy
    found = outputs(fresh.layers(*sets(2)), observations)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.2)


@pytest.mark.parametrize("way", WAYS[1:])
def test_gradients_reach_the_encoder_and_are_right(way: Conditioning) -> None:
    policy = build(way).double()
    rows, present = sets(2, 3)
    observations = torch.randn(2, 2, 4, dtype=torch.float64)

    def loss(given: torch.Tensor) -> torch.Tensor:
        return outputs(policy.layers(given, present), observations).square().sum()

    given = rows.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (given,), atol=1e-6)
    loss(given).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
