"""UNREAL: targets by hand, where each loss's gradient goes, switched off it is IMPALA, resume, refusals; and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from stillhouse.agents import fresh_network, make_learner
from stillhouse.agents.impala import IMPALA
from stillhouse.agents.unreal import UNREAL, PixelControlHead, UNREALConfig, build_critic
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.config import parse
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.envs.vector import VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.evaluation.rollouts import evaluate
from stillhouse.losses.auxiliary import reward_prediction_loss
from stillhouse.multi_task.hard_sharing import HardSharingConfig, hard_sharing
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.networks.parameters import FlatParameters

torch.set_num_threads(1)
SIZE = NetworkSize(conv_channels=4, features=12, torso=(8,))
SETTINGS: dict[str, Any] = {
    "num_envs": 6,
    "env_steps": 600,
    "rollout_length": 10,
    "minibatches": 2,
    "replay_steps": 40,
    "replay_length": 7,
    "replay_batch": 5,
    "reward_batch": 9,
    "cell_size": 2,
    "network": SIZE.model_dump(),
}
MAZE = EnvironmentConfig(id="stillhouse/Maze-v0", options={"size": 5, "layouts": 20}, max_episode_steps=12)
IMAGE = EnvironmentConfig(id="stillhouse/Maze-v0", options={"size": 9, "pixels": 4}, max_episode_steps=12)
TASKS = ("pixel_control", "reward_prediction", "value_replay")


def only(*tasks: str) -> dict[str, float]:
    """Weights with which these tasks alone are on."""
    return {f"{task}_weight": float(task in tasks) for task in TASKS}


class Dots(gymnasium.Env[np.ndarray, int]):
    """Random planes (or a picture) of 7 x 6; episodes of 1 to 9 steps that pay -1, 0 or 1 and end one way or the other."""

    action_space = gymnasium.spaces.Discrete(3)
    metadata = {"render_modes": []}

    def __init__(self, channels_first: bool = False, image: bool = False, longest: int = 9) -> None:
        self.image, self.longest = image, longest
        shape = (2, 6, 6) if channels_first else (7, 6, 2)
        highest, dtype = (255, np.uint8) if image else (1, np.bool_)
        self.observation_space = gymnasium.spaces.Box(0, highest, shape, dtype)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, self.longest + 1))
        return self._shown(), {}

    def _shown(self) -> np.ndarray:
        shape = self.observation_space.shape
        assert shape is not None
        if self.image:
            return self.np_random.integers(256, size=shape).astype(np.uint8)
        return self.np_random.random(shape) < 0.3

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        terminates = bool(self.np_random.integers(2))
        reward = float(self.np_random.integers(-1, 2))
        over = self.left == 0
        return self._shown(), reward, over and terminates, over and not terminates, {}


def on_dots(
    mode: AutoresetMode = AutoresetMode.DISABLED, dots: dict[str, Any] | None = None, **settings: Any
) -> UNREAL:
    config = UNREALConfig(**{**SETTINGS, **settings})
    vector = SyncVectorEnv([lambda: Dots(**(dots or {}))] * 6, autoreset_mode=mode, copy=False)
    envs = VectorEnvironment.over(vector, 0, "train")
    return UNREAL(config, fresh_network(SIZE, "dots", envs.spec, "logits", 0), "dots", envs, 0)


def on(environment: EnvironmentConfig, seed: int = 0, **settings: Any) -> Any:
    given = {"algorithm": "unreal", **SETTINGS, **settings}
    return make_learner(given, "maze", environment, seed)


def filled(agent: UNREAL, rollouts: int = 4) -> UNREAL:
    for _ in range(rollouts):
        agent.act()
    return agent


def gradient_of(agent: UNREAL, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradient, by the parameters' names."""
    agent.parameters.zero_gradient()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = agent.parameters.gradient
    return {name: gradient[where].clone() for name, where in agent.parameters.slices.items()}


def reached(gradient: dict[str, Tensor]) -> set[str]:
    """Parts of the network, the critic, and the tasks' heads in it."""
    parts = set()
    for name, part in gradient.items():
        first, second, *_ = name.split(".")
        if part.any():
            parts.add(second if second in TASKS else first)
    return parts


