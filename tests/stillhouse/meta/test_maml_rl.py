"""MAML with policy gradients: derivatives against finite differences and explicit Hessians, on frozen trajectories; training; resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.errors import StillhouseError
from stillhouse.meta.inner_update import (
    hessian_product,
    inner_chain,
    inner_gradient,
    pull_back,
    push_forward,
    surrogate,
)
from stillhouse.meta.maml_rl import MamlRl, MamlRlConfig, outer_objective
from stillhouse.meta.trajectories import Batch, make_batch, play

TINY: dict[str, Any] = {
    "family": {"name": "navigation", "horizon": 6},
    "hidden": (3,),
    "tasks": 2,
    "rollouts": 4,
    "meta_updates": 4,
    "inner_rate": 0.3,
    "test_rollouts": 3,
}
FAMILIES = ["navigation", "cartpole"]


def config(**settings: Any) -> MamlRlConfig:
    return parse(MamlRlConfig, TINY | settings)


def frozen(**settings: Any) -> tuple[MamlRl, Tensor, list[Batch]]:
    """A learner, its initial parameters [P] and a meta-update's trajectories, in float64."""
    learner = MamlRl(config(**settings), 0)
    random = np.random.default_rng(0)
    tasks = learner.family.sample("train", learner.config.tasks, random)
    batches: list[Batch] = []
    # Far from the fresh head's near 0, where hidden layers have hardly a gradient.
    noise = torch.randn(learner.policy.size, generator=torch.Generator().manual_seed(0))
    initial = learner.initial.data + 0.5 * noise
    for step in range(learner.config.inner_steps + 1):
        start = initial.repeat(2, 1)
        parameters = inner_chain(learner.policy, "ratio", start, batches, learner._rates[:step])[-1]
        played = play(learner.policy, learner.family, parameters, tasks, learner.config.rollouts, random)
        batches.append(make_batch(learner.policy, played, 0.99, 0.9))
    doubled = [
        Batch(*(part.double() if part.is_floating_point() else part for part in batch)) for batch in batches
    ]
    return learner, initial.double(), doubled


def objective(learner: MamlRl, initial: Tensor, batches: list[Batch]) -> Tensor:
    """What the meta-gradient is of, written out: adapt by autograd's own derivative, then the outer objective."""
    parameters = initial.repeat(len(batches[0].weights), 1)
    for batch, rate in zip(batches, learner._rates, strict=False):
        parameters = parameters + rate * torch.func.grad(
            lambda each, batch=batch: surrogate(learner.policy, learner.config.surrogate, each, batch).sum()
        )(parameters)
    return outer_objective(learner.policy, parameters, batches[-1]).mean()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["ratio", "log_probability"])
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_meta_gradient_against_finite_differences(name: str, kind: str, inner_steps: int) -> None:
    learner, initial, batches = frozen(
        family={"name": name, "horizon": 6}, surrogate=kind, inner_steps=inner_steps
    )
    gradient, value = learner.meta_gradient(initial, batches)
    torch.testing.assert_close(value, objective(learner, initial, batches))
    small = 1e-6
    for index in range(0, learner.policy.size, 3):
        shift = torch.zeros_like(initial)
        shift[index] = small
        up, down = (objective(learner, initial + sign * shift, batches) for sign in (1, -1))
        assert float(gradient[index]) == pytest.approx(float(up - down) / (2 * small), rel=1e-4, abs=1e-7)


def test_first_order_leaves_the_inner_steps_derivative_out() -> None:
    learner, initial, batches = frozen(gradient="first_order")
    second, _, _ = frozen()
    chain = learner.adapted(initial, batches)
    at_the_end = torch.func.grad(lambda p: outer_objective(learner.policy, p, batches[-1]).sum())(chain[-1])
    first_order = learner.meta_gradient(initial, batches)[0]
    torch.testing.assert_close(first_order, at_the_end.mean(0))
    assert not torch.allclose(first_order, second.meta_gradient(initial, batches)[0], rtol=1e-2)


def test_the_inner_step_passes_the_gradient_on_and_a_naive_copy_does_not() -> None:
    learner, initial, batches = frozen()
    policy = learner.policy
    start = initial.repeat(2, 1).requires_grad_()
    chain = inner_chain(policy, "ratio", start, batches[:1], [0.3])
    (passed,) = torch.autograd.grad(chain[-1].sum(), start)
    naive = start + 0.3 * inner_gradient(policy, "ratio", start.detach(), batches[0])
    (straight,) = torch.autograd.grad(naive.sum(), start)
    assert torch.equal(straight, torch.ones_like(straight))
    hessian = hessian_product(policy, "ratio", start.detach(), batches[0], torch.ones_like(straight))
    torch.testing.assert_close(passed, 1 + 0.3 * hessian)
    assert hessian.abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_hessian_products_against_the_explicit_hessian(name: str) -> None:
    learner, initial, batches = frozen(family={"name": name, "horizon": 6})
    vectors = torch.randn(2, learner.policy.size, generator=torch.Generator().manual_seed(1)).double()
    for kind in ("ratio", "log_probability"):
        found = hessian_product(learner.policy, kind, initial.repeat(2, 1), batches[0], vectors)
        for task in range(2):
            one = Batch(*(part[task : task + 1] for part in batches[0]))
            hessian = torch.func.hessian(
                lambda p, one=one, kind=kind: surrogate(learner.policy, kind, p[None], one)[0]
            )(initial)
            torch.testing.assert_close(found[task], hessian @ vectors[task])


