"""Soft sharing: penalties by hand and by autograd, what is tied, and that nothing is where the strength is 0."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test
from torch import Tensor

from stillhouse import seeding
from stillhouse.agents import make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.multi_task.joint_training import JointTraining
from stillhouse.multi_task.soft_sharing import Penalty, SoftSharingConfig, TiedUpdate, penalty, soft_sharing
from stillhouse.networks.multi_task import NetworkSize

ENVIRONMENTS = {
    "acrobot": EnvironmentConfig(id="Acrobot-v1", max_episode_steps=60),
    "frozen": EnvironmentConfig(id="FrozenLake-v1"),
}
BREAKING = {"breaking": EnvironmentConfig(id="test/Breaking-v0"), **ENVIRONMENTS}
SIZE = NetworkSize(features=16, torso=(12, 8), layer_norm=True, separate=True)
ROLLOUTS: dict[str, Any] = {"env_steps": 1024, "num_envs": 8, "rollout_length": 16, "minibatches": 4}
LEARNERS: dict[str, dict[str, Any]] = {
    "pqn": {"algorithm": "pqn", **ROLLOUTS},
    "ppo": {"algorithm": "ppo", **ROLLOUTS, "critic": "separate"},
    "impala": {"algorithm": "impala", **ROLLOUTS, "popart": True, "policy_lag": 2},
    "dqn": {
        "algorithm": "dqn",
        "env_steps": 1024,
        "learning_starts": 100,
        "train_every": 128,
        "updates_per_train": 8,
        "batch_size": 16,
    },
}


def joint(
    algorithm: str = "pqn",
    environments: dict[str, EnvironmentConfig] = ENVIRONMENTS,
    size: NetworkSize = SIZE,
    learning_rate: float = 5e-4,
    **settings: Any,
) -> JointTraining:
    config = SoftSharingConfig(**{"method": "soft_sharing", "network": size, **settings})
    learner = {**LEARNERS[algorithm], "learning_rate": learning_rate}
    return soft_sharing(config, learner, environments, 0)


def values(training: JointTraining, name: str) -> Tensor:
    return training.learners[name].parameters.values.detach().clone()


WEIGHTS = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, -4.0]])  # mean (2, 0): apart (-1, 2), (1, 2), (0, -4)
BY_HAND: dict[Penalty, tuple[float, list[list[float]]]] = {
    "l2_mean": (13.0, [[-1, 2], [1, 2], [0, -4]]),  # (5 + 5 + 16) / 2
    # Pairs: (2, 0), (1, -6), (-1, -6), squares 4, 37 and 37, their sum halved; three times the above.
    "l2_pairs": (39.0, [[-3, 6], [3, 6], [0, -12]]),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_distances_by_hand(kind: Penalty) -> None:
    value, gradient = penalty(kind, WEIGHTS)
    wanted, wanted_gradient = BY_HAND[kind]
    assert value == pytest.approx(wanted)
    torch.testing.assert_close(gradient, torch.tensor(wanted_gradient, dtype=torch.float32))


def test_trace_norm_by_hand() -> None:
    """Orthogonal rows of lengths 5 and 2 are the singular values; U V^T has the rows' directions. Equal rows: one of them."""
    value, gradient = penalty("trace_norm", torch.tensor([[3.0, 0.0, 4.0], [0.0, -2.0, 0.0]]))
    assert value == pytest.approx(7.0)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]]))
    value, gradient = penalty("trace_norm", torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    assert value == pytest.approx(50**0.5)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.8], [0.6, 0.8]]) / 2**0.5)


@pytest.mark.parametrize("kind", ["l2_mean", "l2_pairs", "trace_norm"])
def test_gradients_are_those_of_autograd_and_of_finite_differences(kind: Penalty) -> None:
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    value, gradient = penalty(kind, weights)
    free = weights.double().requires_grad_()
    if kind == "trace_norm":
        wanted = torch.linalg.matrix_norm(free, "nuc")
    elif kind == "l2_mean":
        wanted = (free - free.mean(0)).square().sum() / 2
    else:
        wanted = torch.stack(
            [(free[i] - free[j]).square().sum() / 2 for i, j in itertools.combinations(range(4), 2)]
        ).sum()
    wanted.backward()
    assert free.grad is not None
    assert value == pytest.approx(float(wanted.detach()), rel=1e-4)
    torch.testing.assert_close(gradient.double(), free.grad, rtol=1e-3, atol=1e-4)
    step = 1e-2 * torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    ends = [penalty(kind, weights + sign * step)[0] for sign in (0.5, -0.5)]
    assert ends[0] - ends[1] == pytest.approx(float((gradient * step).sum()), rel=1e-2)


