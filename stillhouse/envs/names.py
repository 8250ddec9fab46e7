"""What an environment's observation components and actions are called, for tables and pictures.

An environment may say so itself, in ``metadata["observation_names"]`` and ``metadata["action_names"]`` (MinAtar and the mazes
do); some of Gymnasium's are known here, under our ids too.
"""

from __future__ import annotations

from stillhouse.envs.make import EnvironmentConfig, make
from stillhouse.errors import StillhouseError
from stillhouse.types import EnvironmentSpec, environment_spec

# By the id without its version.
_COMPONENTS = {
    "CartPole": ("position", "velocity", "angle", "angular_velocity"),
    "Acrobot": ("cos_1", "sin_1", "cos_2", "sin_2", "velocity_1", "velocity_2"),
    "MountainCar": ("position", "velocity"),
    "LunarLander": (
        "x",
        "y",
        "velocity_x",
        "velocity_y",
        "angle",
        "angular_velocity",
        "left_leg",
        "right_leg",
    ),
}
_ACTIONS = {
    "CartPole": ("left", "right"),
    "Acrobot": ("negative_torque", "no_torque", "positive_torque"),
    "MountainCar": ("left", "none", "right"),
    "LunarLander": ("none", "left_engine", "main_engine", "right_engine"),
}


def component_names(config: EnvironmentConfig) -> list[str]:
    """A name for each entry of a vector, value of a discrete observation or channel of planes and images; [] if unknown.

    Raises:
        StillhouseError: the environment cannot be made, or names that it declares do not fit its observations.
    """
    spec, declared = _made(config, "observation_names")
    shape = spec.observation.shape
    count = shape[0] if spec.observation.channels_first else shape[-1]
    return _names(config, "observation_names", declared, _COMPONENTS, count)


def action_names(config: EnvironmentConfig) -> list[str]:
    """A name for each action; [] if unknown.

    Raises:
        StillhouseError: the environment cannot be made, or names that it declares do not fit its actions.
    """
    spec, declared = _made(config, "action_names")
    return _names(config, "action_names", declared, _ACTIONS, spec.actions)


def _made(config: EnvironmentConfig, key: str) -> tuple[EnvironmentSpec, object]:
    env = make(config)
    try:
        return environment_spec(env.observation_space, env.action_space, config.id), env.metadata.get(key)
    finally:
        env.close()


def _names(
    config: EnvironmentConfig, key: str, declared: object, known: dict[str, tuple[str, ...]], count: int
) -> list[str]:
    if declared is None:
        names = list(known.get(config.id.removeprefix("stillhouse/").rpartition("-v")[0], ()))
        return names if len(names) == count else []  # a wrapper in between may show something else
    if not isinstance(declared, list | tuple) or not all(isinstance(name, str) for name in declared):
        raise StillhouseError(
            f"environment {config.id!r}: metadata[{key!r}] must be a list of words, not {declared!r}"
        )
    if len(declared) != count:
        raise StillhouseError(
            f"environment {config.id!r}: metadata[{key!r}] holds {len(declared)} names where {count} are needed"
        )
    return list(declared)