@pytest.mark.parametrize("environment", [MAZE, IMAGE], ids=["planes", "image"])
@pytest.mark.parametrize("recurrent", ["none", "lstm"])
def test_each_loss_reaches_what_it_should(environment: EnvironmentConfig, recurrent: str) -> None:
    network = {**SETTINGS["network"], "recurrent": recurrent}
    agent = filled(on(environment, network=network))
    features_of = {"adapters", "torso", *(["memory"] if recurrent == "lstm" else [])}
    pieces = agent.replay.sample_sequences(20, 7, np.random.default_rng(0))

    def features() -> Tensor:
        return agent._replayed_features(pieces.observations)

    of_pixels = gradient_of(agent, agent._pixel_control(pieces, features()))
    assert reached(of_pixels) == {*features_of, "pixel_control"}
    of_values = gradient_of(agent, agent._value_replay(pieces, features()))
    assert reached(of_values) == {*features_of, "critic"}
    of_rewards = gradient_of(agent, agent._reward_prediction())  # from the adapter, before the torso
    assert reached(of_rewards) == {"adapters", "reward_prediction"}
    off = on(environment, network=network, **only())
    off.act()
    assert reached(gradient_of(off, off._loss(next(off.batches())))) == {*features_of, "heads", "critic"}


def test_a_memory_begins_each_piece_empty_and_knows_what_came_before_in_it() -> None:
    agent = filled(on(MAZE, network={**SETTINGS["network"], "recurrent": "gru"}))
    pieces = agent.replay.sample_sequences(20, 7, np.random.default_rng(0))
    features = agent._replayed_features(pieces.observations)
    shown, memory = torch.from_numpy(pieces.observations), torch.zeros(20, 8)
    never = torch.zeros(1, 20, dtype=torch.bool)
    for t in range(8):
        now, states = agent.network.unroll(shown[t : t + 1], "maze", memory, never)
        memory = states[0]
        torch.testing.assert_close(features[t], now[0])


def pseudo_reward(before: np.ndarray, after: np.ndarray, size: int) -> np.ndarray:
    """Mean absolute change of each cell of two frames [H, W, C] in 0..1."""
    rows, columns = before.shape[0] // size, before.shape[1] // size
    top, left = (before.shape[0] - rows * size) // 2, (before.shape[1] - columns * size) // 2
    change = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            for i in range(size):
                for j in range(size):
                    y, x = top + row * size + i, left + column * size + j
                    change[row, column] += np.abs(after[y, x] - before[y, x]).mean() / size**2
    return change


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "dots", [{}, {"channels_first": True}, {"image": True}, {"image": True, "channels_first": True}]
)
def test_pixel_control_is_n_step_q_learning_of_every_cell(mode: AutoresetMode, dots: dict[str, Any]) -> None:
    agent = filled(on_dots(mode, dots))
    pieces = agent.replay.sample_sequences(40, 5, np.random.default_rng(0))
    features = agent._replayed_features(pieces.observations)
    head = agent.value_head.get_submodule("pixel_control")
    shown = pieces.observations / (255.0 if "image" in dots else 1.0)
    if "channels_first" in dots:
        shown = np.moveaxis(shown, 2, -1)
    assert pieces.terminated.any() and (pieces.valid.sum(0) < 5).sum() > pieces.terminated.any(0).sum()
    total, steps = 0.0, 0
    for piece in range(40):
        q = head(features[:, piece]).detach().numpy()  # [T + 1, A, h, w]
        length = int(pieces.valid[:, piece].sum())
        following = q[length].max(axis=0) * (not pieces.terminated[length - 1, piece])
        for t in reversed(range(length)):
            following = pseudo_reward(shown[t, piece], shown[t + 1, piece], 2) + 0.9 * following
            total += 0.5 * ((following - q[t, pieces.actions[t, piece]]) ** 2).sum()
            steps += 1
    assert agent._pixel_control(pieces, features).item() == pytest.approx(total / steps, rel=1e-5)


@pytest.mark.parametrize("popart", [False, True])
def test_value_replay_is_regression_on_n_step_returns(popart: bool) -> None:
    agent = filled(on_dots(popart=popart, reward_scale=3.0))
    agent.popart.set_state({"mu": 0.4, "variance": 4.0, "weight": 1.0})
    pieces = agent.replay.sample_sequences(40, 5, np.random.default_rng(0))
    features = agent._replayed_features(pieces.observations)
    outputs = agent.value_head(features)[..., 0].detach().numpy()
    total, steps = 0.0, 0
    for piece in range(40):
        length = int(pieces.valid[:, piece].sum())
        following = (2 * outputs[length, piece] + 0.4) * (not pieces.terminated[length - 1, piece])
        for t in reversed(range(length)):
            following = 3 * pieces.rewards[t, piece] + 0.99 * following
            total += 0.5 * ((following - 0.4) / 2 - outputs[t, piece]) ** 2
            steps += 1
    assert agent._value_replay(pieces, features).item() == pytest.approx(total / steps, rel=1e-5)


