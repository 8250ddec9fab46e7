"""Deep Distral: who acts, what is learnt from, where every gradient goes, and that tasks are alone where alpha is 0."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test
from torch import Tensor

from stillhouse import seeding
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.multi_task.distral import ARMS, DistilledUpdate, DistralConfig, TaskLearner, distral
from stillhouse.multi_task.joint_training import JointTraining
from stillhouse.networks.multi_task import NetworkSize

NAMING = {
    f"naming-{shift}": EnvironmentConfig(id="test/Naming-v0", options={"shift": shift}) for shift in (0, 1)
}
SOUND = {
    name: EnvironmentConfig(id="test/Breaking-v0", options={"sound_steps": 10**6, "length": length})
    for name, length in (("long", 20), ("short", 10))
}
BREAKING = {"breaking": EnvironmentConfig(id="test/Breaking-v0"), **SOUND}
SIZE = NetworkSize(features=16, torso=(12,), layer_norm=True)
LEARNER: dict[str, Any] = {
    "algorithm": "impala",
    "env_steps": 512,
    "num_envs": 8,
    "rollout_length": 16,
    "minibatches": 2,
    "learning_rate": 5e-3,
}
COLUMNS = pytest.mark.parametrize("columns", [1, 2])


def joint(
    columns: int = 2,
    environments: dict[str, EnvironmentConfig] = NAMING,
    seed: int = 0,
    learner: dict[str, Any] | None = None,
    **settings: Any,
) -> JointTraining:
    given = {"method": "distral", "beta": 2.0, "columns": columns, "network": SIZE, **settings}
    return distral(DistralConfig(**given), {**LEARNER, **(learner or {})}, environments, seed)


def rule(training: JointTraining) -> DistilledUpdate:
    assert isinstance(training.rule, DistilledUpdate)
    return training.rule


def task(training: JointTraining, name: str = "naming-1") -> TaskLearner:
    return cast(TaskLearner, training.learners[name])


def stirred(training: JointTraining) -> JointTraining:
    """With heads that say something, and no two alike."""
    for number, parameters in enumerate(
        [rule(training).parameters, *(each.parameters for each in training.learners.values())]
    ):
        noise = torch.randn(len(parameters.values), generator=torch.Generator().manual_seed(number))
        parameters.values.data.add_(noise, alpha=0.5)
    return training


def policies(training: JointTraining, name: str, observations: Tensor) -> tuple[Tensor, Tensor]:
    """pi_i and pi_0 from the networks' own outputs, by the paper's formula, [N, A] each."""
    learner = task(training, name)
    shared = learner.distilled(observations, name).detach()
    own = learner.network(observations, name).detach()
    beta = learner.distral.beta
    f = own / beta  # the second column gives beta f_i
    logits = own if learner.distral.columns == 1 else learner.distral.alpha * shared + beta * f
    return torch.softmax(logits, 1), torch.softmax(shared, 1)


@COLUMNS
def test_what_acts_is_the_tasks_own_policy(columns: int) -> None:
    training = stirred(joint(columns))
    for name, learner in training.learners.items():
        each = task(training, name)
        seed = seeding.derive(0, name)
        noise = seeding.generator(seed, "actions").gumbel(size=(16, 8, 4))
        learner.act()
        rollout = each.rollout
        wanted, distilled = policies(training, name, torch.from_numpy(rollout.observations).flatten())
        told = torch.softmax(torch.from_numpy(rollout.logits).flatten(0, 1), 1)
        torch.testing.assert_close(told, wanted)
        assert (told - distilled).abs().max() > 0.02
        np.testing.assert_array_equal(rollout.actions, (wanted.view(16, 8, 4).log() + noise).argmax(2))
        # What is saved and judged is the same policy, and so is what the learner says of itself.
        shown = np.arange(4)
        wanted, _ = policies(training, name, torch.arange(4))
        for outputs in (learner.outputs(shown), training.network(torch.arange(4), name).detach().numpy()):
            torch.testing.assert_close(torch.softmax(torch.tensor(outputs), 1), wanted)


def minibatch(training: JointTraining, name: str = "naming-1") -> Any:
    for learner in training.learners.values():
        learner.act()
    return next(iter(task(training, name).batches()))


@COLUMNS
@pytest.mark.parametrize("from_uniform", [False, True])
def test_the_rewards_that_are_learnt_from(columns: int, from_uniform: bool) -> None:
    training = stirred(joint(columns, entropy_from_uniform=from_uniform, reward_scales={"naming-1": 0.5}))
    batch = minibatch(training)
    learner = task(training)
    seen: list[Tensor] = []
    corrected = learner._corrected
    learner._corrected = lambda ratio, rewards, *rest: (
        seen.append(rewards) or corrected(ratio, rewards, *rest)
    )  # type: ignore
    learner.backward(batch)
    policy, distilled = policies(training, "naming-1", batch.observations.flatten())
    chosen = batch.actions.flatten()[:, None]
    log_i, log_0 = (each.gather(1, chosen).view(batch.actions.shape).log() for each in (policy, distilled))
    shift = math.log(4) if from_uniform else 0.0
    # alpha 1/2, beta 2; the environment pays 1, of which the learner sees a half.
    wanted = batch.rewards + 0.25 * (log_0 + shift) - 0.5 * (log_i + shift)
    assert set(batch.rewards.unique().tolist()) == {0.0, 0.5}
    torch.testing.assert_close(seen[0], wanted)
    cost = learner.metrics()["distral/cost"]
    assert cost == pytest.approx(float((batch.rewards - wanted)[batch.valid].mean()), abs=1e-5)


@COLUMNS
def test_gradients_by_hand(columns: int) -> None:
    """At pi_0's head: c_KL (pi_0 - pi_i), and with two columns alpha times the policy gradient, which the own head shows."""
    training = stirred(joint(columns, alpha=0.75))
    batch = minibatch(training)
    update, learner = rule(training), task(training)
    losses = update.backward({"naming-1": batch})
    assert losses[0] == 0 and losses[1] != 0
    observations = batch.observations.flatten()[batch.valid.flatten()]
    policy, distilled = policies(training, "naming-1", observations)
    wanted = 0.75 / 2.0 * (distilled - policy)  # c_KL = alpha / beta
    features = learner.distilled.features(observations, "naming-1").detach()
    found = {
        key: update._gradients[1][update.parameters.slices[f"heads.shared_head.{key}"]]
        for key in ("weight", "bias")
    }
    own = learner.parameters
    policy_gradient = own.gradient[own.slices["heads.naming-1.bias"]]
    assert policy_gradient.abs().max() > 1e-3
    expected = wanted.mean(0) + (0.75 * policy_gradient if columns == 2 else 0)
    torch.testing.assert_close(found["bias"], expected, rtol=1e-4, atol=1e-6)
    if columns == 1:
        expected = (wanted.T @ features / len(wanted)).flatten()
        torch.testing.assert_close(found["weight"], expected, rtol=1e-4, atol=1e-6)
    assert not update._gradients[0].any()
    before = learner.metrics()
    assert before["distral/kl"] == pytest.approx(
        float((policy * (policy / distilled).log()).sum(1).mean()), rel=1e-3
    )
    assert before["distral/cross_entropy"] == pytest.approx(
        float(-(policy * distilled.log()).sum(1).mean()), rel=1e-3
    )


