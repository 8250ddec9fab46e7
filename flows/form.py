"""The form of the flow ``distillation``: what its fields mean. Without Prefect, so that planning need not wait for it."""

from __future__ import annotations


def flat_overrides(
    seeds: int,
    budget: float,
    loss: str,
    temperature: float,
    student_share: float,
    transfer: str,
    device: str,
) -> list[str]:
    """The form's fields as ``key=value``, where they differ from "the suite's own"."""
    return (
        ([f"seeds={list(range(seeds))}"] if seeds else [])
        + ([f"budget={budget}"] if budget != 1.0 else [])
        + ([f"distill_student.loss={loss}"] if loss != "suite" else [])
        + ([f"distill_student.temperature={temperature}"] if temperature else [])
        + ([f"distill_student.parameter_fraction={student_share}"] if student_share else [])
        + ([f"fine_tune.modes=[{transfer}, scratch]"] if transfer != "suite" else [])
        + ([f"device={device}"] if device != "suite" else [])
    )
