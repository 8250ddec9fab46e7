"""Progressive networks: equation 2 by hand, frozen columns that stay, checkpoints, exact resume; feature transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.agents import fresh_network, make_learner
from stillhouse.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from stillhouse.envs.make import EnvironmentConfig
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSize, NetworkSpec, build_network
from stillhouse.transfer.feature_transfer import feature_network
from stillhouse.transfer.progressive_networks import Column, ProgressiveNetwork, progressive_network
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

torch.set_num_threads(1)
SIZE = NetworkSize(conv_channels=3, features=8, torso=(6,), layer_norm=True)
VECTOR = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(4,)), actions=2)
SPACES = {
    "vector": VECTOR,
    "discrete": EnvironmentSpec(observation=ObservationSpec(kind="discrete", shape=(7,)), actions=2),
    "planes": EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(6, 5, 3)), actions=2),
    "image": EnvironmentSpec(observation=ObservationSpec(kind="image", shape=(40, 44, 2)), actions=2),
}
CARTPOLE = EnvironmentConfig(id="CartPole-v1")


def observe(spec: EnvironmentSpec, count: int = 7, seed: int = 0) -> Tensor:
    random, observation = np.random.default_rng(seed), spec.observation
    if observation.kind == "vector":
        return torch.from_numpy(random.normal(size=(count, *observation.shape)).astype(np.float32))
    high = {"discrete": observation.shape[0], "planes": 2, "image": 256}[observation.kind]
    values = random.integers(high, size=(count, *observation.stored_shape))
    return torch.from_numpy(values.astype(observation.dtype))


def trained(
    spec: EnvironmentSpec = VECTOR, size: NetworkSize = SIZE, seed: int = 7, output: OutputKind = "q_values"
) -> MultiTaskNetwork:
    return build_network(NetworkSpec(size=size, environments={"source": spec}, output=output), seed)


def column(network: MultiTaskNetwork, components: tuple[int, ...] | None = None) -> Column:
    return Column(network, "source", components)


def progressive(
    columns: int = 1, output: OutputKind = "q_values", spec: EnvironmentSpec = VECTOR
) -> ProgressiveNetwork:
    sources = [column(trained(spec, seed=7 + i)) for i in range(columns)]
    return progressive_network("target", spec, output, sources, seed=3)


def array(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().double().numpy()
    return found


def dense(layer: Any, inputs: np.ndarray, norm: Any = None) -> np.ndarray:
    """ReLU of LayerNorm of a dense layer, in NumPy."""
    outputs = inputs @ array(layer.weight).T + array(layer.bias)
    if norm is not None:
        outputs = (outputs - outputs.mean(1, keepdims=True)) / np.sqrt(outputs.var(1, keepdims=True) + 1e-5)
        outputs = outputs * array(norm.weight) + array(norm.bias)
    return np.maximum(outputs, 0)


@pytest.mark.parametrize("columns", [1, 2])
def test_equation_2_by_hand(columns: int) -> None:
    network = progressive(columns)
    with torch.no_grad():  # nothing at its initial value
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    seen = observe(VECTOR)
    x = seen.double().numpy()
    frozen = []
    columns_of: Any = network.columns
    for each in columns_of:
        adapter = each.adapters["vector_4"]
        h1 = dense(adapter.dense, x, adapter.norm)
        frozen.append((h1, dense(each.torso.dense[0], h1, each.torso.norm[0])))
    own: Any = network.adapters["vector_4"]
    h1 = dense(own.dense, x, own.norm)

    def lateral(index: int) -> np.ndarray:  # f(V [alpha_j h_j for j < k])
        part: Any = network.laterals[index]
        scaled = [alpha * h[index] for alpha, h in zip(array(part.scales), frozen, strict=True)]
        return dense(part.adapter, np.concatenate(scaled, 1))

    # W h and U f(...) are two blocks of one matrix.
    h2 = dense(network.torso.dense[0], np.concatenate([h1, lateral(0)], 1), network.torso.norm[0])
    features = np.concatenate([h2, lateral(1)], 1)
    head = network.heads["target"]
    outputs = features @ array(head.weight).T + array(head.bias)
    np.testing.assert_allclose(network.features(seen, "target").detach().numpy(), features, atol=1e-5)
    np.testing.assert_allclose(network(seen, "target").detach().numpy(), outputs, atol=1e-5)
    assert network.feature_count == features.shape[1] == 6 + 6


def test_of_maps_the_lateral_is_a_1x1_convolution() -> None:
    network = progressive(2, spec=SPACES["planes"])
    part: Any = network.laterals[0]
    maps = [torch.randn(5, 3 * 12), torch.randn(5, 3 * 12)]
    scaled = torch.cat(
        [scale * each.view(5, 3, 4, 3) for scale, each in zip(part.scales, maps, strict=True)], 1
    )
    wanted = torch.conv2d(scaled, part.adapter.weight[:, :, None, None], part.adapter.bias).relu()
    torch.testing.assert_close(part(maps), wanted.flatten(1))


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("share_planes", [False, True])
@pytest.mark.parametrize("laterals", ["adapters", "features"])
def test_every_observation_kind(kind: str, share_planes: bool, laterals: Any) -> None:
    size, spec = SIZE.model_copy(update={"share_planes": share_planes}), SPACES[kind]
    source = trained(spec, size)
    components = tuple(range(spec.observation.shape[-1]))
    network = progressive_network(
        "target", spec, "q_values", [column(source, components)], 3, laterals=laterals
    )
    for rows in (1, 7):  # of discrete observations as many as there are values, too
        assert network(observe(spec, rows), "target").shape == (rows, 2)
    assert network.features(observe(spec), "target").shape == (7, network.feature_count)
    network(observe(spec), "target").square().sum().backward()
    trainable = [key for key, parameter in network.named_parameters() if parameter.requires_grad]
    assert not any(key.startswith("columns.") for key in trainable)
    for key in trainable:
        assert network.get_parameter(key).grad is not None, key
    # What the column gives is what the source does.
    (activations,) = network._activations(observe(spec), None)
    torch.testing.assert_close(activations[-1], source.features(observe(spec), "source"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("output", ["q_values", "logits"])
def test_its_own_column_begins_as_scratch_does(output: OutputKind) -> None:
    state = torch.random.get_rng_state()
    networks = [
        progressive(2, output),
        feature_network("target", VECTOR, output, column(trained()), seed=3),
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    scratch = fresh_network(SIZE, "target", VECTOR, output, 3)
    for network in networks:
        for key, tensor in scratch.named_parameters():
            own = network.get_parameter(key)
            assert torch.equal(own[:, : tensor.shape[1]] if tensor.ndim > 1 else own, tensor), key


def test_without_its_laterals_weights_it_is_scratch() -> None:
    network = progressive(2)
    scratch = fresh_network(SIZE, "target", VECTOR, "q_values", 3)
    with torch.no_grad():
        network.get_parameter("torso.dense.0.weight")[:, 8:] = 0
        network.get_parameter("heads.target.weight")[:, 6:] = 0
    seen = observe(VECTOR)
    torch.testing.assert_close(network(seen, "target"), scratch(seen, "target"), rtol=0, atol=1e-6)


def test_with_alpha_0_the_frozen_columns_are_not_read() -> None:
    network, seen = progressive(2), observe(VECTOR)
    before = network(seen, "target")

    def disturb(number: int) -> Tensor:
        """Outputs after the column was made another."""
        with torch.no_grad():
            for parameter in network.columns[number].parameters():
                parameter.add_(1)
            return network(seen, "target")

    assert not torch.allclose(disturb(0), before)
    with torch.no_grad():
        for part in network.laterals:
            part.scales[0] = 0  # type: ignore[operator]
    before = network(seen, "target")
    assert torch.equal(disturb(0), before)
    assert not torch.allclose(disturb(1), before)


def test_a_column_sees_what_its_source_would_have_seen() -> None:
    source = trained(VECTOR)
    wide = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(5,)), actions=2)
    # The source's third entry is none of the target's.
    network = progressive_network("target", wide, "q_values", [column(source, (4, 0, -1, 2))], 3)
    seen = observe(wide)
    shown = seen[:, [4, 0, 0, 2]] * torch.tensor([1, 1, 0, 1])
    (activations,) = network._activations(seen, None)
    torch.testing.assert_close(activations[-1], source.features(shown, "source"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "spec"),
    [
        (trained(VECTOR, SIZE.model_copy(update={"torso": (6, 6)})), VECTOR),
        (
            trained(SPACES["planes"]),
            EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(6, 6, 3)), actions=2),
        ),
        (trained(SPACES["planes"]), VECTOR),
    ],
)
def test_layers_that_do_not_match_are_refused(source: MultiTaskNetwork, spec: EnvironmentSpec) -> None:
    with pytest.raises(StillhouseError, match="column for 'source' has layers of") as caught:
        progressive_network("target", spec, "q_values", [column(trained(VECTOR)), column(source)], 3)
    assert "\n" not in str(caught.value)


def test_columns_may_have_other_widths() -> None:
    wide = trained(VECTOR, SIZE.model_copy(update={"features": 16, "torso": (10,)}))
    network = progressive_network("target", VECTOR, "q_values", [column(trained()), column(wide)], 3)
    assert [part.adapter.in_features for part in network.laterals] == [8 + 16, 6 + 10]  # type: ignore[union-attr]
    assert network(observe(VECTOR), "target").shape == (7, 2)


SETTINGS: dict[str, dict[str, Any]] = {
    "pqn": {"num_envs": 8, "rollout_length": 16, "minibatches": 4},
    "ppo": {"num_envs": 8, "rollout_length": 16, "minibatches": 4},
    "dqn": {"num_envs": 8, "learning_starts": 64, "updates_per_train": 16, "train_every": 64},
}


def learner(algorithm: str, columns: int = 2, features: bool = False, **settings: Any) -> Any:
    output: OutputKind = "logits" if algorithm == "ppo" else "q_values"
    network = progressive(columns, output)
    if features:
        network = feature_network("target", VECTOR, output, column(trained()), seed=3)
    block = {"algorithm": algorithm, "env_steps": 512, **SETTINGS[algorithm], **settings}
    return make_learner(block, "target", CARTPOLE, 0, network=network)


@pytest.mark.parametrize("algorithm", SETTINGS)
@pytest.mark.parametrize("features", [False, True])
def test_training_moves_the_laterals_and_no_frozen_column(algorithm: str, features: bool) -> None:
    agent = learner(algorithm, features=features)
    start = {name: tensor.clone() for name, tensor in agent.network.state_dict().items()}
    list(agent.train())
    for name, tensor in agent.network.state_dict().items():
        assert torch.equal(tensor, start[name]) == name.startswith("columns."), name
    assert not any(name.startswith("columns.") for name in agent.parameters.slices)


def test_the_separate_critic_is_a_plain_network() -> None:
    agent = learner("ppo", critic="separate")
    list(agent.train())
    assert not isinstance(agent.critic, ProgressiveNetwork)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_resumes_to_the_same_bytes(algorithm: str, tmp_path: Path) -> None:
    whole = learner(algorithm)
    reports = list(whole.train())
    interrupted = learner(algorithm)
    for count, _ in enumerate(interrupted.train()):
        if count == len(reports) // 2:
            break
    save_state(tmp_path / "state", interrupted.get_state())
    resumed = learner(algorithm)
    resumed.set_state(load_state(tmp_path / "state"))
    list(resumed.train())
    assert torch.equal(resumed.parameters.values, whole.parameters.values)


@pytest.mark.parametrize("features", [False, True])
def test_a_checkpoint_holds_all_columns(features: bool, tmp_path: Path) -> None:
    spec = SPACES["planes"]
    source = column(trained(spec), (1, 0, -1))
    network = (
        feature_network("target", spec, "logits", source, seed=3)
        if features
        else progressive_network("target", spec, "logits", [source, column(trained(spec, seed=8))], 3)
    )
    save_checkpoint(tmp_path / "saved", network, {"mode": "progressive_3"})
    loaded = load_checkpoint(tmp_path / "saved").network
    assert isinstance(loaded, ProgressiveNetwork) and loaded.spec == network.spec
    seen = observe(spec)
    assert torch.equal(loaded(seen, "target"), network(seen, "target"))
    assert not any(parameter.requires_grad for parameter in loaded.columns.parameters())


def test_feature_transfers_head_reads_the_sources_features_as_they_are() -> None:
    source, seen = trained(), observe(VECTOR)
    network = feature_network("target", VECTOR, "q_values", column(source, (1, 0, 2, 3)), seed=3)
    scratch = fresh_network(SIZE, "target", VECTOR, "q_values", 3)
    found = network.features(seen, "target")
    assert found.shape == (7, network.feature_count) == (7, 12)
    torch.testing.assert_close(found[:, :6], scratch.features(seen, "target"), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found[:, 6:], source.features(seen[:, [1, 0, 2, 3]], "source"), rtol=0, atol=1e-6
    )
    head = network.heads["target"]
    wanted = torch.nn.functional.linear(found, head.weight, head.bias)  # type: ignore[arg-type]
    assert torch.equal(network(seen, "target"), wanted)
    assert len(network.laterals) == 0