def test_a_trace_norm_of_zeros_pulls_nowhere() -> None:
    value, gradient = penalty("trace_norm", torch.zeros(3, 4))
    assert value == 0 and torch.equal(gradient, torch.zeros(3, 4))


def rule(training: JointTraining) -> TiedUpdate:
    assert isinstance(training.rule, TiedUpdate)
    return training.rule


def test_tied_is_what_has_one_place_and_one_shape() -> None:
    tied = rule(joint("ppo")).tied
    torso = {
        f"torso.{kind}.{i}.{part}"
        for kind in ("dense", "norm")
        for i in (0, 1)
        for part in ("weight", "bias")
    }
    # The adapters' weights differ, by the observations' sizes; what follows does not.
    assert set(tied) == torso | {"adapters.dense.bias", "adapters.norm.weight", "adapters.norm.bias"}
    games = {name: EnvironmentConfig(id=f"MinAtar/{name}-v0") for name in ("Breakout", "Freeway")}
    size = NetworkSize(conv_channels=4, features=16, separate=True)
    tied = rule(joint(environments=games, size=size)).tied
    assert {"adapters.body.dense.weight", "adapters.first.convolution.bias"} <= set(tied)
    assert "adapters.first.convolution.weight" not in tied
    assert not any(place.startswith("heads.") for place in tied)
    training = joint(environments={"a": ENVIRONMENTS["frozen"], "b": ENVIRONMENTS["frozen"]})
    assert "adapters.dense.weight" in rule(training).tied
    for place in rule(training).tied.values():
        for name, where in place.items():
            assert len(values(training, name)[where]) > 0


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_without_strength_every_environment_learns_as_it_would_alone(algorithm: str) -> None:
    training = joint(algorithm, strength=0.0)
    list(training.train())
    for name, environment in ENVIRONMENTS.items():
        size = SIZE.model_copy(update={"separate": False})
        settings = {**LEARNERS[algorithm], "learning_rate": 5e-4, "network": size.model_dump()}
        alone = make_learner(settings, name, environment, seeding.derive(0, name))
        list(alone.train())
        assert torch.equal(values(training, name), alone.parameters.values)
        assert torch.equal(
            training.network.state_dict()[f"networks.{name}.torso.dense.0.weight"],
            alone.network.state_dict()["torso.dense.0.weight"],
        )


@pytest.mark.parametrize("kind", ["l2_mean", "l2_pairs", "trace_norm"])
def test_with_strength_the_penalty_is_smaller_than_without(kind: Penalty) -> None:
    free, tied = (joint(penalty=kind, strength=strength, learning_rate=5e-3) for strength in (0.0, 10.0))
    for training in (free, tied):
        list(training.train())

    for place in ("torso.dense.0.weight", "torso.dense.1.weight"):
        found = []
        for training in (free, tied):
            slices = rule(training).tied[place]
            found.append(
                penalty(kind, torch.stack([values(training, name)[slices[name]] for name in slices]))[0]
            )
        assert found[1] < 0.7 * found[0]
    assert free.metrics()["sharing/penalty"] == 0.0 < tied.metrics()["sharing/penalty"]


def test_the_gradients_are_added_to_every_environments_own() -> None:
    training = joint(strength=0.5)
    update = rule(training)
    for learner in training.learners.values():
        learner.parameters.zero_gradient()
    value = update._add_penalty()
    total = 0.0
    for place, slices in update.tied.items():
        stack = torch.stack([values(training, name)[where] for name, where in slices.items()])
        wanted, gradients = penalty("l2_mean", stack)
        total += 0.5 * wanted
        for (name, where), gradient in zip(slices.items(), gradients, strict=True):
            found = training.learners[name].parameters.gradient[where]
            torch.testing.assert_close(found, 0.5 * gradient, msg=place)
    assert value == pytest.approx(total)
    head = training.learners["frozen"].parameters.slices["heads.frozen.weight"]
    assert not training.learners["frozen"].parameters.gradient[head].any()