def test_targets_get_no_gradient() -> None:
    agent = filled(on_dots())
    pieces = agent.replay.sample_sequences(10, 4, np.random.default_rng(0))
    steps = torch.from_numpy(pieces.valid)
    acted_on = torch.cat(
        [steps, torch.zeros_like(steps[:1])]
    )  # the frame after the last step is a target alone
    for task in (agent._pixel_control, agent._value_replay):
        features = agent._replayed_features(pieces.observations).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(task(pieces, features), features)
        assert not gradient[~acted_on].any() and gradient[acted_on].any(1).all()


def test_rewards_are_predicted_from_the_adapters_output_of_three_frames() -> None:
    agent = filled(on_dots(**only("reward_prediction")))
    state = agent._replaying.bit_generator.state
    loss = agent._reward_prediction()
    agent._replaying.bit_generator.state = state
    frames, rewards = agent.replay.sample_rewards(9, 3, agent._replaying)
    assert frames.shape == (9, 3, 7, 6, 2)
    adapter = next(iter(agent.network.adapters.values()))
    encoded = [adapter(torch.from_numpy(frames[:, frame])) for frame in range(3)]
    logits = agent.value_head.get_submodule("reward_prediction")(torch.cat(encoded, dim=1))
    torch.testing.assert_close(loss, reward_prediction_loss(logits, torch.from_numpy(rewards)))


def test_without_three_frames_of_an_episode_no_reward_is_predicted() -> None:
    agent = filled(on_dots(dots={"longest": 2}, **only("reward_prediction")))
    agent.parameters.zero_gradient()
    agent.backward(next(agent.batches()))
    assert agent._parts[-1]["loss/reward_prediction"].tolist() == [0.0]


def test_the_loss_is_the_weighted_sum_and_backward_adds_its_gradient() -> None:
    scales = {"pixel_control": 0.3, "reward_prediction": 2.0, "value_replay": 0.7}
    agent = filled(on_dots(**{f"{task}_weight": scale for task, scale in scales.items()}))
    batch = next(agent.batches())
    state = agent._replaying.bit_generator.state
    agent.parameters.zero_gradient()
    loss = agent.backward(batch)
    whole = agent.parameters.gradient.clone()
    agent._replaying.bit_generator.state = state
    agent.parameters.zero_gradient()
    base = IMPALA._loss(agent, batch)
    base.backward()
    pieces = agent.replay.sample_sequences(5, 7, agent._replaying)
    parts = {
        "pixel_control": agent._pixel_control(pieces, agent._replayed_features(pieces.observations)),
        "value_replay": agent._value_replay(pieces, agent._replayed_features(pieces.observations)),
        "reward_prediction": agent._reward_prediction(),
    }
    for task, part in parts.items():
        (scales[task] * part).backward()
    expected = base.detach() + sum(scales[task] * part.detach() for task, part in parts.items())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(agent.parameters.gradient, whole, rtol=1e-4, atol=1e-6)
    shown = {task: agent._parts[0][f"loss/{task}"] for task in TASKS}
    torch.testing.assert_close(shown, {task: parts[task].detach().reshape(1) for task in TASKS})
    agent.backward(batch)
    assert not torch.allclose(agent.parameters.gradient, whole)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy_lag": 3, "epochs": 2},
        {"popart": True},
        {"network": {**SETTINGS["network"], "recurrent": "lstm"}},
    ],
)
def test_with_every_task_off_it_is_impala_bit_for_bit(settings: dict[str, Any]) -> None:
    unreal = on(MAZE, **only(), **settings)
    shared = {
        name: value for name, value in SETTINGS.items() if not name.startswith(("replay", "reward", "cell"))
    }
    plain: Any = make_learner({**shared, "algorithm": "impala", **settings}, "maze", MAZE, 0)
    assert list(unreal.train()) == list(plain.train())
    state, expected = unreal.get_state(), plain.get_state()
    assert set(state) - set(expected) == {"sequences", "replaying"}
    assert unreal.parameters.slices == plain.parameters.slices
    assert torch.equal(unreal.parameters.values, plain.parameters.values)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_acts_alike_until_it_has_learnt(task: str) -> None:
    alone, off = on(MAZE, **only(task)), on(MAZE, **only())
    alone.act()
    off.act()
    np.testing.assert_array_equal(alone.rollout.actions, off.rollout.actions)
    metrics = next(alone.train()).metrics
    assert {name for name in metrics if name.removeprefix("loss/") in TASKS} == {f"loss/{task}"}
    heads = {name for name, _ in alone.value_head.named_children()}
    assert heads == {task} - {"value_replay"}  # whose head is the critic
    next(off.train())
    count = len(off.parameters.values)
    assert not torch.equal(alone.parameters.values[:count], off.parameters.values)


