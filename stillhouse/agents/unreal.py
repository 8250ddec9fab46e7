"""UNREAL: IMPALA with unsupervised auxiliary tasks on a replay of what it met (Jaderberg et al. 2016, arXiv:1611.05397).

Beside the actor-critic's loss, three more descend through the same network, each with a weight of its own; a weight of 0
turns a task off, and without any this is :mod:`stillhouse.agents.impala`, bit for bit (equation 2, negated for descent):

    L = L_AC + lambda_PC sum_c L_PC^(c) + lambda_RP L_RP + lambda_VR L_VR

    pixel control      L_PC^(c) = mean 1/2 (R_t^(c) - Q^(c)(s_t, a_t))^2,   R_t^(c) = r_t^(c) + gamma_PC R_{t+1}^(c) to the piece's end,
                       and there max_a Q^(c)(s, a); r_t^(c) is the mean absolute change of what is seen in cell c
    reward prediction  L_RP = mean cross-entropy of the sign of r_t, from the last three frames s_{t-2}, s_{t-1}, s_t; half of the
                       samples have r_t != 0
    value replay       L_VR = mean 1/2 (R_t - V(s_t))^2, R_t the n-step return to the piece's end and V(s) there

Pixel control and value replay are fitted to pieces of the episodes in the replay, which never run over an episode's end. Q comes
from the network's features by a dense layer, one deconvolution and a dueling head; reward prediction from the adapter's output, the
encoder without memory, of each of its three frames. The auxiliary heads are trained beside the network and are no part of a checkpoint.

Deviations from the paper:

1. The base is IMPALA (deviations there) instead of A3C: one process whose copies are stepped together. The replay holds the last
   2,000 rows of each copy (an episode's last frame takes one), as the paper's of each worker.
2. Pixel control and value replay share their pieces, and so one pass through the network; in the paper each samples its own.
3. Pieces start at steps drawn uniformly and end at the latest after ``replay_length`` steps, earlier where the episode ends; losses
   are means over steps. A time limit is no terminal state: pixel control and value replay bootstrap from the true final observation.
4. The bootstrap values come from the present parameters, without a gradient; there is no target network.
5. Cells are ``cell_size`` x ``cell_size`` pixels of planes or pictures in 0..1 (84 x 84 pictures with cells of 4 x 4 on a central crop
   in the paper), so that the grid's size, and with it the sum over cells, follows the observation.
6. The network has no last action and reward as inputs. A memory (``network.recurrent``) begins each piece empty, wherever in its
   episode that begins.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import seeding
from stillhouse.agents.impala import IMPALA, IMPALAConfig, Sequences, build_parameters, build_value_head
from stillhouse.envs.vector import Step, VectorEnvironment
from stillhouse.errors import StillhouseError
from stillhouse.losses.auxiliary import (
    pixel_control_loss,
    pixel_control_rewards,
    reward_prediction_loss,
    value_replay_loss,
)
from stillhouse.networks.adapters import height_width_channels
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.networks.parameters import FlatParameters
from stillhouse.replay.sequences import ReplayedSequences, SequenceReplay
from stillhouse.returns import lambda_returns
from stillhouse.types import ObservationSpec

_FRAMES = 3  # from which a reward is predicted


class UNREALConfig(IMPALAConfig):
    """IMPALA's settings and those of the auxiliary tasks."""

    algorithm: Literal["unreal"] = "unreal"  # type: ignore[assignment] # IMPALA's settings under another name
    pixel_control_weight: float = Field(
        default=0.01, ge=0, le=1000, description="lambda_PC, of the sum over cells; 0: no pixel control"
    )
    reward_prediction_weight: float = Field(
        default=1.0, ge=0, le=1000, description="lambda_RP; 0: no reward prediction"
    )
    value_replay_weight: float = Field(
        default=1.0, ge=0, le=1000, description="lambda_VR; 0: no value replay"
    )
    cell_size: int = Field(default=2, ge=1, le=256, description="side of pixel control's cells, in pixels")
    pixel_control_gamma: float = Field(
        default=0.9, ge=0, le=1, description="discount of the pseudo-rewards per env step"
    )
    replay_steps: int = Field(
        default=2000, ge=8, le=10**7, description="rows of the replay for each environment copy"
    )
    replay_length: int = Field(default=16, ge=1, le=4096, description="env steps of a piece of the replay")
    replay_batch: int = Field(default=16, ge=1, le=10_000, description="pieces in an update")
    reward_batch: int = Field(default=64, ge=1, le=10_000, description="predicted rewards in an update")

    @model_validator(mode="after")
    def _pieces_fit(self) -> UNREALConfig:
        if self.rollout_length < 2:  # where the last step of a rollout led to is not in the replay yet
            raise ValueError("rollout_length must be at least 2, but it is 1")
        if self.replay_length >= self.replay_steps:
            raise ValueError(
                f"replay_length must be below replay_steps ({self.replay_steps}), but it is {self.replay_length}"
            )
        return self