def test_the_strength_changes_linearly() -> None:
    training = joint(strength=2.0, strength_end=0.0, strength_fraction=0.5)
    found = [(report.done / report.total, report.metrics["sharing/strength"]) for report in training.train()]
    steps = 1 / len(found)
    for done, strength in found:  # as it was when the round began to learn
        assert strength == pytest.approx(max(0.0, 2 * (1 - done / 0.5)), abs=1e-6)
    assert found[-1][1] == 0.0 and found[0] == (steps, pytest.approx(2 - 4 * steps))
    assert rule(joint(strength=2.0)).strength == 2.0


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_interrupted_and_whole_training_end_in_the_same_bytes(algorithm: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"penalty": "trace_norm", "strength": 0.1, "strength_end": 0.0}
    whole = joint(algorithm, **settings)
    reports = list(whole.train())
    first = joint(algorithm, **settings)
    list(itertools.islice(first.train(), len(reports) // 2))
    save_state(tmp_path / "state", first.get_state())
    second = joint(algorithm, **settings)
    second.set_state(load_state(tmp_path / "state"))
    assert list(second.train())[-1] == reports[-1]
    save_state(tmp_path / "a", whole.get_state())
    save_state(tmp_path / "b", second.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_diverges_leaves_the_others_as_they_would_be_without_it() -> None:
    training = joint(environments=BREAKING, when_diverging="leave_out", strength=0.0)
    list(training.train())
    without = joint(strength=0.0)
    list(without.train())
    assert set(training.diverged) == {"breaking"}
    for name in ENVIRONMENTS:
        assert torch.equal(values(training, name), values(without, name))
    assert torch.isfinite(values(training, "breaking")).all()
    with pytest.raises(StillhouseError, match="^breaking: the loss or its gradient became nan"):
        list(joint(environments=BREAKING).train())


def test_who_is_left_out_is_no_part_of_the_mean() -> None:
    training = joint(environments=BREAKING, when_diverging="leave_out", strength=1.0)
    list(training.train())
    for name in training.active:
        training.learners[name].parameters.zero_gradient()
    rule(training)._add_penalty()
    where = rule(training).tied["torso.dense.0.weight"]
    first, second = (values(training, name)[where[name]] for name in training.active)
    found = training.learners["frozen"].parameters.gradient[where["frozen"]]
    torch.testing.assert_close(found, (second - first) / 2)


def test_one_checkpoint_holds_all_networks(tmp_path: Path) -> None:
    training = joint("pqn", reward_scales={"acrobot": 0.1})
    list(training.train())
    observations = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    before = training.network(observations, "acrobot")
    training.rescale_heads()
    save_checkpoint(tmp_path / "joint", training.network, {})
    loaded = load_checkpoint(tmp_path / "joint").network
    assert loaded.spec.size.separate
    torch.testing.assert_close(loaded(observations, "acrobot"), before * 10)


def test_refused_in_one_line() -> None:
    for settings, said in (
        ({"network": {"separate": False}}, "separate must be true"),
        ({"network": {"separate": True, "share_head": True}}, "share_planes and share_head must be false"),
        ({"penalty": "l1"}, "penalty: Input should be 'l2_mean', 'l2_pairs' or 'trace_norm'"),
        ({"strength": -1}, "strength: Input should be greater than or equal to 0"),
        ({"balancing": "pcgrad"}, "balancing: unknown parameter"),
    ):
        with pytest.raises(StillhouseError, match=said) as caught:
            parse(SoftSharingConfig, {"method": "soft_sharing", **settings}, "joint")
        assert "\n" not in str(caught.value)
    games = {"breakout": EnvironmentConfig(id="MinAtar/Breakout-v0"), **ENVIRONMENTS}
    with pytest.raises(StillhouseError, match=r"no tensor of equal shape to tie; give the network a torso"):
        joint(environments=games, size=NetworkSize(features=16, separate=True))


@pytest.mark.learning
def test_tied_networks_learn_both_environments() -> None:
    """Five seeds against the same networks untrained, by a permutation test on greedy returns; of 10 at best."""
    environments = {
        f"naming-{shift}": EnvironmentConfig(id="test/Naming-v0", options={"shift": shift})
        for shift in (0, 1)
    }
    learner = {**LEARNERS["pqn"], "learning_rate": 5e-3, "env_steps": 6000, "gamma": 0.0}
    config = SoftSharingConfig(method="soft_sharing", network=SIZE, strength=1e-3)
    trained, untrained = [], []
    for seed in range(5):
        training = soft_sharing(config, learner, environments, seed)
        for returns in (untrained, trained):
            for name, environment in environments.items():
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
