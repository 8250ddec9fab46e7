"""The form's fields: what they override, and that they offer what there is."""

from __future__ import annotations

from typing import get_args

from flows.distillation import Transfer
from flows.form import flat_overrides
from stillhouse.transfer.fine_tuning import Mode


def test_fields_left_at_the_suites_own_override_nothing() -> None:
    assert (
        flat_overrides(
            0, 1.0, loss="suite", temperature=0.0, student_share=0.0, transfer="suite", device="suite"
        )
        == []
    )


def test_every_field_overrides_its_parameter() -> None:
    assert flat_overrides(
        2,
        0.5,
        loss="nll",
        temperature=0.1,
        student_share=0.05,
        transfer="l2_sp",
        method="soft_sharing",
        balancing="pcgrad",
        device="cpu",
    ) == [
        "seeds=[0, 1]",
        "budget=0.5",
        "distill_student.loss=nll",
        "distill_student.temperature=0.1",
        "distill_student.parameter_fraction=0.05",
        "fine_tune.modes=[l2_sp, scratch]",
        "train_multi_task.method=soft_sharing",
        "train_multi_task.balancing=pcgrad",
        "device=cpu",
    ]


def test_every_way_of_transfer_is_offered() -> None:
    assert {way.value for way in Transfer} == {"suite", *get_args(Mode)} - {"scratch"}