@COLUMNS
def test_the_distilled_policy_steps_on_the_mean_over_the_tasks(columns: int) -> None:
    training = stirred(joint(columns, learner={"max_gradient_norm": 0.0}))
    for learner in training.learners.values():
        learner.act()
    batches = {name: next(iter(task(training, name).batches())) for name in NAMING}
    update = rule(training)
    update.backward(batches)
    rows = update._gradients.clone()
    before = update.parameters.values.detach().clone()
    update.step()
    torch.testing.assert_close(update.parameters.gradient, rows.mean(0))
    step = update.parameters.values.detach() - before
    # Adam's first step is the learning rate against the gradient's sign.
    clear = rows.mean(0).abs() > 1e-3
    assert clear.sum() > 20
    torch.testing.assert_close(step[clear], -5e-3 * rows.mean(0)[clear].sign(), rtol=2e-2, atol=0)


def values(training: JointTraining, name: str) -> Tensor:
    return training.learners[name].parameters.values.detach().clone()


@COLUMNS
def test_without_alpha_every_task_learns_alone(columns: int) -> None:
    def train(alpha: float, *others: int) -> JointTraining:
        options = [{"shift": shift} for shift in (1, *others)]
        chosen = {
            f"naming-{each['shift']}": EnvironmentConfig(id="test/Naming-v0", options=each)
            for each in options
        }
        training = joint(columns, chosen, alpha=alpha)
        start = rule(training).parameters.values.detach().clone()
        list(training.train())
        assert torch.equal(rule(training).parameters.values, start) == (alpha == 0)
        return training

    alone, beside, another = train(0.0), train(0.0, 0), train(0.0, 2, 3)
    assert torch.equal(values(alone, "naming-1"), values(beside, "naming-1"))
    assert torch.equal(values(alone, "naming-1"), values(another, "naming-1"))
    together = train(0.5), train(0.5, 0)
    assert not torch.equal(*(values(each, "naming-1") for each in together))


