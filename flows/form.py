"""The forms of the flows: what their fields mean. Without Prefect, so that planning need not wait for it."""

from __future__ import annotations

from typing import Any

_SUITES_OWN = (0, 0.0, "", "suite")  # the value of a field that leaves the suite as it is
_KEYS = {
    "loss": "distill_student.loss",
    "temperature": "distill_student.temperature",
    "student_share": "distill_student.parameter_fraction",
    "transfer": "fine_tune.modes",
    "method": "train_multi_task.method",
    "balancing": "train_multi_task.balancing",
    "device": "device",
}


def flat_overrides(seeds: int = 0, budget: float = 1.0, **fields: Any) -> list[str]:
    """A form's fields as ``key=value``, where they differ from "the suite's own".

    Args:
        seeds: number of seeds, counted from 0; 0: the suite's own.
        budget: factor on every budget.
        fields: the others, by their names.
    """
    found = [f"seeds={list(range(seeds))}"] if seeds else []
    found += [f"budget={budget}"] if budget != 1.0 else []
    for name, value in fields.items():
        if value not in _SUITES_OWN:
            found.append(f"{_KEYS[name]}={f'[{value}, scratch]' if name == 'transfer' else value}")
    return found
