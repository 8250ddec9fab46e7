"""Distillation losses against values worked by hand, and what must hold for any values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.distillation import (
    action_gap_temperature,
    constant_loss,
    feature_loss,
    floored_log_policy,
    kl_loss,
    kl_to_policy,
    mse_loss,
    nll_loss,
    reverse_kl,
    teacher_log_policy,
)

LOSSES = {"nll": nll_loss, "mse": mse_loss, "kl": lambda student, teacher: kl_loss(student, teacher, 0.7)}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def pair(seed: int, batch: int, actions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, actions, generator=generator, dtype=torch.float64) * 3
    return student, teacher


def test_nll_by_hand() -> None:
    # softmax(ln 1, ln 3) = (1/4, 3/4); the teacher prefers action 1, then action 0.
    student = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    teacher = torch.tensor([[1.0, 2.0], [5.0, -5.0]])
    assert nll_loss(student, teacher).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_mse_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[2.0, 4.0], [3.0, -1.0]])
    # (1 + 4) and (9 + 1): summed over the actions, averaged over the samples.
    assert mse_loss(student, teacher).item() == pytest.approx(7.5)


def test_kl_by_hand() -> None:
    # tau 0.5 turns ln 3 / 2 into ln 3: the teacher's policy is (1/4, 3/4); the student's is (1/2, 1/2).
    student = torch.tensor([[7.0, 7.0]])
    teacher = torch.tensor([[0.0, math.log(3.0) / 2]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_loss(student, teacher, 0.5).item() == pytest.approx(expected)


def test_kl_divides_only_the_teacher() -> None:
    outputs = torch.tensor([[0.0, 1.0, 3.0]])
    assert kl_loss(outputs / 0.1, outputs, 0.1).item() == pytest.approx(0, abs=1e-6)
    assert kl_loss(outputs, outputs, 0.1).item() > 0.1  # Hinton's, dividing both, would be 0 here


def test_kl_of_a_sharp_teacher_is_the_nll() -> None:
    student, teacher = pair(0, 32, 4)
    assert kl_loss(student, teacher, 1e-4).item() == pytest.approx(
        nll_loss(student, teacher).item(), rel=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6])
def test_kl_is_finite_for_large_q_values_at_a_small_temperature(scale: float) -> None:
    teacher = (torch.tensor([[-1.0, 0.0, 1.0], [0.5, 0.5, -1.0]]) * scale).requires_grad_()
    student = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = kl_loss(student, teacher, 0.01)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_small_gaps_between_large_q_values_survive_the_temperature() -> None:
    # In float32 10000.0 / 0.01 has a resolution of 0.0625; subtracting first keeps the gap of 2^-10 exact.
    teacher = torch.tensor([[10000.0, 10000.0 + 2**-10]])
    log_policy = teacher_log_policy(teacher, 0.01)
    assert (log_policy[0, 1] - log_policy[0, 0]).item() == pytest.approx(2**-10 / 0.01, rel=1e-5)


@losses
@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 9), actions=st.integers(1, 6), copies=st.integers(2, 4)
)
@settings(max_examples=25, deadline=None)
def test_loss_does_not_change_with_the_batch_size(
    loss, seed: int, batch: int, actions: int, copies: int
) -> None:
    student, teacher = pair(seed, batch, actions)
    single = torch.stack([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(batch)]).mean()
    torch.testing.assert_close(loss(student, teacher), single)
    torch.testing.assert_close(loss(student.repeat(copies, 1), teacher.repeat(copies, 1)), single)


@losses
def test_no_gradient_reaches_the_teacher(loss) -> None:
    student, teacher = pair(1, 5, 3)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@given(seed=st.integers(0, 1000), actions=st.integers(2, 6), temperature=st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_kl_properties(seed: int, actions: int, temperature: float) -> None:
    student, teacher = pair(seed, 7, actions)
    student.requires_grad_()
    loss = kl_loss(student, teacher, temperature)
    assert loss.item() >= -1e-12
    # Policies do not change when a constant is added to all outputs of a sample.
    shift = torch.arange(7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        kl_loss(student + shift, teacher - shift, temperature), loss, atol=1e-9, rtol=1e-9
    )
    # The gradient is the difference of the two policies over the batch.
    (gradient,) = torch.autograd.grad(loss, student)
    expected = (student.softmax(1) - (teacher / temperature).softmax(1)) / 7
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-9, rtol=1e-6)


def test_the_feature_loss_by_hand() -> None:
    predicted = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, -1.0]])
    # 1 + 4 and 9 + 1: summed over the features, averaged over the samples.
    assert feature_loss(predicted, teacher).item() == pytest.approx(7.5)


def test_the_temperature_of_an_action_gap() -> None:
    tau = action_gap_temperature(0.3, 50)
    policy = teacher_log_policy(torch.tensor([[1.0, 1.3, -5.0]]), tau).exp()[0]
    assert (policy[1] / policy[0]).item() == pytest.approx(50, rel=1e-4)


def test_constant_losses_by_hand() -> None:
    teacher = torch.tensor([[0.0, 4.0], [2.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    assert constant_loss("mse", teacher, 1.0) == pytest.approx(1 + 4)
    assert constant_loss("nll", teacher, 1.0) == pytest.approx(math.log(2))
    # softmax(ln 3, 0) = (3/4, 1/4), half the time the other way round: the mean policy is (1/2, 1/2).
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]]) * 0.1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_loss("kl", teacher, 0.1) == pytest.approx(math.log(2) - entropy)
    assert constant_loss("kl", teacher[:1].repeat(3, 1), 0.1) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", ["mse", "nll", "kl"])
def test_no_constant_answer_is_better_than_the_constant_loss(loss: str) -> None:
    _, teacher = pair(3, 500, 4)
    best = constant_loss(loss, teacher, 0.7)
    answer = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([answer], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = LOSSES[loss](answer.expand(500, 4), teacher)
        value.backward()
        return value

    optimizer.step(closure)
    assert closure().item() == pytest.approx(best, rel=1e-5)


def test_a_known_policy_gives_the_same_kl() -> None:
    student, teacher = pair(2, 9, 3)
    torch.testing.assert_close(
        kl_to_policy(student, teacher_log_policy(teacher, 0.1)), kl_loss(student, teacher, 0.1)
    )


def test_the_reverse_kl_by_hand() -> None:
    student = torch.tensor([[math.log(3.0), 0.0]])  # (3/4, 1/4)
    log_teacher = torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert reverse_kl(student, log_teacher).tolist() == pytest.approx([expected])
    assert reverse_kl(torch.zeros(1, 2), log_teacher).item() == pytest.approx(0, abs=1e-7)


def test_log_policies_have_a_floor() -> None:
    teacher = torch.tensor([[0.0, 1000.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = floored_log_policy(teacher, 0.01, 0.2).exp()
    assert found[0].tolist() == pytest.approx([0.05, 0.85, 0.05, 0.05])
    assert found[1].tolist() == pytest.approx([0.25] * 4)