def test_without_alpha_both_forms_are_one() -> None:
    trainings = [joint(columns, alpha=0.0) for columns in (1, 2)]
    for training in trainings:
        list(training.train())
    assert torch.equal(*(values(training, "naming-0") for training in trainings))


def test_the_critic_reaches_no_column_but_the_tasks_own() -> None:
    found = []
    for coefficient in (0.0, 100.0):
        training = stirred(joint(learner={"value_coefficient": coefficient}))
        rule(training).backward({"naming-1": minibatch(training)})
        found.append((rule(training)._gradients.clone(), task(training).parameters.gradient.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() > 1


def test_there_is_no_entropy_bonus_unless_one_is_asked_for() -> None:
    assert task(joint()).config.entropy_coefficient == 0
    assert task(joint(learner={"entropy_coefficient": 0.1})).config.entropy_coefficient == 0.1


@COLUMNS
def test_interrupted_and_whole_training_end_in_the_same_bytes(columns: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learner": {"popart": True, "policy_lag": 2 - columns}}
    whole = joint(columns, **settings)
    reports = list(whole.train())
    first = joint(columns, **settings)
    list(itertools.islice(first.train(), len(reports) // 2))
    save_state(tmp_path / "state", first.get_state())
    second = joint(columns, **settings)
    second.set_state(load_state(tmp_path / "state"))
    assert list(second.train())[-1] == reports[-1]
    save_state(tmp_path / "a", whole.get_state())
    save_state(tmp_path / "b", second.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for training in (whole, second):
        for name in NAMING:
            assert torch.equal(training.network(torch.arange(4), name), whole.network(torch.arange(4), name))
    assert {"distral/kl", "distral/cross_entropy", "distral/cost", "return/naming-0", "loss/naming-0"} <= set(
        reports[-1].metrics
    )


def test_the_seed_decides_everything() -> None:
    first, again, other = joint(), joint(), joint(seed=1)
    for training in (first, again, other):
        list(training.train())
    found = [rule(training).parameters.values for training in (first, again, other)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@COLUMNS
def test_who_diverges_is_named_and_the_others_are_as_they_were(columns: int) -> None:
    training = joint(columns, BREAKING)
    with pytest.raises(StillhouseError, match="^breaking: the loss or its gradient became nan") as caught:
        list(training.train())
    assert "\n" not in str(caught.value) and "when_diverging" in str(caught.value)
    for parameters in [rule(training).parameters, *(each.parameters for each in training.learners.values())]:
        assert torch.isfinite(parameters.values).all()


@COLUMNS
def test_the_others_go_on_without_it(columns: int, tmp_path: Path) -> None:
    training = joint(columns, BREAKING, when_diverging="leave_out")
    left = torch.zeros(())
    for _ in training.train():
        if training.diverged and not left.ndim:
            left = values(training, "breaking")
            save_state(tmp_path / "state", training.get_state())
    assert set(training.diverged) == {"breaking"}
    assert not rule(training)._gradients[0].any() and rule(training)._gradients[1].any()
    assert torch.equal(values(training, "breaking"), left)
    assert torch.isfinite(rule(training).parameters.values).all()
    again = joint(columns, BREAKING, when_diverging="leave_out")
    again.set_state(load_state(tmp_path / "state"))
    list(again.train())
    assert torch.equal(rule(again).parameters.values, rule(training).parameters.values)
    for name in SOUND:
        assert torch.equal(values(again, name), values(training, name))


@COLUMNS
def test_both_checkpoints_are_ordinary_ones(columns: int, tmp_path: Path) -> None:
    training = joint(columns, reward_scales={"naming-1": 0.1})
    list(training.train())
    training.rescale_heads()
    assert training.distilled is rule(training).distilled
    save_checkpoint(tmp_path / "policies", training.network, {})
    save_checkpoint(tmp_path / "distilled", training.distilled, {})
    shown = torch.arange(4)
    for name in NAMING:
        policy, distilled = policies(training, name, shown)
        for path, wanted in (("policies", policy), ("distilled", distilled)):
            network = load_checkpoint(tmp_path / path).network
            assert network.spec.output == "logits"
            torch.testing.assert_close(torch.softmax(network(shown, name), 1), wanted)


def test_planes_and_actions_that_differ_are_shared_where_it_is_said() -> None:
    games = {name: EnvironmentConfig(id=f"MinAtar/{name}-v0") for name in ("Breakout", "Freeway")}
    size = NetworkSize(conv_channels=4, features=8)
    with pytest.raises(
        StillhouseError, match="one observation space, but Breakout has planes_.*set network.share_planes"
    ):
        joint(environments=games, network=size)
    shared = size.model_copy(update={"share_planes": True})
    training = joint(environments=games, network=shared, learner={"env_steps": 128})
    list(training.train())
    assert training.distilled is not None and set(training.distilled.bodies) == {"planes_10x10"}
    fewer = EnvironmentConfig(id="MinAtar/Breakout-v0", options={"use_minimal_action_set": True})
    mixed = {"all": games["Breakout"], "fewer": fewer}
    with pytest.raises(StillhouseError, match=r"one set of actions, but all has 6, fewer 3; .*share_head"):
        joint(environments=mixed, network=size)
    training = joint(
        environments=mixed,
        network=size.model_copy(update={"share_head": True}),
        learner={"env_steps": 128},
    )
    list(training.train())
    assert training.network(torch.zeros(1, 10, 10, 4, dtype=torch.bool), "fewer").shape == (1, 3)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"alpha": 1.5}, "alpha: Input should be less than or equal to 1, but 1.5 was given"),
    ({"alpha": -0.1}, "alpha: Input should be greater than or equal to 0"),
    ({"beta": 0}, "beta: Input should be greater than 0, but 0 was given"),
    ({"columns": 3}, "columns: Input should be 1 or 2"),
    ({"network": {"separate": True}}, "separate must be false"),
    ({"network": {"recurrent": "gru"}}, "the distilled policy has no memory: recurrent must be none"),
    ({"balancing": "pcgrad"}, "balancing: unknown parameter"),
)


def test_settings_are_refused_in_one_line() -> None:
    for settings, said in REFUSED:
        with pytest.raises(StillhouseError, match=said) as caught:
            parse(DistralConfig, {"method": "distral", **settings}, "train_multi_task.all")
        assert "\n" not in str(caught.value)
    for learner, said in (
        ({"algorithm": "pqn"}, "'pqn' was given, which learns Q-values; .* allowed is impala"),
        ({"algorithm": "dqn"}, "'dqn' was given, which learns Q-values; .* allowed is impala"),
        ({"algorithm": "ppo"}, "learner.algorithm: 'ppo' was given; .* allowed is impala"),
        ({"network": {}}, "a learner without 'network' is allowed"),
        ({"policy_lag": 1}, "with two columns 0 is allowed"),
    ):
        with pytest.raises(StillhouseError, match=said) as caught:
            joint(learner=learner)
        assert "\n" not in str(caught.value)
    other = {"cartpole": EnvironmentConfig(id="CartPole-v1"), **NAMING}
    with pytest.raises(
        StillhouseError, match="cartpole has vector_4, naming-0 discrete_4; bring them"
    ) as caught:
        joint(environments=other)
    assert "\n" not in str(caught.value)
    with pytest.raises(StillhouseError, match="reward_scales: pong is not among the environments"):
        joint(reward_scales={"pong": 2.0})


def test_the_arms_are_the_papers() -> None:
    for name, settings in ARMS.items():
        config = DistralConfig(method="distral", **settings)
        assert config.columns == int(name[-4])
        assert config.alpha == (0.5 if "ent" in name else 1.0)


@pytest.mark.learning
@pytest.mark.parametrize("arm", ["KL_1col", "KL+ent_2col"])
def test_an_arm_learns_both_tasks_and_the_distilled_policy_is_their_centre(arm: str) -> None:
    """Opposite answers, five seeds against the same networks untrained by a permutation test; of 10 at best."""
    learner = {"env_steps": 3000, "gamma": 0.0, "minibatches": 4, "learning_rate": 2e-2}
    trained: list[float] = []
    untrained: list[float] = []
    for seed in range(5):
        training = joint(
            cast(Literal[1, 2], ARMS[arm]["columns"]), seed=seed, learner=learner, alpha=ARMS[arm]["alpha"]
        )
        for returns in (untrained, trained):
            for name, environment in NAMING.items():
                played = evaluate(training.learners[name].outputs, environment, 50, seed)
                returns.append(float(played.returns.mean()))
            list(training.train())
        told = [policies(training, name, torch.arange(4)) for name in NAMING]
        centre = torch.stack([policy for policy, _ in told]).mean(0)
        assert (told[0][1] - centre).abs().max() < 0.15
    result = permutation_test(
        (trained, untrained),
        lambda a, b: np.mean(a) - np.mean(b),
        alternative="greater",
        n_resamples=2000,
        rng=0,
    )
    assert result.pvalue < 0.05
    assert np.mean(trained) > 9.5