def test_both_surrogates_have_one_gradient_and_differ_in_curvature_by_the_scores_outer_product() -> None:
    learner, initial, batches = frozen()
    policy, batch = learner.policy, batches[0]
    start = initial.repeat(2, 1)
    # Exactly the log-probabilities of these parameters: in float32 the ones that acted differ in the eighth digit.
    log_mu = policy.log_probability(policy.distribution(start, batch.observations), batch.actions)
    batch = batch._replace(log_mu=log_mu)
    torch.testing.assert_close(
        inner_gradient(policy, "ratio", start, batch), inner_gradient(policy, "log_probability", start, batch)
    )
    vector = torch.randn(2, policy.size, generator=torch.Generator().manual_seed(2)).double()
    difference = hessian_product(policy, "ratio", start, batch, vector) - hessian_product(
        policy, "log_probability", start, batch, vector
    )
    for task in range(2):

        def log_pi(parameters: Tensor, task: int = task) -> Tensor:
            found = policy.distribution(parameters[None], batch.observations[task : task + 1])
            return policy.log_probability(found, batch.actions[task : task + 1])[0]

        scores = torch.func.jacrev(log_pi)(initial)  # [B, P]
        factors = batch.weights[task] * batch.advantages[task]
        torch.testing.assert_close(difference[task], scores.T @ (factors * (scores @ vector[task])))


