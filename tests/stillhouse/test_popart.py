"""PopArt: statistics worked by hand, and outputs that they do not change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillhouse.popart import PopArt


def head(dtype: torch.dtype = torch.float64, features: int = 3, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(features, 1, dtype=dtype)


def test_the_paper_step_by_step() -> None:
    """After the first batch, a target at a time is the papers' moving averages of G and G^2, debiased."""
    generator = np.random.default_rng(0)
    popart = PopArt(head(), beta=0.1)
    mu = nu = 0.0
    for count, target in enumerate(generator.normal(5, 2, 40), start=1):
        popart.update(torch.tensor([target]))
        mu, nu = 0.9 * mu + 0.1 * target, 0.9 * nu + 0.1 * target**2
        seen = 1 - 0.9**count
        assert popart.mu == pytest.approx(mu / seen)
        assert popart.variance == pytest.approx(nu / seen - (mu / seen) ** 2, abs=1e-9)
    # Once the weights sum to 1 nearly: mu' = 0.9 mu + 0.1 G, and so for nu.
    popart.set_state({"mu": 2.0, "variance": 5.0, "weight": 1.0})
    popart.update(torch.tensor([7.0]))
    assert popart.mu == pytest.approx(2.5)
    assert popart.variance == pytest.approx(0.9 * 9 + 0.1 * 49 - 2.5**2)


def test_a_batch_is_one_step_of_its_targets_weight() -> None:
    popart = PopArt(head(), beta=0.1)
    popart.update(torch.tensor([1.0, 2.0, 6.0]))
    assert popart.mu == pytest.approx(3) and popart.variance == pytest.approx(14 / 3)
    popart.set_state({"mu": 3.0, "variance": 4.0, "weight": 1.0})
    popart.update(torch.tensor([1.0, 5.0]))
    kept = 0.9**2
    assert popart.mu == pytest.approx(3.0)
    assert popart.variance == pytest.approx(kept * (4 + 9) + (1 - kept) * 13 - 9)
    before = popart.get_state()
    popart.update(torch.empty(0))
    assert popart.get_state() == before


def test_sigma_stays_within_its_bounds() -> None:
    popart = PopArt(head(), sigma_min=0.5, sigma_max=20.0)
    popart.update(torch.full((100,), 7.0))
    assert popart.variance == 0 and popart.sigma == 0.5
    popart = PopArt(head(), sigma_min=0.5, sigma_max=20.0)
    popart.update(torch.tensor([-1000.0, 1000.0]))
    assert popart.sigma == 20
    features = torch.ones(1, 3, dtype=torch.float64)
    assert popart.unnormalise(popart.head(features)).item() == pytest.approx(head()(features).item())


def test_no_rate_is_an_ordinary_head() -> None:
    popart, plain = PopArt(head(torch.float32), beta=0.0), head(torch.float32)
    popart.update(torch.tensor([100.0, 200.0]))
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(popart.unnormalise(popart.head(features)), plain(features))
    assert torch.equal(popart.normalise(features), features)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scales=st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=6),
    offset=st.floats(-1e3, 1e3),
)
def test_outputs_are_what_they_were(
    dtype: torch.dtype, tolerance: float, seed: int, scales: list[float], offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    popart = PopArt(head(dtype, 16, seed), beta=1e-2)
    features = torch.randn(64, 16, generator=generator, dtype=dtype)
    for scale in scales:
        before = popart.unnormalise(popart.head(features))
        mu, sigma = popart.mu, popart.sigma
        popart.update(scale * (torch.randn(50, generator=generator, dtype=dtype) + offset))
        after = popart.unnormalise(popart.head(features))
        assert (popart.mu, popart.sigma) != (mu, sigma)
        # Of the numbers that the value is the sum of: of 1e5 - 1e5 + 1 float32 keeps two digits, whoever adds.
        size = max(before.abs().max().item(), abs(mu), abs(popart.mu), sigma)
        assert (after - before).abs().max().item() <= tolerance * size


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_output_of_a_step_by_the_default_rate_is_what_it_was(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    popart = PopArt(head(dtype, 16))
    features = torch.rand(256, 16, generator=generator, dtype=dtype)
    popart.update(torch.randn(256, generator=generator, dtype=dtype) * 5 + 30)
    with torch.no_grad():
        popart.head.bias.add_(5)
    for scale in (1.0, 2.0, 100.0, 0.01):
        before = popart.unnormalise(popart.head(features))
        popart.update(scale * (torch.randn(256, generator=generator, dtype=dtype) + 30))
        torch.testing.assert_close(
            popart.unnormalise(popart.head(features)), before, rtol=tolerance, atol=0.0
        )


def test_a_small_spread_on_a_large_mean_is_found() -> None:
    """nu - mu^2 would be 1e16 - 1e16, of which float64 keeps nothing."""
    popart = PopArt(head(), beta=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        popart.update(1e8 + 0.5 * torch.randn(100, generator=generator, dtype=torch.float64))
    assert popart.sigma == pytest.approx(0.5, rel=0.05)


def test_the_state_goes_on_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = PopArt(head()), PopArt(head())
    batches = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    for batch in batches[:3]:
        first.update(batch)
    second.head.load_state_dict(first.head.state_dict())
    second.set_state(json.loads(json.dumps(first.get_state())))
    for popart in (first, second):
        for batch in batches[3:]:
            popart.update(batch)
    assert first.get_state() == second.get_state()
    assert torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(first.head.bias, second.head.bias)