def test_the_grid_of_the_head_is_that_of_the_cells() -> None:
    torch.manual_seed(0)
    for cells in ((1, 1), (2, 3), (5, 5), (20, 20), (11, 10)):
        head = PixelControlHead(7, 4, cells)
        q_values = head(torch.randn(3, 7))
        assert q_values.shape == (3, 4, *cells)
        assert (q_values.std(dim=1) > 0).all()
    assert head._coarse == (5, 4)
    # Dueling: the advantages' mean over the actions is taken off, so a shift of all of them is nothing.
    with torch.no_grad():
        head.deconvolution.bias[1:] += 5.0
    features = torch.randn(3, 7)
    before = head(features)
    with torch.no_grad():
        head.deconvolution.bias[0] += 2.0
    torch.testing.assert_close(head(features), before + 2.0)
    with torch.no_grad():
        head.deconvolution.bias[1:] -= 5.0
    torch.testing.assert_close(head(features), before + 2.0)


def test_the_checkpoint_is_the_network_alone(tmp_path: Path) -> None:
    agent = on(MAZE)
    names = list(agent.parameters.slices)
    own = [name for name, _ in agent.network.named_parameters()]
    assert names[: len(own)] == own and all(name.startswith("critic.") for name in names[len(own) :])
    assert {"critic.weight", "critic.pixel_control.dense.weight", "critic.reward_prediction.0.bias"} < set(
        names
    )
    list(agent.train())
    save_checkpoint(tmp_path / "actor", agent.network, {})
    loaded = load_checkpoint(tmp_path / "actor").network
    assert [name for name, _ in loaded.named_parameters()] == own and loaded.spec.output == "logits"
    shown = np.random.default_rng(0).random((5, 5, 5, 3)) < 0.5
    np.testing.assert_array_equal(loaded(torch.from_numpy(shown), "maze").detach(), agent.outputs(shown))


def test_given_parameters_are_the_ones_that_learn() -> None:
    own, other = on_dots(), on_dots()
    network = fresh_network(SIZE, "dots", other.envs.spec, "logits", 0)
    head = build_critic(own.config, network, "dots", 0)
    parameters = FlatParameters(network, own.config.learning_rate, epsilon=1e-5, beside={"critic": head})
    agent = UNREAL(own.config, network, "dots", other.envs, 0, parameters, head)
    assert agent.parameters is parameters
    for learner in (own, agent):
        next(learner.train())
    assert torch.equal(own.parameters.values, parameters.values)


def test_joint_training_gives_every_environment_its_own_heads_and_replay() -> None:
    learner = {"algorithm": "unreal", **SETTINGS}
    del learner["network"]
    other = EnvironmentConfig(id="stillhouse/Maze-v0", options={"size": 7}, max_episode_steps=12)
    environments = {"small": MAZE, "large": other}
    config = HardSharingConfig(network=SIZE)
    joint, again = (hard_sharing(config, learner, environments, 0) for _ in range(2))
    slices = joint.learners["small"].parameters.slices
    for name in environments:
        assert f"critic.{name}.pixel_control.deconvolution.weight" in slices
    begin = joint.learners["small"].parameters.values.clone()
    reports = list(joint.train())
    assert reports[-1].done == 1200 and "loss/pixel_control" in reports[-1].metrics
    moved = joint.learners["small"].parameters.values != begin
    assert all(moved[place].any() for place in slices.values())
    for _, report in zip(range(3), again.train(), strict=False):
        middle = report
    state = again.get_state()
    resumed = hard_sharing(config, learner, environments, 0)
    resumed.set_state(state)
    assert middle == reports[2] and list(resumed.train()) == reports[3:]


