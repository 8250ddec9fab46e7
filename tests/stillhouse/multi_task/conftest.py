"""Environments: one that breaks, and one that several variants of can be learnt together in seconds."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

torch.set_num_threads(1)


class Breaking(gymnasium.Env[np.ndarray, int]):
    """Pays 1 for action 0, and from step ``sound_steps`` of an episode on NaN, or by ``chance``; lasts for ``length`` steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": []}

    def __init__(self, sound_steps: int = 40, chance: float = 0.0, length: int = 10**9) -> None:
        self.sound_steps, self.chance, self.length = sound_steps, chance, length
        self.steps = 0

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        sound = self.steps <= self.sound_steps and self.np_random.random() >= self.chance
        reward = float(action == 0) if sound else float("nan")
        return self._observation(), reward, self.steps == self.length, False, {}


class Naming(gymnasium.Env[int, int]):
    """Shows a number, pays ``pay`` for naming the one ``shift`` further; 10 steps an episode. Random play gets a quarter."""

    observation_space = gymnasium.spaces.Discrete(4)
    action_space = gymnasium.spaces.Discrete(4)
    metadata = {"render_modes": []}

    def __init__(self, shift: int = 0, pay: float = 1.0) -> None:
        self.shift, self.pay = shift, pay

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.shown = 0, int(self.np_random.integers(4))
        return self.shown, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = self.pay * float(action == (self.shown + self.shift) % 4)
        self.count, self.shown = self.count + 1, int(self.np_random.integers(4))
        return self.shown, reward, self.count == 10, False, {}


gymnasium.register("test/Breaking-v0", Breaking)
gymnasium.register("test/Naming-v0", Naming)