def test_pulling_back_is_the_adjoint_of_pushing_forward() -> None:
    learner, initial, batches = frozen(inner_steps=2)
    chain = learner.adapted(initial, batches)
    generator = torch.Generator().manual_seed(3)
    forwards, backwards = (torch.randn(*chain[0].shape, generator=generator).double() for _ in range(2))
    inner = learner.policy, learner.config.surrogate, chain, batches[:-1], learner._rates
    pushed, pulled = push_forward(*inner, forwards), pull_back(*inner, backwards)
    torch.testing.assert_close((pushed * backwards).sum(1), (forwards * pulled).sum(1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradient", ["second_order", "first_order"])
def test_the_curvature_against_the_explicit_hessian_of_the_divergence(name: str, gradient: str) -> None:
    learner, initial, batches = frozen(family={"name": name, "horizon": 6}, gradient=gradient)
    last = batches[-1]
    chain = learner.adapted(initial, batches)
    old = learner.policy.distribution(chain[-1], last.observations)

    def divergence(parameters: Tensor) -> Tensor:
        if gradient == "first_order":
            after = chain[-1] + (parameters - initial)
        else:
            after = learner.adapted(parameters, batches)[-1]
        found = learner.policy.divergence(old, learner.policy.distribution(after, last.observations))
        return (last.weights * found).sum(1).mean()

    hessian = torch.func.hessian(divergence)(initial)
    vector = torch.randn(learner.policy.size, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(learner.curvature_product(chain, batches, vector), hessian @ vector)
    assert float(vector @ hessian @ vector) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_meta_update_stays_within_the_bound_and_improves_the_objective(name: str) -> None:
    learner = MamlRl(config(family={"name": name, "horizon": 10}, rollouts=10, max_kl=0.02), 1)
    accepted = 0
    for report in learner.train():
        assert report.metrics["policy/kl"] <= 0.02
        if report.metrics["policy/shrinkings"] >= 0:
            accepted += 1
            assert report.metrics["policy/improvement"] > 0
            assert report.metrics["policy/kl"] > 0
    assert accepted >= 3


def test_ppos_first_meta_update_improves_the_objective() -> None:
    # Later ones carry Adam's moments of other trajectories with them.
    for seed in range(3):
        found = MamlRl(config(outer="ppo", rollouts=10), seed).update()
        assert found["policy/improvement"] > 0
        assert found["policy/kl"] > 0


def test_the_clipped_objective_by_hand() -> None:
    learner, initial, batches = frozen(inner_steps=0)
    start = initial.repeat(2, 1)
    log_pi = learner.policy.log_probability(
        learner.policy.distribution(start, batches[0].observations), batches[0].actions
    )
    # Ratios of 1.5 everywhere: clipped to 1.2 where the advantage is positive, and not where it is negative.
    batch = batches[0]._replace(log_mu=log_pi - np.log(1.5))
    advantage = batch.advantages
    expected = (batch.weights * torch.where(advantage > 0, 1.2, 1.5) * advantage).sum(1)
    torch.testing.assert_close(outer_objective(learner.policy, start, batch, 0.2), expected)


@pytest.mark.parametrize("settings", [{}, {"outer": "ppo", "pretrained": True}, {"inner_steps": 2}])
def test_interrupted_and_uninterrupted_training_end_in_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = MamlRl(config(**settings), 5)
    reports = list(whole.train())
    first = MamlRl(config(**settings), 5)
    for report in first.train():
        if report.done == 2:
            break
    save_state(tmp_path / "state", first.get_state())
    second = MamlRl(config(**settings), 5)
    second.set_state(load_state(tmp_path / "state"))
    assert [report.metrics for report in second.train()] == [report.metrics for report in reports[2:]]
    for name, values in whole.learnt().items():
        assert torch.equal(values, second.learnt()[name])
    ours, theirs = whole.evaluate(3, 1, 0), second.evaluate(3, 1, 0)
    assert (ours.values == theirs.values).all()


def test_evaluation_leaves_the_learner_as_it_was_and_has_its_baselines() -> None:
    learner = MamlRl(config(pretrained=True), 6)
    training = learner.train()
    next(training)
    before = learner.learnt()
    found = learner.evaluate(5, 2, 9)
    for name, values in learner.learnt().items():
        assert torch.equal(values, before[name])
    assert (found.measure, found.unit, found.steps) == ("return", "updates", [0, 1, 2])
    assert found.values.shape == (5, 3)
    assert {name: each.shape for name, each in found.baselines.items()} == {
        "random_initialisation": (5, 3),
        "pretrained": (5, 3),
        "oracle": (5, 1),
    }
    assert (found.baselines["oracle"] >= found.values.max(axis=1, keepdims=True)).all()
    again = learner.evaluate(5, 2, 9)
    assert (again.values == found.values).all()
    assert (learner.evaluate(5, 2, 10).values != found.values).any()


def test_what_was_learnt_can_be_loaded() -> None:
    learner = MamlRl(config(pretrained=True), 7)
    next(learner.train())
    other = MamlRl(config(pretrained=True), 8)
    other.load({name: values.numpy() for name, values in learner.learnt().items()})
    one, two = learner.evaluate(2, 1, 0), other.evaluate(2, 1, 0)
    assert (one.values == two.values).all()
    assert (one.baselines["pretrained"] == two.baselines["pretrained"]).all()
    with pytest.raises(StillhouseError, match="other hidden widths"):
        MamlRl(config(hidden=(4,)), 8).load(learner.learnt())


def test_the_comparison_has_as_many_episodes() -> None:
    learner = MamlRl(config(pretrained=True, inner_steps=2, family={"name": "navigation", "horizon": 2}), 0)
    next(learner.train())
    assert learner.compared is not None
    assert learner.compared.config.inner_steps == 0
    assert learner.compared.env_steps == learner.env_steps == 2 * 4 * 3 * 2


def test_a_policy_that_diverges_stops_training() -> None:
    learner = MamlRl(config(outer="ppo"), 0)
    learner.initial.data.fill_(float("inf"))
    with pytest.raises(
        StillhouseError, match="maml_rl: the policy is not finite after meta-update 1; lower inner_rate"
    ):
        next(learner.train())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_rate": 0}, "inner_rate: Input should be greater than 0"),
        ({"inner_rate": 101}, "inner_rate: Input should be less than or equal to 100"),
        ({"inner_steps": -1}, "inner_steps: Input should be greater than or equal to 0"),
        ({"inner_steps": 11}, "inner_steps: Input should be less than or equal to 10"),
        ({"max_kl": 0}, "max_kl: Input should be greater than 0"),
        ({"inner_stepz": 1}, "did you mean 'inner_steps'"),
        ({"outer": "adam"}, "outer: Input should be 'trpo' or 'ppo'"),
    ],
)
def test_a_mistake_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillhouseError) as error:
        config(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_test_tasks_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = MamlRl(config(), 0)
    monkeypatch.setattr(learner.family, "members", lambda split: 2)
    with pytest.raises(
        StillhouseError, match="3 test tasks were asked for, but navigation has 2; ask for at most 2"
    ):
        learner.evaluate(3, 1, 0)


@pytest.mark.learning
def test_one_update_goes_further_from_what_was_learnt_than_from_a_fresh_policy() -> None:
    gains, learnt = [], 0
    for seed in range(5):
        learner = MamlRl(
            parse(
                MamlRlConfig,
                {
                    "family": {"name": "navigation", "horizon": 30},
                    "hidden": (32,),
                    "meta_updates": 8,
                    "tasks": 10,
                    "rollouts": 10,
                    "max_kl": 0.05,
                    "curvature_share": 0.5,
                    "conjugate_gradients": 5,
                },
            ),
            seed,
        )
        list(learner.train())
        found = learner.evaluate(10, 1, seed)
        gains.append(found.values[:, 1].mean() - found.baselines["random_initialisation"][:, 1].mean())
        learnt += found.values[:, 1].mean() > found.values[:, 0].mean()
    # Every sign equal is a permutation test at 1 / 2^5.
    assert min(gains) > 0
    assert learnt == 5
