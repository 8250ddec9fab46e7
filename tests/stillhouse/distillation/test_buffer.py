"""The buffer: what went in comes out, the oldest goes first, and a student learns from data that grows or changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.checkpoint import load_state, save_state
from stillhouse.distillation.buffer import LabelledBuffer
from stillhouse.distillation.student import StudentConfig, StudentTraining
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import NetworkSize
from stillhouse.types import EnvironmentSpec, ObservationSpec

PLANES = EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(5, 5, 2)), actions=3)
LINE = EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(3,)), actions=2)
TEACHER = np.array([[1.0, -1.0], [0.5, 2.0], [-1.0, 0.3]])


def fill(buffer: LabelledBuffer, rows: int, seed: int, scale: float = 1.0) -> None:
    """Random observations with a linear teacher's outputs; every fifth copy is held out."""
    random = np.random.default_rng(seed)
    observations = random.normal(size=(rows, 3)).astype(np.float32)
    outputs = (scale * observations @ TEACHER).astype(np.float32)
    buffer.append(observations, outputs, np.arange(rows) % 5 == 0)


def training(buffer: LabelledBuffer, **settings) -> StudentTraining:
    defaults = {"batch_size": 32, "updates": 400, "learning_rate": 5e-3, "size": NetworkSize(features=16)}
    return StudentTraining(StudentConfig(**{**defaults, **settings}), {"line": buffer}, seed=0)


def test_rows_come_out_as_they_went_in_and_the_oldest_go_first() -> None:
    random = np.random.default_rng(0)
    buffer = LabelledBuffer(PLANES, "logits", 7, capacity=10)
    observations = random.random((24, 5, 5, 2)) < 0.5
    outputs = random.normal(size=(24, 3)).astype(np.float32)
    for start in range(0, 24, 4):
        buffer.append(observations[start : start + 4], outputs[start : start + 4])
        kept = np.arange(max(0, start + 4 - 10), start + 4)
        assert len(buffer) == len(kept)
        rows = kept % 10
        np.testing.assert_array_equal(buffer.observations(rows), observations[kept])
        np.testing.assert_array_equal(buffer.outputs(rows), outputs[kept])
    assert buffer.schema.environment == PLANES
    assert (buffer.schema.output, buffer.schema.teacher_parameters) == ("logits", 7)
    best = np.sort(outputs[-10:], axis=1)
    assert buffer.schema.mean_action_gap == pytest.approx((best[:, 2] - best[:, 1]).mean(), rel=1e-6)
    with pytest.raises(ValueError, match="11 rows"):
        buffer.append(observations[:11], outputs[:11])


def test_held_out_rows_are_apart_and_resume(tmp_path: Path) -> None:
    buffer = LabelledBuffer(LINE, "q_values", 0, capacity=12)
    fill(buffer, 10, 0)
    fill(buffer, 10, 1)  # to rows 10, 11, 0..7
    save_state(tmp_path / "state", buffer.get_state())
    other = LabelledBuffer(LINE, "q_values", 0, capacity=12)
    other.set_state(load_state(tmp_path / "state"))
    fill(buffer, 3, 2)
    fill(other, 3, 2)
    for one in (buffer, other):
        rows, held = one.split(0.1, np.random.default_rng(0))
        assert held.tolist() == [3, 8]
        assert sorted([*rows, *held]) == list(range(12))
    np.testing.assert_array_equal(buffer.outputs(np.arange(12)), other.outputs(np.arange(12)))
    np.testing.assert_array_equal(buffer.observations(np.arange(12)), other.observations(np.arange(12)))


def test_a_student_learns_from_data_that_grows() -> None:
    buffer = LabelledBuffer(LINE, "q_values", 0, capacity=4000)
    student = training(buffer)
    with pytest.raises(StillhouseError, match=r"line: no transition"):
        student.update(1)
    agreements = []
    for seed in range(8):
        fill(buffer, 200, seed)
        student.grown("line")
        agreements.append(student.measure(student.update(50))["agreement/line"])
    assert agreements[-1] > 0.95
    assert student.finished
    assert student.best["eval/agreement"] == max(agreements)


def test_without_held_out_rows_the_latest_weights_are_the_result() -> None:
    buffer = LabelledBuffer(LINE, "q_values", 0, capacity=100)
    fill(buffer, 100, 0)
    buffer._columns["held_out"][:] = False
    student = training(buffer)
    for _ in range(3):
        assert "eval/agreement" not in student.measure(student.update(5))
        assert student.best["update"] == student.updates
    latest, best = student.student(best=False), student.student()
    for one, other in zip(latest.parameters(), best.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_replaced_data_keeps_the_outputs_and_forgets_the_best(loss: str) -> None:
    old, new = (LabelledBuffer(LINE, "q_values", 0, capacity=1000) for _ in range(2))
    fill(old, 1000, 0)
    fill(new, 1000, 1, scale=-40.0)
    student = training(old, loss=loss, updates=1000)
    student.measure(student.update(400))
    assert student.best["agreement/line"] > 0.9
    probe = torch.from_numpy(new.observations(np.arange(50)))
    before = student.student(best=False)(probe, "line")
    student.replace("line", new)
    assert student.best == {}
    torch.testing.assert_close(student.student(best=False)(probe, "line"), before, rtol=1e-4, atol=1e-4)
    assert student.measure(student.update(600))["agreement/line"] > 0.9
    if loss == "mse":
        outputs = student.student()(probe, "line").detach().numpy()
        teacher = new.outputs(np.arange(50))
        assert np.square(outputs - teacher).mean() < 0.05 * teacher.var()
    with pytest.raises(StillhouseError, match=r"line: new data must have the spaces"):
        student.replace("line", LabelledBuffer(PLANES, "q_values", 0, capacity=10))


def test_growing_data_resumes_exactly(tmp_path: Path) -> None:
    def step(buffer: LabelledBuffer, student: StudentTraining, seed: int) -> dict[str, float]:
        fill(buffer, 60, seed)
        student.grown("line")
        return student.measure(student.update(10))

    buffer = LabelledBuffer(LINE, "q_values", 0, capacity=100)
    student = training(buffer, loss="mse")
    step(buffer, student, 0)
    save_state(tmp_path / "state", {"buffer": buffer.get_state(), "student": student.get_state()})
    expected = [step(buffer, student, seed) for seed in (1, 2)]

    other = LabelledBuffer(LINE, "q_values", 0, capacity=100)
    resumed = training(other, loss="mse")
    state = load_state(tmp_path / "state")
    other.set_state(state["buffer"])
    resumed.set_state(state["student"])
    assert [step(other, resumed, seed) for seed in (1, 2)] == expected
    assert torch.equal(resumed.parameters.values, student.parameters.values)
