"""Strict, frozen parameter blocks, and one-line errors for them."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stillhouse.errors import StillhouseError


class Config(BaseModel):
    """A parameter block: frozen, no unknown keys, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(cls: type[ConfigT], data: Any, where: str = "") -> ConfigT:
    """Check ``data`` against ``cls``.

    Args:
        cls: the parameter block's class.
        data: plain mappings, lists and scalars, as read from YAML.
        where: prefix of the field's name in an error, for example ``train_teacher.cartpole``.

    Raises:
        StillhouseError: one line naming the first offending field, the value given and what is allowed.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise StillhouseError(_one_line(cls, error, where)) from None


def near(name: str, names: list[str]) -> str:
    """``" (did you mean 'a' or 'b'?)"``, or nothing where no name is near."""
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def _one_line(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(
        [part for part in [where] if part] + [str(part) for part in first["loc"] if "[" not in str(part)]
    )
    if first["type"] == "extra_forbidden":
        fields = sorted(_fields_at(cls, first["loc"][:-1]))
        return (
            f"{path}: unknown parameter{near(str(first['loc'][-1]), fields)}; allowed are {', '.join(fields)}"
        )
    if first["type"] == "missing":
        return f"{path}: this parameter is required"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # a rule of the whole, which names what it is about
        return f"{path}: {message}{more}" if path else f"{message}{more}"
    given = repr(first["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    return f"{path or cls.__name__}: {message}, but {given} was given{more}"


def _fields_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Field names of the model that ``location`` leads to; through dicts and unions, all models found there."""
    models: list[Any] = [cls]
    for part in location:
        step: list[Any] = []
        for model in models:
            if part in model.model_fields:
                step += _models_in(model.model_fields[part].annotation)
        models = step or models
    return {field for model in models for field in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
