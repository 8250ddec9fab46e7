"""Offline policy distillation of one or many teachers into one student.

Rusu et al. 2015, "Policy Distillation" (https://arxiv.org/abs/1511.06295): the student is trained,
supervised, on what the teachers saw and thought, and never acts. The update and its loss are those of
:class:`stillhouse.distillation.student.StudentTraining`.

Deviations from the paper:

1. Each update takes a batch from every environment; the paper's minibatches come from one game at a time.
2. Adam with a linearly falling learning rate instead of RMSProp.
3. A tenth of the episodes is held out; the weights with the best agreement there (share of observations in
   which student and teacher prefer the same action, mean over environments) are the result, and training
   stops when it no longer grows.
4. The student shares its torso only; the paper's has private layers after shared convolutions. Environments
   with equal observation shapes share an adapter.
5. With MSE the student learns standardised outputs, see ``student.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from stillhouse.distillation.student import LabelledData, StudentConfig, StudentTraining
from stillhouse.networks.multi_task import MultiTaskNetwork
from stillhouse.types import Report


class DistillationConfig(StudentConfig):
    """A student that learns from datasets on disk."""

    method: Literal["offline"] = Field(
        default="offline", description="the teachers' datasets are all there is"
    )


class Distillation:
    """A student in training. :meth:`train` trains it; :meth:`student` is the result.

    Args:
        config: how.
        datasets: one per environment, by the name its head shall have.
        seed: the stage's seed.
        device: torch device.
        teachers: their networks, by the same names; only for ``feature_weight``.
        initial: a student of the same shape to go on from.

    Attributes:
        training: the student's network, parameters and best weights.

    Raises:
        StillhouseError: weights for unknown environments, a budget too small for any network, a dataset of a
            single episode, MSE on teachers of different kinds, a feature weight without teachers, or an initial
            student of another shape.
    """

    def __init__(
        self,
        config: DistillationConfig,
        datasets: Mapping[str, LabelledData],
        seed: int,
        device: str = "cpu",
        teachers: Mapping[str, MultiTaskNetwork] = MappingProxyType({}),
        initial: MultiTaskNetwork | None = None,
    ) -> None:
        self.config = config
        self.training = StudentTraining(config, datasets, seed, device, teachers, initial)

    @property
    def updates(self) -> int:
        """Done so far."""
        return self.training.updates

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the best measurement so far."""
        return self.training.best

    @property
    def teacher_parameters(self) -> int:
        """Of all teachers together."""
        return self.training.teacher_parameters

    @property
    def finished(self) -> bool:
        """All updates done, or agreement has stopped growing."""
        return self.training.finished

    def train(self) -> Iterator[Report]:
        """Train until finished; :meth:`get_state` is exact whenever this has yielded.

        Yields:
            Per evaluation interval, in updates: ``loss/distill`` and ``loss/<environment>`` (means over the
            interval), ``eval/agreement`` and ``agreement/<environment>`` (on held-out episodes).

        Raises:
            StillhouseError: the loss is not finite.
        """
        config = self.config
        while not self.finished:
            count = min(config.evaluation_interval, config.updates - self.updates)
            metrics = self.training.measure(self.training.update(count))
            yield Report(self.updates, config.updates, metrics)

    def student(self) -> MultiTaskNetwork:
        """A network of its own with the best weights so far, in evaluation mode.

        Raises:
            StillhouseError: nothing was measured yet.
        """
        return self.training.student()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain data and tensors."""
        return self.training.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_state` of a distillation with the same arguments."""
        self.training.set_state(state)