class PixelControlHead(nn.Module):
    """Features [N, n] -> Q-values of every cell, [N, A, h, w]: dense, one deconvolution (4 x 4, stride 2), dueling."""

    _MAPS = 32

    def __init__(self, features: int, actions: int, cells: tuple[int, int]) -> None:
        super().__init__()
        self._cells = cells
        # The deconvolution gives 2 n + 2 for n: 20 for the paper's 9. Of odd sides the last is left out.
        self._coarse = tuple(max(1, (side - 1) // 2) for side in cells)
        self.dense = nn.Linear(features, self._MAPS * self._coarse[0] * self._coarse[1])
        self.deconvolution = nn.ConvTranspose2d(self._MAPS, 1 + actions, 4, 2)

    def forward(self, features: Tensor) -> Tensor:
        maps = torch.relu(self.dense(features)).view(-1, self._MAPS, *self._coarse)
        values, advantages = self.deconvolution(maps)[..., : self._cells[0], : self._cells[1]].split(
            [1, self.deconvolution.out_channels - 1], dim=1
        )
        q_values: Tensor = values + advantages - advantages.mean(1, keepdim=True)
        return q_values


class RewardPredictionHead(nn.Sequential):
    """Adapter outputs of three frames, side by side [N, 3 n] -> logits of negative, zero and positive [N, 3]."""

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(_FRAMES * features, 128), nn.ReLU(), nn.Linear(128, 3))


def build_critic(config: UNREALConfig, network: MultiTaskNetwork, environment: str, seed: int) -> nn.Linear:
    """IMPALA's fresh critic, and in it, as its modules of their names, the heads of the auxiliary tasks that are on.

    Args:
        config: settings.
        network: on whose features and device they are.
        environment: name of the network's head.
        seed: the stage's seed; torch's global generator is left as it was.

    Raises:
        StillhouseError: pixel control on what has no pixels, or cells larger than it.
    """
    critic = build_value_head(network, seed)
    spec = network.spec.environments[environment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, "auxiliary"))
        if config.pixel_control_weight:
            cells = _cells(spec.observation, config.cell_size, environment)
            critic.pixel_control = PixelControlHead(network.feature_count, spec.actions, cells)
        if config.reward_prediction_weight:
            critic.reward_prediction = RewardPredictionHead(network.spec.size.features)
    return critic.to(critic.weight.device)


def _cells(observation: ObservationSpec, size: int, environment: str) -> tuple[int, int]:
    """Rows and columns of the grid of cells."""
    if observation.kind not in ("planes", "image"):
        raise StillhouseError(
            f"{environment}: pixel control needs planes or an image, but the observations are of kind {observation.kind!r}; "
            "set pixel_control_weight to 0"
        )
    height, width, _ = height_width_channels(observation)
    if size > min(height, width):
        raise StillhouseError(
            f"{environment}: cell_size must be at most the observation's sides ({height} x {width}), but it is {size}"
        )
    return height // size, width // size