@pytest.mark.parametrize("environment", [MAZE, IMAGE], ids=["planes", "image"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"policy_lag": 3, "popart": True, "network": {**SETTINGS["network"], "recurrent": "gru"}}],
)
def test_interrupted_and_uninterrupted_end_in_the_same_bytes(
    environment: EnvironmentConfig, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, interrupted, resumed, other = (on(environment, seed, **settings) for seed in (0, 0, 0, 1))
    reports = list(whole.train())
    for count, _ in enumerate(interrupted.train()):
        if count == len(reports) // 2:
            break
    save_state(tmp_path / "state", interrupted.get_state())
    resumed.set_state(load_state(tmp_path / "state"))
    assert list(resumed.train()) == reports[count + 1 :]
    for name, agent in (("a", whole), ("b", resumed)):
        save_state(tmp_path / name, agent.get_state())
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    list(other.train())
    assert not torch.equal(other.parameters.values, whole.parameters.values)


def test_pieces_do_not_go_on_in_episodes_that_were_cut() -> None:
    agent = filled(on_dots(), 2)
    state = agent.get_state()
    other = on_dots()
    other.set_state(state)
    assert not other.envs.cut_episodes
    np.testing.assert_array_equal(other.replay._kinds, agent.replay._kinds)
    del state["envs"]["replay"]  # as of an environment that cannot be brought back
    other.set_state(state)
    assert other.envs.cut_episodes == 6
    newest = other.replay._kinds[np.arange(6), other.replay._next - 1]
    assert not (newest == 1).any()  # a step that would go on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pixel_control_weight": -1.0},
            r"maze\.pixel_control_weight: .*greater than or equal to 0, but -1.0",
        ),
        (
            {"replay_length": 40, "replay_steps": 40},
            r"replay_length must be below replay_steps \(40\), but it is 40",
        ),
        ({"rollout_length": 1}, "rollout_length must be at least 2, but it is 1"),
        ({"lambda_pc": 1.0}, r"maze\.lambda_pc: unknown parameter"),
        ({"num_envs": 4, "minibatches": 5}, "at most num_envs"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillhouseError, match=message) as refusal:
        parse(UNREALConfig, settings, "maze")
    assert "\n" not in str(refusal.value)


def test_pixel_control_of_what_has_no_pixels_is_refused_in_one_line() -> None:
    cartpole = EnvironmentConfig(id="CartPole-v1")
    with pytest.raises(
        StillhouseError,
        match=r"maze: pixel control needs planes or an image.*'vector'; set pixel_control_weight to 0",
    ) as refusal:
        on(cartpole)
    assert "\n" not in str(refusal.value)
    with pytest.raises(StillhouseError, match=r"cell_size must be at most .* \(5 x 5\), but it is 6"):
        on(MAZE, cell_size=6)
    agent = on(cartpole, **only("reward_prediction", "value_replay"))
    assert list(agent.train())[-1].done == 600


LEARNING = {
    "num_envs": 64,
    "rollout_length": 16,
    "minibatches": 8,
    "learning_rate": 3e-3,
    "replay_steps": 500,
    "replay_batch": 8,
    "reward_batch": 32,
    "pixel_control_weight": 0.05,
    "cell_size": 1,
    "network": {"layer_norm": True},
}


@pytest.mark.learning
def test_the_auxiliary_tasks_are_learnt() -> None:
    """In a fixed maze rewards and changes can be told from what is seen."""
    maze = EnvironmentConfig(id="stillhouse/Maze-v0", options={"size": 7}, max_episode_steps=50)
    for seed in range(2):
        agent = on(maze, seed, **LEARNING, env_steps=30_000)
        reports = list(agent.train())
        first, last = reports[0].metrics, reports[-1].metrics
        # Half of the rewards are not zero: who does not look cannot do better than log 2.
        assert last["loss/reward_prediction"] < np.log(2) / 2
        assert last["loss/pixel_control"] < 0.65 * first["loss/pixel_control"]


@pytest.mark.learning
def test_learns_to_find_the_goal() -> None:
    """Five seeds against five untrained networks: a permutation test on greedy returns."""
    from scipy.stats import permutation_test

    options = {"size": 5, "random_goal": False}
    maze = EnvironmentConfig(id="stillhouse/Maze-v0", options=options, max_episode_steps=15)
    trained, untrained = [], []
    for seed in range(5):
        agent = on(maze, seed, **LEARNING, env_steps=20_000)
        untrained.append(evaluate(agent.outputs, maze, 50, seed).returns.mean())
        list(agent.train())
        trained.append(evaluate(agent.outputs, maze, 50, seed).returns.mean())
    result = permutation_test(
        (trained, untrained), lambda a, b: np.mean(a) - np.mean(b), alternative="greater", n_resamples=np.inf
    )
    assert result.pvalue < 0.05
    assert np.mean(trained) > 0.9
