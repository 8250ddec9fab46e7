"""Environment settings, and the one place where a Gymnasium id becomes environments."""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode
from pydantic import Field, field_validator

from stillhouse.config import Config, near
from stillhouse.envs import variants
from stillhouse.errors import StillhouseError

variants.register()


class EnvironmentConfig(Config):
    """One environment, by its Gymnasium id."""

    id: str = Field(min_length=1, max_length=200, description="Gymnasium id, for example CartPole-v1")
    module: str = Field(
        default="",
        max_length=200,
        description="your own module that registers the id when imported (in this folder)",
    )
    options: dict[str, bool | int | float | str | list[int]] = Field(
        default_factory=dict, description="keyword arguments of the environment, for example {gravity: 12.0}"
    )
    max_episode_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="time limit in env steps; 0 keeps the limit the id has, if any",
    )

    @field_validator("module")
    @classmethod
    def _dotted_name(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
            raise ValueError("a Python module's dotted name is allowed")
        return value

    @field_validator("id")
    @classmethod
    def _plain_id(cls, value: str) -> str:
        if ":" in value:
            raise ValueError("an id without 'module:' is allowed; name the module in the field 'module'")
        return value


def _load(config: EnvironmentConfig) -> gymnasium.envs.registration.EnvSpec:
    """Import the user's module and find the id.

    Raises:
        StillhouseError: the module does not import, or the id is unknown (near ids are named).
    """
    if config.module:
        try:
            importlib.import_module(config.module)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise StillhouseError(
                f"environment module {config.module!r} does not import ({type(error).__name__}: {' '.join(str(error).split())}); it must be "
                "importable from the folder where stillhouse runs, without errors"
            ) from error
    try:
        return gymnasium.spec(config.id)
    except gymnasium.error.Error as error:
        ids = sorted(gymnasium.registry)
        folded = {name.lower(): name for name in ids}
        if isinstance(error, gymnasium.error.VersionNotFound | gymnasium.error.DeprecatedEnv):
            stem = config.id.rpartition("-v")[0]
            versions = [name for name in ids if name.rpartition("-v")[0] == stem]
            hint = f" (registered versions: {', '.join(versions)})" if versions else ""
        else:
            hint = near(config.id.lower(), sorted(folded))
            for low, name in folded.items():
                hint = hint.replace(repr(low), repr(name))
        raise StillhouseError(
            f"unknown environment id {config.id!r}{hint}; any registered Gymnasium id is allowed, and 'module' names "
            "the module that registers your own"
        ) from None


def _arguments(config: EnvironmentConfig) -> dict[str, Any]:
    return {
        **config.options,
        **({"max_episode_steps": config.max_episode_steps} if config.max_episode_steps else {}),
    }


def make(config: EnvironmentConfig, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """One environment.

    Raises:
        StillhouseError: unknown id or module, or options the environment does not take.
    """
    _load(config)
    # An environment that cannot draw need not take the argument.
    shown: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        with _quiet():
            return gymnasium.make(config.id, disable_env_checker=True, **shown, **_arguments(config))
    except Exception as error:
        raise _refused(config, error) from error


def make_vector(config: EnvironmentConfig, num_envs: int) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """``num_envs`` copies: the id's own vectorised version where it has one, else Gymnasium's synchronous one.

    Raises:
        StillhouseError: unknown id or module, or options the environment does not take.
    """
    spec = _load(config)
    try:
        with _quiet():
            return _vector(config, spec, num_envs)
    except Exception as error:
        raise _refused(config, error) from error


def _vector(
    config: EnvironmentConfig, spec: gymnasium.envs.registration.EnvSpec, num_envs: int
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    if spec.vector_entry_point is not None:
        return gymnasium.make_vec(config.id, num_envs, "vector_entry_point", **_arguments(config))
    return gymnasium.make_vec(
        config.id,
        num_envs,
        "sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED, "copy": False},
        disable_env_checker=True,
        **_arguments(config),
    )


def describe(config: EnvironmentConfig) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    """Observation and action space of one copy.

    Raises:
        StillhouseError: the environment cannot be made.
    """
    env = make(config)
    try:
        return env.observation_space, env.action_space
    finally:
        env.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Gymnasium's "out of date": MinAtar's -v0 and -v1 are two action sets, not two releases."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        yield


def _refused(config: EnvironmentConfig, error: Exception) -> StillhouseError:
    text = " ".join(str(error).split())[:300]
    return StillhouseError(
        f"environment {config.id!r} cannot be made with options {config.options} ({type(error).__name__}: {text}); "
        "check the options and that what it needs is installed"
    )
