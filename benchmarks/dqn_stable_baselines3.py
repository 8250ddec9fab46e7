"""One run of stable-baselines3's DQN on MinAtar Breakout, in an environment that has both: started by ``benchmarks.pqn``.

The network of Young & Tian 2019 and PQN's: 16 filters of 3x3, a dense layer of 128. Prints the result as JSON; the clock
starts when learning does.
"""

import json
import time

import gymnasium
import numpy as np
import torch
from minatar import Environment
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

LEARNING_STARTS, ENV_STEPS = 1_000, 4_000


class Breakout(gymnasium.Env):
    """The package's game, planes first, as stable-baselines3 wants images."""

    def __init__(self):
        self.game = Environment("breakout")
        self.observation_space = gymnasium.spaces.Box(0, 1, (4, 10, 10), np.float32)
        self.action_space = gymnasium.spaces.Discrete(6)

    def _observation(self):
        return self.game.state().transpose(2, 0, 1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.game.seed(seed)
        self.game.reset()
        return self._observation(), {}

    def step(self, action):
        reward, terminated = self.game.act(int(action))
        return self._observation(), float(reward), bool(terminated), False, {}


class Convolution(BaseFeaturesExtractor):
    """16 filters of 3x3 and a dense layer of 128."""

    def __init__(self, space):
        super().__init__(space, 128)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 16, 3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(1024, 128),
            torch.nn.ReLU(),
        )

    def forward(self, observations):
        return self.layers(observations)


class Clock(BaseCallback):
    """The times at which learning starts and ends."""

    started = None

    def _on_step(self):
        if self.started is None and self.num_timesteps > LEARNING_STARTS:
            self.started = (time.perf_counter(), time.process_time())
        return True


torch.set_num_threads(1)
model = DQN(
    "MlpPolicy",
    Breakout(),
    learning_rate=2.5e-4,
    buffer_size=100_000,
    learning_starts=LEARNING_STARTS,
    batch_size=32,
    train_freq=1,
    gradient_steps=1,
    target_update_interval=1_000,
    policy_kwargs={
        "features_extractor_class": Convolution,
        "net_arch": [],
        "normalize_images": False,
    },
    device="cpu",
    seed=0,
)
clock = Clock()
model.learn(ENV_STEPS, callback=clock)
wall, processor = time.perf_counter() - clock.started[0], time.process_time() - clock.started[1]
print(
    json.dumps(
        {"env_steps": ENV_STEPS - LEARNING_STARTS, "wall_seconds": wall, "processor_seconds": processor}
    )
)
