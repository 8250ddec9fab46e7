"""Behavioural cloning by the package `imitation`, for `benchmarks.distillation --part throughput`: run by a Python of its own.

Knows nothing of stillhouse. Reads numbers of updates from standard input, one a line, and answers each with the
seconds of processor time that they took.
"""

from __future__ import annotations

import sys
import time

import gymnasium
import numpy as np
import torch
from imitation.algorithms.bc import BC
from imitation.data.types import Transitions
from stable_baselines3.common.policies import ActorCriticPolicy


def main(rows: int, batch_size: int) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    observations = random.normal(size=(rows, 4)).astype(np.float32)
    transitions = Transitions(
        obs=observations,
        acts=random.integers(2, size=rows),
        infos=np.array([{}] * rows),
        next_obs=observations,
        dones=np.zeros(rows, bool),
    )
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    policy = ActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, net_arch=[32, 32])
    cloning = BC(
        observation_space=observation_space,
        action_space=action_space,
        rng=random,
        policy=policy,
        demonstrations=transitions,
        batch_size=batch_size,
        device="cpu",
    )
    for line in sys.stdin:
        started = time.process_time()
        cloning.train(n_batches=int(line), progress_bar=False, log_interval=10**9)
        # What it logs goes to standard output as well, so the answer is marked.
        print(f"seconds {time.process_time() - started}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
