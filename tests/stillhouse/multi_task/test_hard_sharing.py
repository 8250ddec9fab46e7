"""Hard sharing: one network on several environments, by every algorithm; balancing, divergence, exact continuation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from stillhouse import seeding
from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.multi_task.hard_sharing import HardSharingConfig, hard_sharing, shared_places
from stillhouse.multi_task.joint_training import JointTraining
from stillhouse.networks.multi_task import NetworkSize

ENVIRONMENTS = {
    "cartpole": EnvironmentConfig(id="CartPole-v1"),
    "frozen": EnvironmentConfig(id="FrozenLake-v1"),
}
BREAKING = {"breaking": EnvironmentConfig(id="test/Breaking-v0"), **ENVIRONMENTS}
SIZE = NetworkSize(features=16, torso=(16,), layer_norm=True)
ROLLOUTS: dict[str, Any] = {"env_steps": 1024, "num_envs": 8, "rollout_length": 16, "minibatches": 4}
LEARNERS: dict[str, dict[str, Any]] = {
    "pqn": {"algorithm": "pqn", **ROLLOUTS},
    "ppo": {"algorithm": "ppo", **ROLLOUTS},
    "impala": {"algorithm": "impala", **ROLLOUTS, "popart": True, "policy_lag": 2},
    "dqn": {
        "algorithm": "dqn",
        "env_steps": 1024,
        "learning_starts": 100,
        "train_every": 128,
        "updates_per_train": 8,
        "batch_size": 16,
        "target_update_interval": 5,
    },
}


def joint(
    algorithm: str = "pqn",
    seed: int = 0,
    environments: dict[str, EnvironmentConfig] = ENVIRONMENTS,
    learner: dict[str, Any] | None = None,
    **settings: Any,
) -> JointTraining:
    config = HardSharingConfig(**{"network": SIZE, **settings})
    return hard_sharing(config, {**LEARNERS[algorithm], **(learner or {})}, environments, seed)


def values(training: JointTraining) -> torch.Tensor:
    return next(iter(training.learners.values())).parameters.values.detach().clone()


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_every_environment_gets_its_budget_and_its_metrics(algorithm: str) -> None:
    training = joint(algorithm)
    start = values(training)
    reports = list(training.train())
    assert all(learner.env_steps >= 1024 for learner in training.learners.values())
    assert reports[-1].done == reports[-1].total == 2 * 1024
    wanted = {"loss/cartpole", "loss/frozen", "return/cartpole", "weight/cartpole", "rollout/episodes"}
    wanted |= (
        {"loss/policy", "policy/kl"} if algorithm in ("ppo", "impala") else {"loss/td", "rollout/epsilon"}
    )
    assert wanted <= set(reports[-1].metrics)
    assert not torch.equal(values(training), start) and torch.isfinite(values(training)).all()


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_with_one_environment_it_is_the_algorithm_alone(algorithm: str) -> None:
    training = joint(algorithm, environments={"frozen": ENVIRONMENTS["frozen"]})
    settings = {**LEARNERS[algorithm], "network": SIZE.model_dump()}
    seed = seeding.derive(0, "frozen")
    alone = make_learner(settings, "frozen", ENVIRONMENTS["frozen"], seed)
    alone.network.load_state_dict(training.network.state_dict())
    list(training.train()), list(alone.train())
    assert torch.equal(values(training), alone.parameters.values)


def test_all_learners_train_the_same_parameters_and_critics_are_their_own() -> None:
    training = joint("ppo")
    first, second = training.learners.values()
    assert first.parameters is second.parameters and first.network is second.network
    slices = first.parameters.slices
    assert "critic.cartpole.weight" in slices and "critic.frozen.weight" in slices
    start = values(training)
    list(training.train())
    assert all(not torch.equal(values(training)[where], start[where]) for where in slices.values())


def test_what_is_shared_is_found() -> None:
    training = joint("ppo", environments={**ENVIRONMENTS, "again": ENVIRONMENTS["cartpole"]})
    parameters = training.learners["frozen"].parameters
    shared = np.zeros(len(parameters.values), np.bool_)
    for place in shared_places(training.network, training.learners):
        assert not shared[place].any()
        shared[place] = True
    for key, place in parameters.slices.items():
        # Both CartPoles have one adapter; FrozenLake has its own.
        wanted = key.startswith(("torso.", "adapters.vector_4."))
        assert (shared[place] == wanted).all(), key


def first_gradient(**settings: Any) -> torch.Tensor:
    learner = {"epochs": 1, "minibatches": 1, "max_gradient_norm": 0.0}
    training = joint(learner=learner, **settings)
    next(training.train())
    return training.learners["frozen"].parameters.gradient.clone()


def test_the_update_descends_the_weighted_mean_of_the_environments_losses() -> None:
    def weighted(cartpole: float, frozen: float) -> torch.Tensor:
        return first_gradient(balancing="fixed", weights={"cartpole": cartpole, "frozen": frozen})

    cartpole, frozen = weighted(1, 1e-9), weighted(1e-9, 1)
    assert not torch.allclose(cartpole, frozen, atol=1e-3)
    torch.testing.assert_close(weighted(3, 1), 0.75 * cartpole + 0.25 * frozen, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first_gradient(), (cartpole + frozen) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["pqn", "dqn"])
def test_rewards_are_scaled_by_environment_and_the_heads_scaled_back(algorithm: str) -> None:
    training = joint(algorithm, reward_scales={"cartpole": 0.1})
    assert [learner.reward_scale for learner in training.learners.values()] == [0.1, 1.0]
    heads = training.network.heads
    before = heads["cartpole"].weight.clone(), heads["frozen"].weight.clone()
    training.rescale_heads()
    torch.testing.assert_close(heads["cartpole"].weight, before[0] * 10)
    torch.testing.assert_close(heads["frozen"].weight, before[1])


def test_a_policys_head_has_no_scale() -> None:
    training = joint("ppo", reward_scales={"cartpole": 0.1})
    before = training.network.heads["cartpole"].weight.clone()
    training.rescale_heads()
    assert torch.equal(training.network.heads["cartpole"].weight, before)


def test_a_shared_head_has_one_reward_scale_and_is_made_once() -> None:
    shared = SIZE.model_copy(update={"share_head": True})
    training = joint(network=shared, learner={"reward_scale": 0.1})
    before = training.network.heads["shared_head"].weight.clone()
    training.rescale_heads()
    torch.testing.assert_close(training.network.heads["shared_head"].weight, before * 10)
    with pytest.raises(
        StillhouseError, match=r"share_head.*set share_head to false, or the same reward scale"
    ):
        joint(network=shared, reward_scales={"cartpole": 0.1})
    own, common = (
        joint("ppo", network=size, reward_scales={"cartpole": 0.1}).network.heads for size in (SIZE, shared)
    )
    sizes = [float(head.weight.detach().abs().max()) for head in (own["cartpole"], common["shared_head"])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)  # both 100 times smaller than drawn


CASES = [
    ("pqn", "uncertainty"),
    ("dqn", "gradnorm"),
    ("ppo", "pcgrad"),
    ("impala", "by_return"),
]


@pytest.mark.parametrize(("algorithm", "balancing"), CASES)
def test_interrupted_and_whole_training_end_in_the_same_bytes(
    algorithm: str, balancing: str, tmp_path: Path
) -> None:
    whole = joint(algorithm, balancing=balancing)
    reports = list(whole.train())
    first = joint(algorithm, balancing=balancing)
    list(itertools.islice(first.train(), len(reports) // 2))
    save_state(tmp_path / "state", first.get_state())
    second = joint(algorithm, balancing=balancing)
    second.set_state(load_state(tmp_path / "state"))
    assert list(second.train())[-1] == reports[-1]
    save_state(tmp_path / "a", whole.get_state())
    save_state(tmp_path / "b", second.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    third = joint(algorithm, balancing=balancing)
    third.set_state(load_state(tmp_path / "a"))  # interrupted after its end
    assert third.rule.metrics() == whole.rule.metrics()


def test_the_seed_decides_everything() -> None:
    first, again, other = joint(), joint(), joint(seed=1)
    for training in (first, again, other):
        list(training.train())
    assert torch.equal(values(first), values(again))
    assert not torch.equal(values(first), values(other))


def test_an_environment_with_few_transitions_holds_the_others_back_only() -> None:
    """CartPole spends rows on resets; there are then fewer transitions than minibatches."""
    training = joint(learner={"num_envs": 2, "rollout_length": 8, "minibatches": 16, "env_steps": 200})
    reports = list(training.train())
    assert reports[-1].done == reports[-1].total
    assert all(np.isfinite(report.metrics["loss/td"]) for report in reports)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_an_environment_that_diverges_is_named_before_it_reaches_a_parameter(algorithm: str) -> None:
    training = joint(algorithm, environments=BREAKING)
    with pytest.raises(StillhouseError, match=r"^breaking: the loss or its gradient became nan") as caught:
        list(training.train())
    assert "\n" not in str(caught.value) and "when_diverging" in str(caught.value)
    assert torch.isfinite(values(training)).all()


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_the_others_go_on_without_it(algorithm: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"environments": BREAKING, "when_diverging": "leave_out"}
    settings |= {"balancing": "pcgrad"}
    training = joint(algorithm, **settings)
    parameters = training.learners["frozen"].parameters
    head = parameters.slices["heads.breaking.weight"]
    other = parameters.slices["heads.frozen.weight"]
    left, reports = torch.zeros(()), []
    for report in training.train():
        reports.append(report)
        if training.diverged and not left.ndim:
            left = values(training)
            save_state(tmp_path / "state", training.get_state())
    assert set(training.diverged) == {"breaking"} and training.diverged["breaking"] < 1024
    assert training.active == ["cartpole", "frozen"]
    assert all(training.learners[name].env_steps >= 1024 for name in training.active)
    assert reports[-1].done == reports[-1].total == 2048 + training.diverged["breaking"]
    assert torch.isfinite(values(training)).all()
    assert torch.equal(values(training)[head], left[head])
    assert not torch.equal(values(training)[other], left[other])
    assert "loss/breaking" not in reports[-1].metrics and "loss/frozen" in reports[-1].metrics
    save_checkpoint(tmp_path / "network", training.network, {})
    again = joint(algorithm, **settings)
    again.set_state(load_state(tmp_path / "state"))
    list(again.train())
    assert again.diverged == training.diverged
    assert torch.equal(values(again), values(training))


@pytest.mark.parametrize("algorithm", ["dqn", "pqn"])
def test_a_return_that_is_not_finite_is_seen_before_it_is_saved(algorithm: str, tmp_path: Path) -> None:
    options = {"chance": 0.01, "length": 10}
    breaking = {"breaking": EnvironmentConfig(id="test/Breaking-v0", options=options), **ENVIRONMENTS}
    learner = {"learning_starts": 1000} if algorithm == "dqn" else {}  # none of it is learnt from before
    training = joint(algorithm, environments=breaking, learner=learner, when_diverging="leave_out")
    for report in training.train():
        save_state(tmp_path / "state", training.get_state())
        assert all(np.isfinite(value) for value in report.metrics.values())
        assert "return/breaking" in report.metrics
    assert set(training.diverged) == {"breaking"}
    found = training.mean_return("breaking")
    assert found is not None and 0 < found <= 10
    again = joint(algorithm, environments=breaking, learner=learner, when_diverging="leave_out")
    again.set_state(load_state(tmp_path / "state"))
    assert (again.env_steps, again.mean_return("breaking")) == (training.env_steps, found)
    with pytest.raises(StillhouseError, match="^breaking: (a return|the loss or its gradient) became nan"):
        list(joint(algorithm, environments=breaking, learner=learner).train())


def test_where_nobody_is_left_there_is_no_result() -> None:
    training = joint(environments={"breaking": BREAKING["breaking"]}, when_diverging="leave_out")
    with pytest.raises(StillhouseError, match="no other environment is left; no result is written"):
        list(training.train())


def test_a_checkpoint_gives_every_environments_outputs(tmp_path: Path) -> None:
    training = joint("ppo")
    list(training.train())
    save_checkpoint(tmp_path / "joint", training.network, {})
    loaded = load_checkpoint(tmp_path / "joint").network
    assert loaded.spec.output == "logits"
    seen = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded(torch.from_numpy(seen), "cartpole").detach(), training.learners["cartpole"].outputs(seen)
    )


def test_refused_in_one_line() -> None:
    for settings, said in (
        (
            {"reward_scales": {"pong": 2.0}},
            "reward_scales: pong is not among .* allowed are cartpole, frozen",
        ),
        ({"balancing": "fixed", "weights": {"pong": 2.0}}, "weights: pong is not among"),
        ({"balancing": "by_return", "reference_returns": {"pong": 2.0}}, "reference_returns: pong is not"),
        ({"learner": {"network": {}}}, "learner.network: a learner without 'network' is allowed"),
        (
            {"learner": {"algorithm": "sarsa"}},
            "learner.algorithm: 'sarsa' was given; allowed are dqn, pqn",
        ),
        ({"learner": {"gama": 0.9}}, r"learner.gama: unknown parameter \(did you mean 'gamma'"),
    ):
        with pytest.raises(StillhouseError, match=said) as caught:
            joint(**settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(StillhouseError, match="separate must be false"):
        parse(HardSharingConfig, {"network": {"separate": True}}, "joint")


NAMING = {
    f"naming-{shift}": EnvironmentConfig(id="test/Naming-v0", options={"shift": shift}) for shift in (0, 1)
}


@pytest.mark.learning
@pytest.mark.parametrize(
    ("algorithm", "balancing"),
    [("pqn", "pcgrad"), ("ppo", "uniform"), ("dqn", "by_return"), ("impala", "uniform")],
)
def test_one_network_learns_two_environments(algorithm: str, balancing: str) -> None:
    """Five seeds against the same networks untrained, by a permutation test on greedy returns; of 10 at best."""
    learner = {"learning_rate": 5e-3, "env_steps": 6000, "gamma": 0.0}
    trained, untrained = [], []
    for seed in range(5):
        training = joint(algorithm, seed, NAMING, learner, balancing=balancing)
        for returns in (untrained, trained):
            for name, environment in NAMING.items():
                played = evaluate(training.learners[name].outputs, environment, 50, seed)
                returns.append(float(played.returns.mean()))
            list(training.train())
    result = permutation_test(
        (trained, untrained),
        lambda a, b: np.mean(a) - np.mean(b),
        alternative="greater",
        n_resamples=2000,
        rng=0,
    )
    assert result.pvalue < 0.05
    assert np.mean(trained) > 9.5