class UNREAL(IMPALA):
    """The learner: see :class:`stillhouse.agents.impala.IMPALA`.

    Args:
        config: settings.
        network: logits for ``environment``; trained in place.
        environment: name of the network's head and adapter.
        envs: the copies to act in; ``num_envs`` of them.
        seed: the stage's seed.
        parameters: the network's and the value head's, where somebody else made them; own ones where none are given.
        value_head: from :func:`build_critic`, with ``parameters``.

    Raises:
        StillhouseError: pixel control on what has no pixels, or cells larger than it.
    """

    config: UNREALConfig

    def __init__(
        self,
        config: UNREALConfig,
        network: MultiTaskNetwork,
        environment: str,
        envs: VectorEnvironment,
        seed: int,
        parameters: FlatParameters | None = None,
        value_head: nn.Linear | None = None,
    ) -> None:
        value_head = value_head or build_critic(config, network, environment, seed)
        parameters = parameters or build_parameters(config, network, {"critic": value_head})
        super().__init__(config, network, environment, envs, seed, parameters, value_head)
        observation = envs.spec.observation
        self._channels_first = observation.channels_first
        self.replay = SequenceReplay(observation, config.replay_steps, envs.num_envs)
        self._replaying = seeding.generator(seed, "replay")

    def _stepped(self, observations: np.ndarray, actions: np.ndarray, step: Step) -> None:
        self.replay.add(observations, actions, step)

    def _loss(self, batch: Sequences) -> Tensor:
        config = self.config
        total, parts = super()._loss(batch), self._parts[-1]
        if config.pixel_control_weight or config.value_replay_weight:
            pieces = self.replay.sample_sequences(config.replay_batch, config.replay_length, self._replaying)
            features = self._replayed_features(pieces.observations)
            if config.pixel_control_weight:
                loss = self._pixel_control(pieces, features)
                total = total + config.pixel_control_weight * loss
                parts["loss/pixel_control"] = loss.detach().unsqueeze(0)
            if config.value_replay_weight:
                loss = self._value_replay(pieces, features)
                total = total + config.value_replay_weight * loss
                parts["loss/value_replay"] = loss.detach().unsqueeze(0)
        if config.reward_prediction_weight:
            loss = self._reward_prediction()
            total = total + config.reward_prediction_weight * loss
            parts["loss/reward_prediction"] = loss.detach().unsqueeze(0)
        return total

    def _replayed_features(self, observations: np.ndarray) -> Tensor:
        """The network's features [T + 1, S, n] of observations [T + 1, S, ...]; a memory begins each piece empty."""
        given = self._tensor(observations)
        nothing = self.network.initial_state(given.shape[1])
        starts = torch.zeros(given.shape[:2], dtype=torch.bool, device=self.device)
        features, _ = self.network.unroll(given, self.environment, nothing, starts)
        return features

    def _pixel_control(self, pieces: ReplayedSequences, features: Tensor) -> Tensor:
        """The loss for features [T + 1, S, n]."""
        config = self.config
        observations = self._tensor(pieces.observations)
        if self._channels_first:
            observations = observations.movedim(2, -1)
        q_values = self.value_head.get_submodule("pixel_control")(features.flatten(0, 1))
        q_values = q_values.unflatten(0, features.shape[:2])  # [T + 1, S, A, h, w]
        returns = self._returns(
            pixel_control_rewards(observations, config.cell_size),
            config.pixel_control_gamma,
            q_values.detach().amax(2),
            pieces,
        )
        return pixel_control_loss(
            q_values[:-1], self._tensor(pieces.actions), returns, self._tensor(pieces.valid)
        )

    def _value_replay(self, pieces: ReplayedSequences, features: Tensor) -> Tensor:
        """The loss for features [T + 1, S, n], in the units of the critic's own (PopArt's where it is on)."""
        outputs = self.value_head(features).squeeze(-1)
        returns = self._returns(
            self._tensor(pieces.rewards) * self.config.reward_scale,
            self.config.gamma,
            self.popart.unnormalise(outputs.detach()),
            pieces,
        )
        return value_replay_loss(outputs[:-1], self.popart.normalise(returns), self._tensor(pieces.valid))

    def _returns(self, rewards: Tensor, gamma: float, values: Tensor, pieces: ReplayedSequences) -> Tensor:
        """Returns [T, S, ...] to each piece's end, from rewards [T, S, ...] and values of its observations [T + 1, S, ...]."""
        valid = self._tensor(pieces.valid)
        going_on = torch.cat([valid[1:], torch.zeros_like(valid[:1])])
        columns = [gamma * ~self._tensor(pieces.terminated), going_on.float()]
        discounts, traces = (column.view(*column.shape, *[1] * (rewards.dim() - 2)) for column in columns)
        return lambda_returns(rewards, discounts, traces, values[1:])

    def _reward_prediction(self) -> Tensor:
        """The loss; 0 as long as no episode in the replay has three frames."""
        observations, rewards = self.replay.sample_rewards(self.config.reward_batch, _FRAMES, self._replaying)
        if not len(rewards):
            return torch.zeros((), device=self.device)
        encoded = self.network.encode(self._tensor(observations).flatten(0, 1), self.environment)
        logits = self.value_head.get_submodule("reward_prediction")(encoded.view(len(rewards), -1))
        return reward_prediction_loss(logits, self._tensor(rewards))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def get_state(self) -> dict[str, Any]:
        """IMPALA's and the replay."""
        return {
            **super().get_state(),
            "sequences": self.replay.get_state(),
            "replaying": self._replaying.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        super().set_state(state)
        self.replay.set_state(state["sequences"])
        if self.envs.cut_episodes > state["envs"]["cut_episodes"]:
            self.replay.cut()
        self._replaying.bit_generator.state = state["replaying"]
