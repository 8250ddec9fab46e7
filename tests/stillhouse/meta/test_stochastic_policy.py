"""Distributions by hand and against torch's own; the network that is exported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from stillhouse.checkpoint import load_checkpoint, save_checkpoint
from stillhouse.envs.navigation import Navigation
from stillhouse.envs.physics import AcrobotFamily, CartPoleFamily
from stillhouse.errors import StillhouseError
from stillhouse.meta.stochastic_policy import StochasticPolicy

DISCRETE = StochasticPolicy(AcrobotFamily(), (5, 4))
CONTINUOUS = StochasticPolicy(Navigation(), (5, 4))


def normal(distribution: torch.Tensor) -> Independent:
    mean, log_std = distribution.chunk(2, dim=-1)
    return Independent(Normal(mean, log_std.exp()), 1)


def test_a_gaussian_by_hand() -> None:
    distribution = torch.tensor([[[0.0, 1.0, 0.0, math.log(2.0)]]])
    actions = torch.tensor([[[1.0, 3.0]]])
    expected = -0.5 - 0.5 * math.log(2 * math.pi) - 0.5 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert float(CONTINUOUS.log_probability(distribution, actions)) == pytest.approx(expected)


def test_distributions_against_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 7, 4, generator=generator) for _ in range(2))
    actions = torch.randn(2, 7, 2, generator=generator)
    torch.testing.assert_close(CONTINUOUS.log_probability(first, actions), normal(first).log_prob(actions))
    torch.testing.assert_close(
        CONTINUOUS.divergence(first, second), kl_divergence(normal(first), normal(second))
    )
    torch.testing.assert_close(CONTINUOUS.entropy(first), normal(first).entropy())
    first, second = (torch.randn(2, 7, 3, generator=generator).log_softmax(-1) for _ in range(2))
    chosen = torch.randint(3, (2, 7), generator=generator)
    torch.testing.assert_close(
        DISCRETE.log_probability(first, chosen), Categorical(logits=first).log_prob(chosen)
    )
    torch.testing.assert_close(
        DISCRETE.divergence(first, second),
        kl_divergence(Categorical(logits=first), Categorical(logits=second)),
    )
    torch.testing.assert_close(DISCRETE.entropy(first), Categorical(logits=first).entropy())


@pytest.mark.parametrize("policy", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_the_fisher_information_is_the_divergences_hessian(policy: StochasticPolicy) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = 3 if policy.family.discrete else 4
    raw, tangent = (torch.randn(wide, generator=generator, dtype=torch.float64) for _ in range(2))

    def distribution(values: torch.Tensor) -> torch.Tensor:
        return values.log_softmax(-1) if policy.family.discrete else values

    at, along = torch.func.jvp(distribution, (raw,), (tangent,))
    hessian = torch.func.hessian(lambda v: policy.divergence(at.detach(), distribution(v)))(raw)
    torch.testing.assert_close(along @ policy.fisher(at, along), tangent @ hessian @ tangent)


def test_samples_have_the_probabilities_and_moments_they_should() -> None:
    random = np.random.default_rng(0)
    probabilities = np.array([0.2, 0.5, 0.3])
    drawn = DISCRETE.sample(np.broadcast_to(np.log(probabilities), (1, 20_000, 3)), random)
    np.testing.assert_allclose(np.bincount(drawn[0]) / 20_000, probabilities, atol=0.015)
    wanted = np.array([1.0, -2.0, math.log(0.5), math.log(2.0)], dtype=np.float32)
    actions = CONTINUOUS.sample(np.broadcast_to(wanted, (1, 20_000, 4)), random)[0]
    np.testing.assert_allclose(actions.mean(axis=0), [1, -2], atol=0.06)
    np.testing.assert_allclose(actions.std(axis=0), [0.5, 2], rtol=0.03)


def test_every_row_has_parameters_of_its_own() -> None:
    rows = torch.stack([DISCRETE.initial(seed, 1.0) for seed in range(3)])
    observations = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    together = DISCRETE.distribution(rows, observations)
    assert together.shape == (3, 4, 3)
    for n in range(3):
        alone = DISCRETE.network(rows[n])(observations[n], "acrobot").log_softmax(-1)
        torch.testing.assert_close(together[n], alone)


def test_a_fresh_policy_prefers_hardly_anything_and_depends_on_its_seed_alone() -> None:
    observations = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0))
    found = CONTINUOUS.distribution(CONTINUOUS.initial(0, 0.5)[None], observations)
    assert found[..., :2].abs().max() < 0.02
    torch.testing.assert_close(found[..., 2:], torch.full((1, 9, 2), math.log(0.5)))
    assert torch.equal(CONTINUOUS.initial(3, 1.0), CONTINUOUS.initial(3, 1.0))
    assert not torch.equal(CONTINUOUS.initial(3, 1.0), CONTINUOUS.initial(4, 1.0))


def test_a_discrete_policy_becomes_an_ordinary_checkpoint(tmp_path: object) -> None:
    policy = StochasticPolicy(CartPoleFamily(), (6,))
    parameters = policy.initial(2, 1.0)
    network = policy.network(parameters)
    folder = tmp_path / "network"  # type: ignore[operator]
    save_checkpoint(folder, network, {"environments": {"cartpole": {}}})
    loaded = load_checkpoint(folder).network
    observations = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(observations, "cartpole"), network(observations, "cartpole"))
    with torch.no_grad():
        parameters.zero_()  # the network's weights are a copy
    assert torch.equal(loaded(observations, "cartpole"), network(observations, "cartpole"))


def test_a_policy_of_action_vectors_is_not_exported() -> None:
    with pytest.raises(StillhouseError, match="navigation: its actions are vectors"):
        CONTINUOUS.network(CONTINUOUS.initial(0, 1.0))


def test_parameters_of_another_form_are_refused() -> None:
    with pytest.raises(StillhouseError, match="3 parameters were given, but this policy has"):
        CONTINUOUS.check(np.zeros(3, np.float32))
