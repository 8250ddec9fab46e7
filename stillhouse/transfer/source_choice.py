"""Which of several sources to start from, by a short probe of each.

Every candidate, starting from scratch among them, is trained on the target for a part of the budget and judged greedily on
validation episodes; the best goes on with what is left. The probes' env steps count: the chosen run's curve is moved by
those of the others. Where two are equal, the one named first is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stillhouse.transfer.fine_tuning import FineTuning
from stillhouse.types import Report


class SourceChoice:
    """Probes, chooses, and trains the chosen one.

    Args:
        candidates: name to a run's maker; each run's learner has a budget of ``budget`` less the other candidates' probes.
        budget: env steps of all together.
        probe_steps: env steps that each candidate is tried for.

    Attributes:
        scores: candidate to its mean return after the probe.
        probed: candidate to the env steps of its probe, which ends with a report of its learner's.
        chosen: the candidate that is trained on; "" while probing.
    """

    def __init__(
        self, candidates: Mapping[str, Callable[[], FineTuning]], budget: int, probe_steps: int
    ) -> None:
        self.candidates = dict(candidates)
        self.budget, self.probe_steps = budget, probe_steps
        self.scores: dict[str, float] = {}
        self.probed: dict[str, int] = {}
        self.chosen = ""
        self._run: FineTuning | None = None

    @property
    def run(self) -> FineTuning:
        """The chosen run."""
        assert self._run is not None
        return self._run

    @property
    def spent(self) -> int:
        """Env steps of the probes whose candidates were not chosen."""
        return sum(env_steps for name, env_steps in self.probed.items() if name != self.chosen)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The chosen run's, after the others' probes."""
        (_, first), *rest = self.run.curve
        return [(0, first), *((env_steps + self.spent, value) for env_steps, value in rest)]

    def train(self) -> Iterator[Report]:
        """Probe all that has not been, choose, and train; a report for each of the learners'."""
        if not self.chosen:
            yield from self._probe()
        else:
            self._reports = self.run.train()
        for report in self._reports:
            yield Report(report.done + self.spent, report.total + self.spent, report.metrics)

    def _probe(self) -> Iterator[Report]:
        best: tuple[FineTuning, Iterator[Report]] | None = None
        self.scores, self.probed = {}, {}
        for name, make in self.candidates.items():
            run = make()
            reports = run.train()
            before = sum(self.probed.values())
            for report in reports:
                yield Report(before + report.done, self.budget, report.metrics)
                if report.done >= self.probe_steps:
                    break
            self.probed[name] = report.done
            self.scores[name] = run.judge()
            if best is None or self.scores[name] > max(
                score for other, score in self.scores.items() if other != name
            ):
                best, chosen = (run, reports), name
        assert best is not None
        self.chosen = chosen
        self._run, self._reports = best

    def get_state(self) -> dict[str, Any]:
        """The whole state, between two reports; the probes are begun again, for they are short."""
        if not self.chosen:
            return {"chosen": ""}
        found = {"chosen": self.chosen, "scores": self.scores, "probed": self.probed}
        return {**found, "run": self.run.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        if state["chosen"]:
            self.chosen = state["chosen"]
            self.scores, self.probed = dict(state["scores"]), dict(state["probed"])
            self._run = self.candidates[self.chosen]()
            self._run.set_state(state["run"])
