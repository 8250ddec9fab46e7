"""One run of stable-baselines3's PPO, in an environment that has it and not this project: started by ``benchmarks.ppo``.

Reads the settings as JSON from its only argument and prints the result as JSON.
"""

import json
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    envs = make_vec_env(settings["environment"], settings["num_envs"], seed=settings["seed"])
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=settings["learning_rate"],
        n_steps=settings["rollout_length"],
        batch_size=settings["batch_size"],
        n_epochs=settings["epochs"],
        gamma=settings["gamma"],
        gae_lambda=settings["trace"],
        clip_range=settings["clip_range"],
        ent_coef=settings["entropy_coefficient"],
        vf_coef=settings["value_coefficient"],
        max_grad_norm=settings["max_gradient_norm"],
        policy_kwargs={"net_arch": settings["widths"], "activation_fn": torch.nn.ReLU},
        seed=settings["seed"],
        device="cpu",
    )
    wall, processor = time.perf_counter(), time.process_time()
    model.learn(settings["env_steps"])
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    test_envs = make_vec_env(settings["environment"], 8, seed=10_000 + 1_000 * settings["seed"])
    mean_return, _ = evaluate_policy(model, test_envs, settings["episodes"], deterministic=True)
    print(
        json.dumps(
            {
                "env_steps": model.num_timesteps,
                "wall_seconds": wall,
                "processor_seconds": processor,
                "mean_return": float(mean_return),
            }
        )
    )


if __name__ == "__main__":
    main()
